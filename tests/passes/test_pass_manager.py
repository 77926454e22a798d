"""The manager: what a pass changed, whether it left a sound program, and how passes are named."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from compiler_hosts import HOSTS, Functional, Mlp, compiled, line_of, rows

from morphc.compiler import bisect, default_passes
from morphc.config import Config
from morphc.errors import ConfigError, MorphcError, PassError, PassOrderError, UnknownNameError
from morphc.passes import dumps, manager
from morphc.passes.capture import Capture
from morphc.passes.manager import PassRecord, known_passes, parse_passes, register_pass, run_passes
from morphc.passes.plan import Miss
from morphc.passes.plan_chunks import PlanChunks
from morphc.passes.program import Program
from morphc.passes.updates import with_plan
from morphc.passes.verify import Verify


def program_of(host: torch.nn.Module, *, until: str = "insert-sites") -> Program:
    """A program after the pipeline's passes up to `until`."""
    program = Program(host, (rows(),), {}, Config(seeds_per_layer=2))
    names = [step.name for step in default_passes()]
    run_passes(program, default_passes()[: names.index(until) + 1])
    return program


def make_pass(apply: Any, **extra: Any) -> Any:
    """A frozen dataclass pass named `probe` around a function."""
    body = {
        "name": "probe",
        "__annotations__": {"name": ClassVar[str]},
        "apply": lambda self, p: apply(p),
        **extra,
    }
    return dataclasses.dataclass(frozen=True)(type("Probe", (), body))


def dump_in(message: str) -> Path:
    found = re.search(r"\(dump: (.+)\)$", message)
    assert found is not None
    return Path(found.group(1))


class TestRecords:
    def test_a_pass_that_does_nothing_is_not_modified(self):
        (record,) = run_passes(program_of(Mlp()), [make_pass(lambda p: None)()])
        assert record == PassRecord("probe", record.seconds, False, 0, 0, "")
        assert record.seconds >= 0

    def test_modified_is_derived_and_not_what_the_pass_says(self):
        def apply(program: Program) -> bool:
            return True

        (record,) = run_passes(program_of(Mlp()), [make_pass(apply)()])
        assert not record.modified

    def test_created_erased_and_diff_show_a_replaced_node(self):
        def apply(program: Program) -> None:
            for _, graph in program.graphs():
                (node,) = [n for n in graph.nodes if n.target is torch.relu]
                with graph.inserting_before(node):
                    fresh = graph.call_method("clamp", (node.args[0],), {"min": 0})
                node.replace_all_uses_with(fresh)
                graph.erase_node(node)

        program = program_of(Mlp())
        (record,) = run_passes(program, [make_pass(apply)()])
        assert (record.modified, record.created, record.erased) == (True, 2, 2)  # train and eval
        assert re.search(r"^-  relu = ", record.diff, re.MULTILINE)
        assert re.search(r"^\+  clamp = call_method clamp", record.diff, re.MULTILINE)
        assert "+++ after probe" in record.diff

    def test_created_counts_the_inserted_sites(self):
        result = compiled(Mlp())
        (record,) = [r for r in result.report.passes if r.name == "insert-sites"]
        assert (record.created, record.erased) == (4, 0)  # two sites in two graphs

    def test_a_change_of_the_plan_alone_is_a_modification(self):
        def apply(program: Program) -> None:
            with_plan(program, sites=(), misses=tuple(Miss(s.path, "", "gone") for s in program.plan.sites))

        (record,) = run_passes(program_of(Mlp()), [make_pass(apply)()])
        assert (record.modified, record.created, record.erased) == (True, 0, 0)
        assert "-site Site(path='fc1'" in record.diff

    @pytest.mark.parametrize("name", HOSTS)
    @pytest.mark.parametrize("index", range(len(default_passes())), ids=[p.name for p in default_passes()])
    def test_running_a_pass_twice_changes_nothing_the_second_time(self, name, index):
        steps = default_passes()
        program = Program(HOSTS[name](), (rows(),), {}, Config(seeds_per_layer=2))
        run_passes(program, steps[: index + 1])
        (again,) = run_passes(program, [steps[index]])
        assert (again.modified, again.created, again.erased, again.diff) == (False, 0, 0, "")

    def test_the_whole_pipeline_twice_changes_nothing_the_second_time(self):
        program = Program(Functional(), (rows(),), {}, Config(seeds_per_layer=2))
        run_passes(program, default_passes())
        assert not any(record.modified for record in run_passes(program, default_passes()))

    def test_print_after_one_pass_and_after_all(self):
        def printed(*names: str) -> list[str]:
            seen: list[str] = []
            program = Program(Mlp(), (rows(),), {}, Config(seeds_per_layer=2))
            run_passes(
                program, default_passes(), print_after=names, on_print=lambda n, t: seen.append(f"{n}\n{t}")
            )
            return seen

        (only,) = printed("insert-sites")
        assert only.startswith("insert-sites\n# <root> [train]")
        assert "call_module fc1.morphc" in only
        assert [text.split("\n")[0] for text in printed("all")] == [step.name for step in default_passes()]
        assert printed() == []


class TestBrokenPasses:
    def test_a_graph_that_fails_lint_names_pass_region_and_an_existing_dump(self):
        def apply(program: Program) -> None:
            graph = program.regions[""].graphs["train"]
            first = next(n for n in graph.nodes if n.op == "call_module")
            list(graph.nodes)[-1].append(first)  # used before it is made

        with pytest.raises(PassError) as caught:
            run_passes(program_of(Mlp()), [make_pass(apply)()])
        message = str(caught.value)
        assert "pass 'probe' broke the graph of <root> [train]" in message
        dump = dump_in(message)
        assert "# <root> [train]" in dump.read_text(encoding="utf-8")
        dump.unlink()

    def test_a_graph_without_an_output_is_refused(self):
        def apply(program: Program) -> None:
            graph = program.regions[""].graphs["eval"]
            graph.erase_node(list(graph.nodes)[-1])

        with pytest.raises(
            PassError, match=r"broke the graph of <root> \[eval\]: the graph has no output node"
        ):
            run_passes(program_of(Mlp()), [make_pass(apply)()])

    def test_a_failing_precondition_keeps_the_pass_from_running(self):
        ran = []
        probe = make_pass(ran.append, requires=lambda self, p: "the moon is not full")
        with pytest.raises(PassOrderError, match="pass 'probe' can't start: the moon is not full"):
            run_passes(program_of(Mlp()), [probe()])
        assert not ran
        assert not dumps.folder().exists()

    def test_a_failing_postcondition_is_asked_of_the_result(self):
        seen = []

        def ensures(self: Any, program: Program) -> str:
            seen.append(program.config.rank)
            return "it is broken now"

        def apply(program: Program) -> None:
            program.config = Config(rank=3)

        with pytest.raises(PassError, match="pass 'probe' left a broken program: it is broken now"):
            run_passes(program_of(Mlp()), [make_pass(apply, ensures=ensures)()])
        assert seen == [3]

    def test_a_pass_that_raises_at_a_node_names_node_and_source_line(self):
        class Stuck(Exception):
            pass

        def apply(program: Program) -> None:
            error = Stuck("no idea")
            nodes = program.regions[""].graphs["train"].nodes
            error.node = next(n for n in nodes if n.target == "fc2")
            raise error

        with pytest.raises(PassError) as caught:
            run_passes(program_of(Mlp()), [make_pass(apply)()])
        message = str(caught.value)
        expected = line_of(Mlp.forward, "self.fc2(")
        assert message.startswith(f"pass 'probe' failed at node 'fc2' ({expected}): Stuck: no idea")
        assert isinstance(caught.value.__cause__, Stuck)
        dump = dump_in(message)
        assert dump.is_file()
        dump.unlink()

    @pytest.mark.parametrize("own", [KeyError("fc9"), PassError("no fc9 here")], ids=["any", "own"])
    def test_a_pass_that_raises_without_a_node_names_pass_error_and_line(self, own):
        def apply(program: Program) -> None:
            helper(program)

        def helper(program: Program) -> None:
            raise own

        with pytest.raises(PassError) as caught:
            run_passes(program_of(Mlp()), [make_pass(apply)()])
        what = "KeyError: 'fc9'" if isinstance(own, KeyError) else "no fc9 here"
        line = line_of(helper, "raise own")
        assert str(caught.value).startswith(f"pass 'probe' failed: {what} at {line}: raise own (dump: ")

    def test_a_pass_that_raises_in_a_library_names_its_own_line(self):
        def apply(program: Program) -> None:
            dataclasses.replace(program, nothing=1)

        with pytest.raises(PassError, match="pass 'probe' failed: TypeError: ") as caught:
            run_passes(program_of(Mlp()), [make_pass(apply)()])
        assert f" at {line_of(apply, 'replace(')}: dataclasses.replace(" in str(caught.value)

    @pytest.mark.parametrize("which", ["requires", "ensures"])
    def test_a_condition_that_raises_is_a_pass_error_with_its_line(self, which):
        def condition(self: Any, program: Program) -> str:
            return {}["moon"]

        probe = make_pass(lambda p: None, **{which: condition})
        with pytest.raises(PassError) as caught:
            run_passes(program_of(Mlp()), [probe()])
        assert f"KeyError: 'moon' at {line_of(condition, 'moon')}" in str(caught.value)

    def test_an_error_of_morphcs_keeps_its_type(self):
        def apply(program: Program) -> None:
            Config(rank=0)

        with pytest.raises(ConfigError, match="rank=0"):
            run_passes(program_of(Mlp()), [make_pass(apply)()])

    def test_the_newest_dumps_are_kept_in_one_folder(self, tmp_path):
        def apply(program: Program) -> None:
            raise KeyError("fc9")

        program = program_of(Mlp())
        places = []
        for _ in range(dumps.KEPT + 3):
            with pytest.raises(PassError) as caught:
                run_passes(program, [make_pass(apply)()])
            places.append(dump_in(str(caught.value)))
        assert {place.parent for place in places} == {tmp_path / "cache" / "dumps"}
        assert len(list(places[-1].parent.iterdir())) == dumps.KEPT
        assert places[-1].is_file()
        assert not places[0].exists()

    def test_a_dump_that_cannot_be_written_hides_nothing(self, tmp_path, monkeypatch):
        def apply(program: Program) -> None:
            raise KeyError("fc9")

        (tmp_path / "plain").write_text("")
        monkeypatch.setenv("MORPHC_CACHE_DIR", str(tmp_path / "plain"))
        with pytest.raises(PassError, match=r"KeyError: 'fc9' .*\(no dump: .*can't be written"):
            run_passes(program_of(Mlp()), [make_pass(apply)()])

    def test_a_pass_that_drops_a_site_in_silence_is_refused(self):
        with pytest.raises(PassError, match="took the site 'fc1' out of the plan"):
            run_passes(program_of(Mlp()), [make_pass(lambda p: with_plan(p, sites=()))()])

    def test_lower_before_anything_was_planned_says_what_is_missing(self):
        program = program_of(Mlp(), until="find-candidates")
        with pytest.raises(PassError, match="pass 'lower' can't start: some sites have no seeds"):
            run_passes(program, parse_passes("lower"))

    def test_candidates_before_capture_say_what_is_missing(self):
        program = Program(Mlp(), (rows(),), {}, Config())
        with pytest.raises(PassError, match="pass 'find-candidates' can't start: nothing was captured"):
            run_passes(program, parse_passes("find-candidates"))


@register_pass
@dataclasses.dataclass(frozen=True)
class Typed:
    name: ClassVar[str] = "typed-options"
    count: int = 1
    ratio: float = 0.5
    on: bool = False
    mode: Literal["slow", "fast"] = "slow"
    limit: int | None = 3
    many: int | Literal["auto"] | None = None
    some_text: str = ""

    def apply(self, program: Program) -> None:
        pass


class TestOrder:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("lower,capture", "pass 'capture' comes after 'lower'"),
            (
                "capture,plan-chunks,find-candidates,insert-sites,lower",
                "'find-candidates' comes after 'plan-chunks'",
            ),
            ("capture,find-candidates,plan-chunks,lower,insert-sites", "'insert-sites' comes after 'lower'"),
            ("verify,capture,find-candidates,plan-chunks,lower", "'capture' comes after 'verify'"),
            ("insert-sites,capture", "'capture' comes after 'insert-sites'"),
            ("capture,find-candidates,lower", "some sites have no seeds planned yet"),
            ("lower", "nothing was captured yet"),
        ],
    )
    def test_a_wrong_order_of_built_in_passes_is_a_wrong_argument(self, text, words):
        with pytest.raises(PassOrderError, match=re.escape(words)) as caught:
            compiled(Mlp(), passes=text)
        assert isinstance(caught.value, ConfigError)

    def test_bisect_refuses_a_wrong_order_too(self):
        with pytest.raises(PassOrderError):
            bisect(Mlp(), (rows(),), passes="find-candidates,capture,lower")

    def test_passes_may_come_again_and_have_others_between_them(self):
        seen = []
        probe = make_pass(lambda p: seen.append(len(p.plan.sites)))()
        first, *rest = default_passes()
        compiled(Mlp(), passes=[first, first, probe, *rest[:3], probe, *rest])
        assert seen == [0, 2]

    def test_a_pass_given_twice_without_the_pipeline_runs_twice(self):
        seen = []
        probe = make_pass(lambda p: seen.append(p))()
        compiled(Mlp(), passes=[probe, probe])
        assert len(seen) == 2


class TestNames:
    @pytest.fixture(autouse=True)
    def typed(self, own_registry):
        register_pass(Typed)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("typed-options", Typed()),
            ("typed-options{}", Typed()),
            ("typed-options{count=4}", Typed(count=4)),
            (" typed-options { ratio = 1e-3 , on=TRUE } ", Typed(ratio=1e-3, on=True)),
            ("typed-options{mode=fast,limit=none}", Typed(mode="fast", limit=None)),
            ("typed-options{many=auto}", Typed(many="auto")),
            ("typed-options{many=12}", Typed(many=12)),
            ("typed-options{some-text=h.[0-9].*}", Typed(some_text="h.[0-9].*")),
            ("typed-options{some-text=a=b}", Typed(some_text="a=b")),
        ],
    )
    def test_options_are_converted_to_the_fields_types(self, text, expected):
        assert parse_passes(text) == [expected]

    def test_several_passes_in_order(self):
        found = parse_passes("capture{symbolic=false}, plan-chunks{seeds=1024,device=cpu},verify")
        assert found == [Capture(symbolic=False), PlanChunks(seeds=1024, device="cpu"), Verify()]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("cpature", "unknown pass 'cpature'. Did you mean 'capture'?"),
            ("capture{symbolc=true}", "Did you mean 'symbolic'?"),
            ("plan-chunks{seed=4}", "Did you mean 'seeds'?"),
        ],
    )
    def test_an_unknown_name_gets_a_suggestion(self, text, words):
        with pytest.raises(UnknownNameError) as caught:
            parse_passes(text)
        assert words in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("typed-options{count=many}", "option count='many' of pass 'typed-options' is not int"),
            ("typed-options{ratio=x}", "ratio='x'"),
            ("typed-options{on=yes}", "on='yes' of pass 'typed-options' is not bool"),
            ("typed-options{mode=medium}", "is not 'slow' or 'fast'"),
            ("typed-options{many=x}", "is not int or 'auto' or none"),
            ("typed-options{count}", "option 'count' of pass 'typed-options' has no value"),
            ("capture verify", "can't read passes at"),
            ("capture{symbolic=true", "can't read passes at"),
            (",capture", "can't read passes at"),
            ("", "passes is empty"),
        ],
    )
    def test_bad_text_is_one_clear_config_error(self, text, words):
        with pytest.raises(ConfigError) as caught:
            parse_passes(text)
        assert words in str(caught.value)

    def test_a_pass_must_be_a_frozen_dataclass_with_a_name_and_apply(self):
        with pytest.raises(ConfigError, match="must be a frozen dataclass"):
            register_pass(type("Loose", (), {"name": "loose", "apply": lambda s, p: None}))
        with pytest.raises(ConfigError, match="must be a frozen dataclass"):
            register_pass(
                dataclasses.dataclass(type("Loose", (), {"name": "loose", "apply": lambda s, p: None}))
            )
        with pytest.raises(ConfigError, match="needs a class attribute `name`"):
            register_pass(
                dataclasses.dataclass(frozen=True)(type("Nameless", (), {"apply": lambda s, p: None}))
            )


class TestEntryPoints:
    SOURCE = """
        from dataclasses import dataclass
        from typing import ClassVar

        @dataclass(frozen=True)
        class Foreign:
            name: ClassVar[str] = "foreign-pass"
            depth: int = 1

            def apply(self, program):
                program.notes.append(f"foreign at depth {self.depth}")
    """

    @pytest.fixture
    def installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """A package on the path with a distribution that names an entry point of morphc.passes."""
        import textwrap

        (tmp_path / "foreign_passes.py").write_text(textwrap.dedent(self.SOURCE), encoding="utf-8")
        info = tmp_path / "foreign_passes-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-passes\nVersion: 1.0\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(sys, "dont_write_bytecode", True)

        def write(text: str) -> None:
            (info / "entry_points.txt").write_text(f"[morphc.passes]\n{text}\n")

        yield write
        sys.modules.pop("foreign_passes", None)

    def test_a_pass_of_an_installed_package_is_known_and_runs(self, installed):
        installed("foreign-pass = foreign_passes:Foreign")
        (step,) = parse_passes("foreign-pass{depth=7}")
        assert (step.name, step.depth) == ("foreign-pass", 7)
        assert "foreign-pass" in known_passes()
        result = compiled(Mlp(), passes="foreign-pass{depth=7}")
        names = [record.name for record in result.report.passes]
        assert names[-3:] == ["foreign-pass", "lower", "verify"]
        assert "foreign at depth 7" in result.report.verification

    def test_an_entry_point_that_cannot_be_loaded_is_named(self, installed):
        installed("broken-pass = foreign_passes:Missing")
        with pytest.raises(ConfigError, match=r"entry point 'broken-pass' .*foreign_passes:Missing"):
            parse_passes("capture")

    def test_an_entry_point_that_is_no_pass_is_refused(self, installed):
        installed("not-a-pass = foreign_passes:dataclass")
        with pytest.raises(ConfigError, match="must be a frozen dataclass"):
            parse_passes("capture")


def test_every_error_of_the_manager_is_a_morphc_error():
    assert issubclass(PassError, MorphcError)
    assert issubclass(UnknownNameError, ConfigError)
    assert set(manager._REGISTRY) >= {step.name for step in default_passes()}
