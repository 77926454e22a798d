"""Rendering, publishing and importing kernel files."""

from __future__ import annotations

import errno
import inspect
import json
import os
import shutil
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import msgspec
import pytest
from kernel_helpers import SPEC, TEMPLATE, blueprint

from morphc.errors import KernelError, TemplateError, UnknownNameError
from morphc.kernels import codegen, templating
from morphc.kernels.blueprints import Bottleneck, base
from morphc.kernels.cache import place
from morphc.kernels.cache.manifest import Provenance
from morphc.kernels.codegen import KERNEL_LINE, Source
from morphc.kernels.reference.chunks import bounds


def make(text: str | None = TEMPLATE, **holes: object) -> Source:
    with blueprint(text) as spec:
        return codegen.render("blueprint:own", spec, **({"more": 1} | holes))


class TestNames:
    def test_a_name_says_what_the_kernel_is(self) -> None:
        site = msgspec.structs.replace(SPEC, features=4096, seeds=1024, slots=64, rank=16, dtype="bfloat16")
        assert site.name == "forward_bottleneck_h4096_s1024_k64_r16_bf16"

    def test_a_kernel_without_a_blueprint_is_named_without_one(self) -> None:
        watch = msgspec.structs.replace(SPEC, kind="telemetry", blueprint="", slots=0, rank=0)
        assert watch.name == "telemetry_h10_s3_fp32"

    def test_what_is_unusual_is_named(self) -> None:
        odd = msgspec.structs.replace(SPEC, blend="gate", layout="channels_first", epilogue="silu")
        assert odd.name == "forward_bottleneck_gate_h10_s3_k2_r5_fp32_channels_first_silu"


class TestText:
    def test_equal_arguments_make_equal_text(self) -> None:
        assert make() == make()
        assert make().text != make(more=2).text
        assert make().digest != make(more=2).digest
        assert make().template_digest == make(more=2).template_digest

    def test_the_template_digest_covers_what_is_included(self, tmp_path: Path) -> None:
        inner = tmp_path / "inner.jinja"
        outer = TEMPLATE.replace("{{ more }}", '{% include "blueprint:inner" %}', 1)
        digests = []
        for number in "12":
            inner.write_text(number)
            with blueprint(str(inner), "inner"):
                digests.append(make(outer).template_digest)
        assert digests[0] != digests[1]

    def test_the_first_kernel_stands_at_a_constant_line(self) -> None:
        longer = "A = tl.constexpr(1)\nB = tl.constexpr(2)\n" + TEMPLATE
        for text in (make().text, make(longer).text, make(TEMPLATE.replace("FEATURES = ", "NAME = ")).text):
            assert text.splitlines()[KERNEL_LINE - 1] == "@triton.jit"
            assert text.splitlines()[KERNEL_LINE - 2] == ""

    def test_comments_stay_with_the_kernel_below(self) -> None:
        lines = make(TEMPLATE.replace("@triton", "# What it is for.\n@triton", 1)).text.splitlines()
        assert lines[KERNEL_LINE - 2] == "# What it is for."

    def test_too_many_constants_are_refused(self) -> None:
        with pytest.raises(TemplateError, match=rf"60 lines before.* stands at line {KERNEL_LINE}"):
            make("".join(f"A{n} = tl.constexpr({n})\n" for n in range(58)) + TEMPLATE)

    def test_a_template_without_a_kernel_is_refused(self) -> None:
        with pytest.raises(TemplateError, match="renders to no function"):
            make("A = 1\n")

    def test_blank_lines_are_those_of_ruff(self, tmp_path: Path) -> None:
        file = tmp_path / "kernel.py"
        file.write_text(make().text)
        command = [
            sys.executable,
            "-m",
            "ruff",
            "format",
            "--isolated",
            "--line-length",
            "110",
            "--diff",
            str(file),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_chunk_arithmetic_is_that_of_the_reference(self) -> None:
        text = (
            "# {{ base }} {{ wider }} {{ chunk_pad }} {{ rank_pad }} {{ 5 | next_pow2 }} {{ cdiv(7, 2) }}\n"
        )
        line = make(text + TEMPLATE).text.splitlines()[9]
        base, wider, *rest = map(int, line[2:].split())
        starts = [start for start, _ in bounds(SPEC.features, SPEC.seeds)]
        assert starts == [j * base + min(j, wider) for j in range(SPEC.seeds)]
        assert rest == [4, 8, 8, 4]

    def test_a_kernel_of_no_site_has_no_chunks(self) -> None:
        with blueprint(TEMPLATE) as spec:
            none = msgspec.structs.replace(spec, features=0, seeds=0, chunk=0, rank=0)
            assert "chunks" not in codegen.render("blueprint:own", none, more=1).text


class TestTemplateErrors:
    """Each names the template's own file and line, whoever wrote it."""

    def test_a_syntax_error(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.jinja"
        file.write_text(TEMPLATE.replace("{{ more }}", "{{ more }", 1))
        with pytest.raises(TemplateError, match=rf"^{file}:4: unexpected '}}'"):
            make(str(file))

    def test_a_hole_that_nobody_fills(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.jinja"
        file.write_text(TEMPLATE)
        with (
            blueprint(str(file)) as spec,
            pytest.raises(TemplateError, match=rf"^{file}:4: 'more' is undefined"),
        ):
            codegen.render("blueprint:own", spec)

    def test_an_expression_that_fails(self) -> None:
        with pytest.raises(
            TemplateError, match=r"^<template of blueprint 'own'>:4: TypeError: .*unsupported operand"
        ):
            make(TEMPLATE.replace("{{ more }}", "{{ more + 'a' }}", 1))

    def test_python_that_is_none(self) -> None:
        with pytest.raises(
            TemplateError, match=r"^<template of blueprint 'own'>:4: makes invalid Python.*half\(x\) \+ 1"
        ):
            make(TEMPLATE.replace("{{ more }}", "{{ more }} +", 1))
        with pytest.raises(TemplateError, match=r"^<template of blueprint 'own'>:16: makes invalid Python"):
            make(TEMPLATE.replace("def add(", "def add)"))

    def test_macros_of_a_users_blueprint_name_their_own_line(self) -> None:
        outer = TEMPLATE.replace("{% macro", "{% import blueprint_macros as own with context %}\n{% macro", 1)
        outer = outer.replace("{{ more }}", "{{ own.forward() }}", 1)
        for text, where in [
            ("\n{% macro forward() %}\n2 * (\n{% endmacro %}\n", "3: makes invalid Python"),
            ("\n{% macro forward() %}{{ nothing }}{% endmacro %}\n", "2: 'nothing' is undefined"),
            ("\n\n{% macro forward( %}2{% endmacro %}\n", "3: expected token"),
        ]:
            wanted = pytest.raises(TemplateError, match=f"^<template of blueprint 'own'>:{where}")
            with blueprint(outer, "outer"), blueprint(text) as spec, wanted:
                codegen.render("blueprint:outer", spec, more=1)

    def test_a_template_that_is_not_there(self) -> None:
        with pytest.raises(
            TemplateError, match=r"no template 'lifecicle\.py\.jinja'\. Did you mean 'lifecycle\.py\.jinja'"
        ):
            codegen.render("lifecicle.py.jinja", SPEC)
        with pytest.raises(
            TemplateError, match=r"absent\.jinja: the template of 'blueprint own': No such file"
        ):
            make("absent.jinja")
        with pytest.raises(UnknownNameError, match="unknown blueprint 'nobody'"):
            codegen.render("blueprint:nobody", SPEC)

    def test_a_blueprint_without_macros(self) -> None:
        with pytest.raises(
            TemplateError, match="blueprint 'own' has no macros for kernels: give its class a `templ"
        ):
            make(None)

    def test_built_in_macros_are_for_the_built_in_class_alone(self) -> None:
        assert templating.has_template(base.get("bottleneck"))
        with blueprint(TEMPLATE):
            assert templating.has_template(base.get("own"))
        other = type("Other", (Bottleneck,), {"__module__": __name__})()
        assert not templating.has_template(other)

    def test_a_relative_template_is_beside_the_file_of_its_class(self) -> None:
        with pytest.raises(TemplateError, match=f"^{Path(__file__).with_name('x.jinja')}: .*No such file"):
            make("x.jinja")


class TestPublishing:
    def test_an_entry_has_the_text_the_spec_and_who_it_is_for(self) -> None:
        source = make(more=3)
        path = codegen.publish(source, Provenance(layers=("encoder.fc1",), sources=("model.py:41",)))
        assert path.read_text() == source.text
        assert path.parent.name == f"{source.name}-{source.key[:12]}"
        told = json.loads((path.parent / "provenance.json").read_text())
        del told["check"]
        assert told == {"layers": ["encoder.fc1"], "sources": ["model.py:41"], "template": "blueprint:own"}
        spec = msgspec.json.decode((path.parent / "spec.json").read_text(), type=type(SPEC))
        assert spec == source.spec
        assert sorted(file.name for file in path.parent.iterdir()) == [
            "kernel.py",
            "manifest.json",
            "provenance.json",
            "spec.json",
        ]

    def test_layers_that_share_a_kernel_are_told_together(self) -> None:
        source = make(more=14)
        path = codegen.publish(source)
        for layers in (("fc1",), ("fc2", "fc1"), ("fc1",)):
            codegen.publish(source, Provenance(layers=layers))
        assert json.loads(path.with_name("provenance.json").read_text())["layers"] == ["fc1", "fc2"]
        assert sorted(file.name for file in path.parent.iterdir()) == [
            "kernel.py",
            "manifest.json",
            "provenance.json",
            "spec.json",
        ]

    def test_it_is_there_the_second_time(self, fresh_cache: Path) -> None:
        source = make(more=4)
        path = codegen.publish(source)
        written = path.stat().st_mtime_ns
        codegen._published.clear()
        assert codegen.publish(source) == path
        assert path.stat().st_mtime_ns == written
        assert [entry.name for entry in (fresh_cache / "v1" / "kernels").iterdir()] == [path.parent.name]

    def test_who_loses_the_race_takes_what_is_there(
        self, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = make(more=5)
        rename = Path.rename

        def other_first(self: Path, target: Path) -> Path:
            if self.parent.name == "kernels":
                shutil.copytree(self, target)
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", other_first)
        path = codegen.publish(source)
        assert path.read_text() == source.text
        assert [entry.name for entry in path.parent.parent.iterdir()] == [path.parent.name]

    def test_an_entry_that_was_changed_is_moved_aside_and_made_again(self, fresh_cache: Path) -> None:
        source = make(more=6)
        path = codegen.publish(source)
        path.write_text(source.text.replace("half", "twice"))
        codegen._published.clear()
        with pytest.warns(UserWarning, match="is not what was put there"):
            assert codegen.publish(source) == path
        assert path.read_text() == source.text
        (aside,) = (fresh_cache / "v1" / "quarantine").iterdir()
        assert "twice" in (aside / "kernel.py").read_text()

    def test_a_cache_that_can_not_be_written_is_done_without(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MORPHC_CACHE_DIR", str(tmp_path / "file" / "cache"))
        source = make(more=7)
        with pytest.warns(UserWarning, match="kernels are not kept.*MORPHC_CACHE_DIR"):
            path = codegen.publish(source)
        assert path.read_text() == source.text
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert codegen.publish(make(more=8)).is_file()

    def test_nowhere_to_write_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(self: Path, *args: object, **options: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        source = make(more=15)
        monkeypatch.setenv("MORPHC_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(place, "_warned", {("unwritable", str(place.root()))})
        monkeypatch.setattr(Path, "mkdir", full)
        with pytest.raises(
            KernelError, match=r"neither to .*v1 \(No space left.*nor to a temporary folder \(No space"
        ):
            codegen.publish(source)

    def test_an_entry_of_a_read_only_cache_is_used(
        self, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = make(more=9)
        path = codegen.publish(source)
        codegen._published.clear()
        monkeypatch.setattr(place, "stage", None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert codegen.publish(source) == path

    def test_the_cache_is_where_doctor_says(self) -> None:
        from morphc.cli import doctor

        assert doctor.examine().cache == str(place.root())


class TestLoading:
    def test_the_source_of_a_kernel_can_be_shown(self) -> None:
        source = make(more=10)
        kernel = codegen.load(source, "add")
        assert inspect.getsourcefile(kernel.fn) == str(codegen.publish(source))
        assert inspect.getsource(kernel.fn).splitlines()[1].startswith("def add(x_ptr")
        assert codegen.load(source, "add") is kernel

    def test_nothing_but_the_text_is_run(self, fresh_cache: Path) -> None:
        source = make(more=11)
        codegen.publish(source).write_text("raise SystemExit('not this one')\n")
        assert codegen.load(source, "add").arg_names == ["x_ptr", "n", "scale", "BLOCK"]
        assert not list(fresh_cache.rglob("*.pyc"))

    def test_a_kernel_that_is_not_there(self) -> None:
        with pytest.raises(KernelError, match=r"forward_own_\S+ has no kernel 'sub'; it has half, add"):
            codegen.load(make(), "sub")

    def test_a_traceback_shows_the_line(self) -> None:
        source = make(TEMPLATE.replace("return x * 0.5", "return x.nothing"))
        half = codegen.load(source, "half").fn
        with pytest.raises(AttributeError) as caught:
            half(1.0)
        last = traceback.extract_tb(caught.value.__traceback__)[-1]
        assert last.line == "return x.nothing"
        assert last.filename == str(codegen.publish(source))

    def test_a_line_of_the_file_is_found_in_the_template(self) -> None:
        with blueprint(TEMPLATE) as spec:
            source = codegen.render("blueprint:own", spec, more=1)
            self.check_lines(source)
        assert codegen.locate(source, KERNEL_LINE) is None, "the template is gone"

    def check_lines(self, source: Source) -> None:
        for text, line in [
            ("return x * 0.5", 8),
            ("x = half(x) + 1", 4),
            ("tl.store", 21),
            ("FEATURES = ", 2),
        ]:
            at = next(n for n, other in enumerate(source.text.splitlines(), 1) if text in other)
            place = codegen.locate(source, at)
            assert place is not None
            assert place.line == line
        assert codegen.locate(source, 1) is None

    def test_the_mode_is_that_of_triton_whatever_the_variable_says_later(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = codegen.load(make(more=12), "add")
        monkeypatch.setenv("TRITON_INTERPRET", "0" if os.environ.get("TRITON_INTERPRET") else "1")
        assert type(codegen.load(make(more=13), "add")) is type(first)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MORPHC_CACHE_DIR", str(tmp_path))
    return tmp_path
