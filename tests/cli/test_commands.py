"""What the commands print, write and return when all goes well."""

from __future__ import annotations

import ast
import json

import pytest
from cli_helpers import MLP, start_morphc

from morphc.passes.plan import Plan


class TestCompile:
    def test_prints_a_table_on_stdout_and_nothing_else(self, morphc, write):
        ran = morphc("compile", write())
        assert ran.status == 0
        assert ran.out.startswith("MLP ")
        assert "fc1" in ran.out
        assert "equal bit for bit" in ran.out
        assert ran.err == ""

    def test_json_is_json_also_when_the_model_prints(self, morphc, write):
        noisy = MLP.replace("return self.fc2", "print('in forward')\n            return self.fc2")
        ran = morphc("compile", write(noisy + "    print('in file')\n"), "--json")
        assert ran.status == 0
        report = json.loads(ran.out)
        assert [site["path"] for site in report["plan"]["sites"]] == ["fc1", "fc2"]
        assert report["totals"]["sites"] == 2
        assert "in file" in ran.err
        assert "in forward" in ran.err

    def test_output_holds_plan_graphs_and_reports(self, morphc, write, tmp_path):
        out = tmp_path / "out"
        ran = morphc("compile", write(), "-o", out, "--no-verify")
        assert ran.status == 0
        assert "wrote" in ran.err
        assert {entry.name for entry in out.iterdir()} == {
            "plan.json",
            "report.json",
            "report.html",
            "graphs",
        }
        assert json.loads((out / "report.json").read_bytes())["totals"]["sites"] == 2
        assert "<!doctype html>" in (out / "report.html").read_text()
        ast.parse((out / "graphs" / "root.py").read_text())
        assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []

    def test_earlier_output_is_replaced_as_a_whole(self, morphc, write, tmp_path):
        out = tmp_path / "out"
        assert morphc("compile", write(), "-o", out, "--no-verify").status == 0
        (out / "graphs" / "old.py").write_text("# of an earlier model\n")
        assert morphc("compile", write(), "-o", out, "--no-verify", "--seeds", "4").status == 0
        assert not (out / "graphs" / "old.py").exists()
        sites = json.loads((out / "plan.json").read_bytes())["sites"]
        assert [site["seeds"] for site in sites] == [4, 4]

    def test_plan_given_back_is_followed(self, morphc, write, tmp_path):
        options = ("--seeds", "fc1=7", "--exclude", "fc2", "--no-verify")
        assert morphc("compile", write(), *options, "-o", tmp_path / "a").status == 0
        plan = tmp_path / "a" / "plan.json"
        assert morphc("compile", write(), "--plan", plan, "--no-verify", "-o", tmp_path / "b").status == 0
        assert (tmp_path / "b" / "plan.json").read_bytes() == plan.read_bytes()

    def test_path_with_spaces_and_letters_of_other_alphabets(self, morphc, write, tmp_path):
        path = write(name="mein Ordner ü/модель 模型.py")
        out = tmp_path / "Ausgabe größer 出力"
        ran = morphc("compile", f"{path}:model", "-o", out, "--no-verify")
        assert ran.status == 0, ran.err
        assert (out / "plan.json").is_file()

    def test_options_reach_the_config(self, morphc, write, tmp_path):
        options = (
            ("--seeds", "8"),
            ("--slots", "3"),
            ("--rank", "4"),
            ("--blueprint", "affine,lowrank"),
            ("--blueprint", "bottleneck"),
            ("--blend", "lerp"),
            ("--kinds", "linear"),
            ("--include", "fc?"),
            ("--exclude", "fc2"),
            ("--telemetry-every", "0"),
            ("--near-zero", "0.5"),
            ("--gradient-telemetry",),
            ("--seed-lr", "0.1"),
            ("--backend", "torch"),
            ("--max-overhead", "0.5"),
        )
        ran = morphc(
            "compile", write(), "--no-verify", "--json", *[word for option in options for word in option]
        )
        assert ran.status == 0, ran.err
        config = json.loads(ran.out)["plan"]["config"]
        assert config["seeds_per_layer"] == 8
        assert config["blueprint"] == ["affine", "lowrank", "bottleneck"]
        assert config["telemetry_every"] == 0
        assert config["gradient_telemetry"] is True
        given = ("slots", "rank", "blend", "near_zero", "seed_lr", "backend", "max_overhead")
        assert [config[name] for name in given] == [3, 4, "lerp", 0.5, 0.1, "torch", 0.5]
        assert [site["path"] for site in json.loads(ran.out)["plan"]["sites"]] == ["fc1"]

    def test_every_option_of_config_that_compiling_reads_is_on_the_command_line(self):
        from morphc.cli.options import OPTIONS
        from morphc.config import GROWTH, Config

        assert set(GROWTH) < set(Config.__struct_fields__)
        assert set(OPTIONS) == set(Config.__struct_fields__) - {"schema_version", *GROWTH}

    def test_print_after_shows_graphs(self, morphc, write):
        ran = morphc("compile", write(), "--no-verify", "--print-after", "insert-sites")
        assert ran.status == 0
        assert "# after insert-sites" in ran.out
        ran = morphc("compile", write(), "--no-verify", "--print-after", "all", "--json")
        assert json.loads(ran.out)["totals"]["sites"] == 2
        assert "# after capture" in ran.err

    def test_passes_with_options(self, morphc, write):
        passes = "capture,propagate-shapes,find-candidates,plan-chunks{seeds=3},insert-sites,lower"
        ran = morphc("compile", write(), "--passes", passes, "--json")
        assert ran.status == 0, ran.err
        report = json.loads(ran.out)
        assert [record["name"] for record in report["passes"]][-1] == "lower"
        assert [site["seeds"] for site in report["plan"]["sites"]] == [3, 3]


class TestTarget:
    @pytest.mark.parametrize("attr", ["", ":model", ":MLP", ":make", ":holder.inner"])
    def test_module_class_and_factory(self, morphc, write, attr):
        source = MLP + "    def make():\n        return MLP()\n    class holder:\n        inner = model\n"
        ran = morphc("compile", f"{write(source)}{attr}", "--no-verify")
        assert ran.status == 0, ran.err

    def test_class_alone_is_enough(self, morphc, write):
        assert morphc("compile", write(MLP.replace("model = MLP()", "")), "--no-verify").status == 0

    def test_part_of_the_model_and_its_loss_are_no_candidates(self, morphc, write):
        source = MLP + "    loss = nn.CrossEntropyLoss()\n    head = model.fc2\n    again = model\n"
        assert morphc("compile", write(source), "--no-verify").status == 0

    def test_file_may_import_its_neighbours_and_is_not_main(self, morphc, write):
        write("WIDTH = 16\n", "neighbour.py")
        source = MLP.replace("nn.Linear(16,", "nn.Linear(WIDTH,") + "    assert __name__ != '__main__'\n"
        ran = morphc("compile", write("from neighbour import WIDTH\n" + _dedented(source)), "--no-verify")
        assert ran.status == 0, ran.err

    def test_examples_may_be_functions_and_keywords(self, morphc, write):
        source = MLP.replace("example_inputs = ", "example_inputs = lambda: ").replace(
            "(3, 16),)", "(3, 16),)"
        )
        assert morphc("compile", write(source), "--no-verify").status == 0
        source = MLP.replace(
            "example_inputs = (torch.randn(3, 16),)", "example_kwargs = {'x': torch.randn(3, 16)}"
        )
        assert morphc("compile", write(source), "--no-verify").status == 0


class TestInput:
    def test_overrides_the_files_own(self, morphc, write):
        source = MLP.replace("torch.randn(3, 16)", "torch.randn(3, 99)")
        assert morphc("compile", write(source), "--input", "5x16", "--no-verify").status == 0

    def test_ids_stay_below_the_smallest_table_and_keywords_reach_forward(self, morphc, write):
        source = """
            import torch
            from torch import nn

            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.words, self.kinds = nn.Embedding(1000, 8), nn.Embedding(2, 8)
                    self.head = nn.Linear(8, 4)

                def forward(self, ids, mask=None, *, scale):
                    assert mask is not None and mask.dtype is torch.bool
                    return self.head(self.words(ids) + self.kinds(ids)) * scale

            model = Net()
        """
        inputs = ("--input", "2x16:i64", "--input", "mask=2x16:bool", "--input", "scale=scalar:f32")
        ran = morphc("compile", write(source), *inputs)
        assert ran.status == 0, ran.err

    def test_are_the_same_on_every_run_and_leave_the_global_generator_alone(self):
        import torch

        from morphc.cli.inputs import make_inputs, parse_input

        specs = [parse_input("4x3"), parse_input("k=7:i64<5"), parse_input("2:bf16")]
        before = torch.get_rng_state()
        first, second = (
            make_inputs(specs, torch.nn.Linear(1, 1, device="meta").to_empty(device="cpu")) for _ in "ab"
        )
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(first[0][0], second[0][0])
        assert first[1]["k"].max() < 5
        assert first[0][1].dtype is torch.bfloat16


class TestInspect:
    def test_prints_what_would_be_chosen(self, morphc, write):
        ran = morphc("inspect", write())
        assert ran.status == 0
        assert "fc1" in ran.out

    def test_works_on_meta_and_as_json(self, morphc, write):
        source = MLP.replace("model = MLP()", "with torch.device('meta'):\n        model = MLP()")
        ran = morphc(
            "inspect", write(source.replace("example_inputs", "unused")), "--input", "4x16", "--json"
        )
        assert ran.status == 0, ran.err
        assert json.loads(ran.out)["totals"]["sites"] == 2

    def test_writes_the_page(self, morphc, write, tmp_path):
        assert morphc("inspect", write(), "-o", tmp_path / "out").status == 0
        assert (tmp_path / "out" / "report.html").is_file()


class TestBisect:
    def test_finds_nothing_in_a_model_that_is_right(self, morphc, write):
        ran = morphc("bisect", write(), "--json")
        assert ran.status == 0, ran.err
        found = json.loads(ran.out)
        assert found["culprit"] is None
        assert found["lines"]

    def test_names_the_pass_that_broke_it(self, morphc, write):
        source = (
            MLP
            + """
    import dataclasses
    from typing import ClassVar
    from morphc.passes.manager import register_pass

    @register_pass
    @dataclasses.dataclass(frozen=True)
    class Sabotage:
        name: ClassVar[str] = "sabotage"
        def apply(self, program):
            raise RuntimeError("a pass that fails")
"""
        )
        passes = "capture,propagate-shapes,find-candidates,plan-chunks,insert-sites,sabotage,lower,verify"
        ran = morphc("bisect", write(source), "--passes", passes)
        assert ran.status == 1, ran.err
        assert "sabotage" in ran.out


class TestDoctor:
    def test_tells_versions_devices_backend_and_cache(self, morphc, monkeypatch, tmp_path):
        monkeypatch.setenv("MORPHC_CACHE_DIR", str(tmp_path / "cache"))
        ran = morphc("doctor")
        assert ran.status == 0
        for word in ("torch", "triton", "python", "device", "backend", "missing", str(tmp_path / "cache")):
            assert word in ran.out
        assert not (tmp_path / "cache").exists()

    def test_json_and_an_unwritable_cache(self, morphc, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MORPHC_CACHE_DIR", str(tmp_path / "file" / "cache"))
        ran = morphc("doctor", "--json")
        assert ran.status == 0
        found = json.loads(ran.out)
        assert found["cache_writable"] is False
        assert any("MORPHC_CACHE_DIR" in text for text in found["missing"])


class TestHelp:
    @pytest.mark.parametrize("command", ["", "compile", "inspect", "bisect", "doctor"])
    def test_needs_no_torch(self, command):
        env = {"PYTHONPROFILEIMPORTTIME": "1"}
        process = start_morphc(*filter(None, [command]), "--help", env=env)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "--help" in out
        loaded = {line.rpartition("|")[2].strip() for line in err.splitlines()}
        assert "morphc.cli.app" in loaded
        assert not loaded & {"torch", "sympy", "networkx", "triton", "numpy", "jinja2"}

    def test_says_that_the_file_is_executed(self, morphc):
        ran = morphc("compile", "--help")
        assert ran.status == 0
        assert "executed" in ran.out

    def test_version(self, morphc):
        import morphc as package

        assert morphc("--version").out == f"morphc {package.__version__}\n"


def test_plan_json_reads_back(morphc, write, tmp_path):
    import msgspec

    assert morphc("compile", write(), "-o", tmp_path / "out", "--no-verify").status == 0
    data = (tmp_path / "out" / "plan.json").read_bytes()
    assert msgspec.json.decode(data, type=Plan).to_json() == data


def _dedented(text: str) -> str:
    import textwrap

    return textwrap.dedent(text)
