"""What goes wrong on the command line ends in one clear message, the right status, and no partial output."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
from cli_helpers import MLP, start_morphc


def _one_message(ran, *words):
    """One message on stderr, without a traceback and with nothing on stdout."""
    assert ran.out == ""
    assert ran.err.startswith("morphc: ")
    assert len(re.findall(r"^morphc: ", ran.err, re.MULTILINE)) == 1
    assert "Traceback" not in ran.err
    for word in words:
        assert word in ran.err


def _only(folder: Path, *names: str) -> None:
    """`folder` holds these entries and nothing else: no output, no leftover of one."""
    left = {entry.name for entry in folder.iterdir()} - {"__pycache__"}
    assert left == set(names)


class TestFile:
    def test_no_such_file(self, morphc, tmp_path):
        ran = morphc("compile", tmp_path / "nowhere.py", "-o", tmp_path / "out")
        assert ran.status == 2
        _one_message(ran, "no such file", "nowhere.py")
        _only(tmp_path)

    def test_no_such_file_but_one_of_nearly_that_name(self, morphc, write, tmp_path):
        write(name="model.py")
        ran = morphc("compile", tmp_path / "modle.py")
        assert ran.status == 2
        _one_message(ran, "Did you mean", "model.py")

    @pytest.mark.parametrize(("target", "lacks"), [("", "file"), (":model", "file"), ("model.py:", "name")])
    def test_half_a_target(self, morphc, write, monkeypatch, target, lacks):
        monkeypatch.chdir(write().parent)
        ran = morphc("compile", target)
        assert ran.status == 2
        _one_message(ran, f"{target!r} lacks the {lacks}")

    def test_a_folder_is_no_file(self, morphc, tmp_path):
        ran = morphc("compile", tmp_path)
        assert ran.status == 2
        _one_message(ran, "is no file")

    def test_a_file_that_is_no_python(self, morphc, tmp_path):
        path = tmp_path / "weights.bin"
        path.write_bytes(b"\0\1")
        ran = morphc("compile", path)
        assert ran.status == 2
        _one_message(ran, "no Python file")

    def test_file_that_raises_shows_the_users_line(self, morphc, write, tmp_path):
        path = write("x = 1\ny = {}['missing']\n")
        ran = morphc("compile", path, "-o", tmp_path / "out")
        assert ran.status == 1
        _one_message(ran, "KeyError: 'missing'", f"{path}:2", "y = {}['missing']")
        _only(tmp_path, "model.py")

    def test_file_with_a_syntax_error_shows_the_line(self, morphc, write):
        path = write("x = 1\ndef broken(:\n    pass\n")
        ran = morphc("compile", path)
        assert ran.status == 1
        _one_message(ran, "SyntaxError", "model.py:2")

    def test_file_that_exits(self, morphc, write):
        ran = morphc("compile", write("import sys\nsys.exit(3)\n"))
        assert ran.status == 1
        _one_message(ran, "sys.exit(3)", "model.py:2")

    def test_error_inside_a_function_of_the_file_names_its_line(self, morphc, write):
        ran = morphc(
            "compile", write("def build():\n    raise OSError('no weights here')\n\nmodel = build()\n")
        )
        assert ran.status == 1
        _one_message(ran, "OSError: no weights here", "model.py:2")

    def test_factory_that_raises(self, morphc, write):
        ran = morphc("compile", f"{write('def make_model():' + chr(10) + '    return 1 / 0')}:make_model")
        assert ran.status == 1
        _one_message(ran, "make_model() was called", "ZeroDivisionError", "model.py:2")


class TestAttribute:
    def test_no_module_in_the_file(self, morphc, write):
        ran = morphc("compile", write("x = 1\n"))
        assert ran.status == 2
        _one_message(ran, "holds no torch.nn.Module")

    def test_several_modules_are_listed(self, morphc, write):
        path = write("from torch import nn\nstudent = nn.Linear(2, 2)\nteacher = nn.Linear(2, 2)\n")
        ran = morphc("compile", path)
        assert ran.status == 2
        _one_message(ran, "2 modules", f"{path}:student", f"{path}:teacher")

    def test_attr_that_is_no_module(self, morphc, write):
        ran = morphc("compile", f"{write('model = 7')}:model")
        assert ran.status == 2
        _one_message(ran, ":model is an int")

    def test_attr_that_is_another_class(self, morphc, write):
        ran = morphc("compile", f"{write('class Data: pass')}:Data")
        assert ran.status == 2
        _one_message(ran, "the class Data")

    def test_attr_that_is_not_there_gets_a_suggestion(self, morphc, write):
        ran = morphc("compile", f"{write()}:modle")
        assert ran.status == 2
        _one_message(ran, "has no 'modle'", "Did you mean 'model'?")

    def test_class_that_needs_arguments(self, morphc, write):
        source = """
            from torch import nn
            class Net(nn.Module):
                def __init__(self, width):
                    super().__init__()
        """
        ran = morphc("compile", f"{write(source)}:Net")
        assert ran.status == 2
        _one_message(ran, "Net needs width")

    def test_factory_that_returns_something_else(self, morphc, write):
        ran = morphc("compile", f"{write('def build(): return [1]')}:build")
        assert ran.status == 2
        _one_message(ran, "build() returned a list")


class TestInputs:
    def test_missing(self, morphc, write, tmp_path):
        path = write(MLP.replace("example_inputs", "unused"))
        ran = morphc("compile", path, "-o", tmp_path / "out")
        assert ran.status == 2
        _one_message(ran, "no example inputs", "needs x", "--input")
        _only(tmp_path, "model.py")

    @pytest.mark.parametrize(
        "text", ["3 by 16", "3x", "x16:f32", "3x16:", "3x16<5:i64", "1a=3x16", "-3x16", ""]
    )
    def test_that_are_no_shape(self, morphc, write, text):
        ran = morphc("compile", write(), f"--input={text}")
        assert ran.status == 2
        _one_message(ran, "is no shape", "32x784:f32")

    def test_of_an_unknown_dtype(self, morphc, write):
        ran = morphc("compile", write(), "--input", "3x16:f23")
        assert ran.status == 2
        _one_message(ran, "unknown dtype 'f23'", "Did you mean 'f32'?")

    def test_with_a_bound_that_makes_no_sense(self, morphc, write):
        assert morphc("compile", write(), "--input", "3x16:f32<4").status == 2
        assert morphc("compile", write(), "--input", "3x16:i64<0").status == 2
        assert morphc("compile", write(), "--input", "3x16:u8<300").status == 2

    def test_of_the_wrong_shape(self, morphc, write, tmp_path):
        ran = morphc("compile", write(), "--input", "3x17:f32", "-o", tmp_path / "out")
        assert ran.status == 2
        _one_message(ran, "--input 3x17:f32", "model.py:12")
        _only(tmp_path, "model.py")

    def test_on_another_device(self, morphc, write, tmp_path):
        source = MLP + "    example_inputs = (torch.randn(3, 16, device='meta'),)\n"
        ran = morphc("compile", write(source), "-o", tmp_path / "out")
        assert ran.status == 2
        _one_message(ran, "meta", "cpu")
        _only(tmp_path, "model.py")

    def test_keyword_arguments_given_as_inputs(self, morphc, write):
        ran = morphc("compile", write(MLP + "    example_inputs = {'x': torch.randn(3, 16)}\n"))
        assert ran.status == 2
        _one_message(ran, "example_inputs is a dict", "example_kwargs")

    def test_kwargs_that_are_no_dict(self, morphc, write):
        ran = morphc("compile", write(MLP + "    example_kwargs = [1]\n"))
        assert ran.status == 2
        _one_message(ran, "example_kwargs is a list")

    def test_host_forward_that_fails(self, morphc, write, tmp_path):
        source = MLP.replace(
            "return self.fc2", "raise RuntimeError('not today')\n            return self.fc2"
        )
        ran = morphc("compile", write(source), "-o", tmp_path / "out")
        assert ran.status == 1
        _one_message(ran, "not today", "model.py:12")
        _only(tmp_path, "model.py")


class TestOptions:
    @pytest.mark.parametrize("seeds", ["0", "-3"])
    def test_seeds_below_one(self, morphc, write, tmp_path, seeds):
        ran = morphc("compile", write(), f"--seeds={seeds}", "-o", tmp_path / "out")
        assert ran.status == 2
        _one_message(ran, f"seeds_per_layer={seeds}", "at least 1")
        _only(tmp_path, "model.py")

    def test_seeds_that_are_no_number(self, morphc, write):
        ran = morphc("compile", write(), "--seeds", "many")
        assert ran.status == 2
        _one_message(ran, "'many'", "auto")

    def test_more_seeds_than_any_site_has_features(self, morphc, write, tmp_path):
        ran = morphc("compile", write(), "--seeds", "33", "-o", tmp_path / "out")
        assert ran.status == 2
        _one_message(ran, "seeds_per_layer=33", "32")
        _only(tmp_path, "model.py")

    @pytest.mark.parametrize(
        ("option", "value", "suggestion"),
        [
            ("--blueprint", "botleneck", "bottleneck"),
            ("--blend", "residul", "residual"),
            ("--kinds", "linaer", "linear"),
            ("--backend", "trition", "triton"),
            ("--passes", "capturo", "capture"),
            ("--print-after", "plan-chunk", "plan-chunks"),
        ],
    )
    def test_unknown_name_gets_a_suggestion(self, morphc, write, tmp_path, option, value, suggestion):
        ran = morphc("compile", write(), option, value, "-o", tmp_path / "out")
        assert ran.status == 2
        _one_message(ran, value, f"Did you mean {suggestion!r}?")
        _only(tmp_path, "model.py")

    def test_unknown_option_gets_a_suggestion(self, morphc, write):
        ran = morphc("compile", write(), "--telemetri-every", "3")
        assert ran.status == 2
        _one_message(ran, "--telemetri-every", "--telemetry-every")

    def test_unknown_option_of_a_pass(self, morphc, write):
        passes = "capture,propagate-shapes,find-candidates,plan-chunks{sedes=4},insert-sites,lower"
        ran = morphc("compile", write(), "--passes", passes)
        assert ran.status == 2
        _one_message(ran, "sedes", "seeds")

    @pytest.mark.parametrize(
        ("command", "passes"),
        [
            ("compile", "lower,capture"),
            ("compile", "capture,find-candidates,lower,verify"),
            ("bisect", "find-candidates,capture,lower"),
        ],
    )
    def test_passes_in_a_wrong_order(self, morphc, write, tmp_path, own_dumps, command, passes):
        output = ("-o", tmp_path / "out") if command == "compile" else ()
        ran = morphc(command, write(), "--passes", passes, *output)
        assert ran.status == 2
        _one_message(ran, "pass '")
        _only(tmp_path, "model.py")
        assert not own_dumps.exists()

    def test_pass_of_the_file_that_raises_shows_its_line(self, morphc, write, tmp_path, own_dumps):
        source = (
            MLP
            + """
    from dataclasses import dataclass
    from typing import ClassVar
    from morphc.passes.manager import register_pass

    @register_pass
    @dataclass(frozen=True)
    class Raises:
        name: ClassVar[str] = "raises-in-the-file"

        def apply(self, program):
            {}["missing"]
"""
        )
        path = write(source)
        line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "missing" in text)
        ran = morphc("compile", path, "--passes", "raises-in-the-file", "-o", tmp_path / "out")
        assert ran.status == 1
        _one_message(ran, "pass 'raises-in-the-file' failed: KeyError", f'{path}:{line}: {{}}["missing"]')
        _only(tmp_path, "model.py")
        (kept,) = own_dumps.iterdir()
        assert f"(dump: {kept})" in ran.err

    def test_unknown_command_gets_a_suggestion(self, morphc):
        ran = morphc("compil", "model.py")
        assert ran.status == 2
        _one_message(ran, "compil", "Did you mean 'compile'?")

    def test_value_of_the_wrong_type(self, morphc, write):
        ran = morphc("compile", write(), "--rank", "wide")
        assert ran.status == 2
        _one_message(ran, "--rank", "integer")

    def test_include_that_matches_nothing(self, morphc, write, tmp_path):
        ran = morphc("compile", write(), "--include", "decoder.*", "-o", tmp_path / "out")
        assert ran.status == 2
        _one_message(ran, "decoder.*")
        _only(tmp_path, "model.py")

    @pytest.mark.parametrize("command", ["compile", "inspect"])
    @pytest.mark.parametrize("json", [(), ("--json",)], ids=["table", "json"])
    def test_exclude_that_matches_nothing_is_said_and_no_error(self, morphc, write, tmp_path, command, json):
        ran = morphc(command, write(), "--exclude", "decoder.*", "-o", tmp_path / "out", *json)
        assert ran.status == 0
        assert (
            "morphc: warning: exclude pattern 'decoder.*' matches none of the 2 candidate layers" in ran.err
        )
        assert "exclude pattern 'decoder.*'" in ran.out
        assert "exclude pattern" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        bisected = morphc("bisect", write(), "--exclude", "decoder.*")
        assert bisected.status == 0
        assert bisected.err.startswith("morphc: warning: exclude pattern 'decoder.*'")

    def test_options_are_checked_before_the_file_is_run(self, morphc, write, tmp_path):
        path = write("raise SystemExit('was run')\n")
        assert morphc("compile", path, "--rank", "0").status == 2
        assert morphc("compile", path, "--input", "nonsense").status == 2


class TestOutput:
    def test_a_file_in_place_of_the_folder(self, morphc, write, tmp_path):
        (tmp_path / "out").write_text("mine")
        ran = morphc("compile", write("raise SystemExit('was run')\n"), "-o", tmp_path / "out")
        assert ran.status == 2
        _one_message(ran, "is a file")
        assert (tmp_path / "out").read_text() == "mine"

    def test_a_path_below_a_file(self, morphc, write, tmp_path):
        (tmp_path / "plain").write_text("mine")
        ran = morphc("compile", write("raise SystemExit('was run')\n"), "-o", tmp_path / "plain" / "out")
        assert ran.status == 2
        _one_message(ran, "can't be written")
        _only(tmp_path, "model.py", "plain")

    def test_a_folder_of_somebody_else(self, morphc, write, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("mine")
        ran = morphc("compile", write(), "-o", tmp_path / "out")
        assert ran.status == 2
        _one_message(ran, "no plan.json")
        _only(tmp_path / "out", "thesis.tex")

    def test_an_earlier_output_to_which_something_was_added(self, morphc, write, tmp_path):
        path = write()
        assert morphc("compile", path, "-o", tmp_path / "out", "--no-verify").status == 0
        (tmp_path / "out" / "checkpoint.pt").write_text("mine")
        ran = morphc("compile", path, "-o", tmp_path / "out")
        assert ran.status == 2
        _one_message(ran, "'checkpoint.pt'")
        assert (tmp_path / "out" / "checkpoint.pt").read_text() == "mine"

    def test_the_current_folder(self, morphc, write, tmp_path, monkeypatch):
        path = write()
        monkeypatch.chdir(tmp_path)
        ran = morphc("compile", path, "-o", ".")
        assert ran.status == 2
        _one_message(ran, "the folder you are in")

    def test_failure_leaves_an_earlier_output_as_it_was(self, morphc, write, tmp_path):
        assert morphc("compile", write(), "-o", tmp_path / "out", "--no-verify").status == 0
        before = (tmp_path / "out" / "plan.json").read_bytes()
        broken = write("raise ValueError('later')\n", "broken.py")
        assert morphc("compile", broken, "-o", tmp_path / "out").status == 1
        assert (tmp_path / "out" / "plan.json").read_bytes() == before
        _only(tmp_path, "model.py", "broken.py", "out")

    def test_failure_removes_the_parents_that_were_made_for_it(self, morphc, write, tmp_path):
        path = write("raise ValueError('no')\n")
        assert morphc("compile", path, "-o", tmp_path / "deep" / "er" / "out").status == 1
        _only(tmp_path, "model.py")


class TestPlan:
    @pytest.fixture
    def plan(self, morphc, write, tmp_path):
        assert morphc("compile", write(), "-o", tmp_path / "out", "--no-verify").status == 0
        return tmp_path / "out" / "plan.json"

    def test_that_is_not_there(self, morphc, write, tmp_path):
        ran = morphc("compile", write(), "--plan", tmp_path / "plan.json")
        assert ran.status == 2
        _one_message(ran, "can't be read", "plan.json")

    @pytest.mark.parametrize(
        "text", ["", "[]", '{"schema_version": 1, "sites": 3}', '{"sites": []}', "\\x00"]
    )
    def test_that_is_no_plan(self, morphc, write, tmp_path, text):
        path = tmp_path / "plan.json"
        for text in (
            "",
            "[]",
            '{"schema_version": 1, "sites": 3}',
            '{"sites": []}',
            '{"schema_version": 1, "x": 2}',
        ):
            path.write_text(text)
            ran = morphc("compile", write(), "--plan", path)
            assert ran.status == 2
            _one_message(ran, "is no plan of morphc")

    def test_of_another_model_says_what_differs(self, morphc, write, plan, tmp_path):
        other = write(MLP.replace("32", "48"), "other.py")
        ran = morphc("compile", other, "--plan", plan, "-o", tmp_path / "new")
        assert ran.status == 2
        _one_message(ran, "fc1", "32", "48")
        assert not (tmp_path / "new").exists()

    def test_of_another_class_says_so(self, morphc, write, plan):
        ran = morphc("compile", write(MLP.replace("MLP", "Other"), "other.py"), "--plan", plan)
        assert ran.status == 2
        _one_message(ran, "model_class", "MLP", "Other")

    def test_of_another_schema_says_which_and_who_made_it(self, morphc, write, plan):
        data = json.loads(plan.read_bytes()) | {"schema_version": 99, "morphc_version": "98.0.0", "new": 1}
        other = plan.parent.parent / "other.json"
        other.write_text(json.dumps(data))
        ran = morphc("compile", write(), "--plan", other)
        assert ran.status == 2
        _one_message(ran, "schema_version is 99", "98.0.0", str(other))

    def test_of_another_version_with_the_same_schema_is_followed(self, morphc, write, plan):
        data = json.loads(plan.read_bytes()) | {"morphc_version": "98.0.0"}
        other = plan.parent.parent / "other.json"
        other.write_text(json.dumps(data))
        ran = morphc("compile", write(), "--plan", other)
        assert ran.status == 0
        assert "the plan was made by morphc 98.0.0" in ran.out

    def test_with_an_option_that_contradicts_it(self, morphc, write, plan):
        ran = morphc("compile", write(), "--plan", plan, "--rank", "5")
        assert ran.status == 2
        _one_message(ran, "rank", "5", "16")


class TestInterrupt:
    def test_ctrl_c_leaves_nothing_behind(self, write, tmp_path):
        path = write("import time\nprint('running', flush=True)\ntime.sleep(60)\n")
        status, out, err = self._interrupted(path, tmp_path, signal.SIGINT)
        assert status == 130
        assert out == ""
        assert re.fullmatch(r"running\n\s*morphc: interrupted\n", err)
        _only(tmp_path, "model.py")

    def test_ctrl_c_during_the_forward_leaves_nothing_behind(self, write, tmp_path):
        wait = "import time; print('running', flush=True); time.sleep(60)\n            return self.fc2"
        status, out, err = self._interrupted(
            write(MLP.replace("return self.fc2", wait)), tmp_path, signal.SIGINT
        )
        assert status == 130
        assert out == ""
        assert "Traceback" not in err
        _only(tmp_path, "model.py")

    def test_being_terminated_leaves_nothing_behind(self, write, tmp_path):
        path = write("import time\nprint('running', flush=True)\ntime.sleep(60)\n")
        status, _, err = self._interrupted(path, tmp_path, signal.SIGTERM)
        assert status == 128 + signal.SIGTERM
        assert "Traceback" not in err
        _only(tmp_path, "model.py")

    def _interrupted(self, path: Path, folder: Path, how: signal.Signals) -> tuple[int, str, str]:
        process = start_morphc("compile", path, "-o", folder / "out")
        try:
            assert process.stderr is not None
            first = process.stderr.readline()
            assert first == "running\n", first + process.stderr.read()
            time.sleep(0.1)
            process.send_signal(how)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        return process.returncode, out, first + err
