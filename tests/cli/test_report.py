"""The report as table, JSON and page, from plans written by hand."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from morphc.errors import ConfigError
from morphc.output import OutputFolder, graph_files
from morphc.passes.plan import Miss, Plan, RegionNote, Site
from morphc.reporting import ModuleRow, Report, cost_of, numberless, percent, shorten, us_text
from morphc.webpage import page_data, render


@dataclass(frozen=True)
class Record:
    name: str
    seconds: float = 0.01
    modified: bool = True
    created: int = 3
    erased: int = 1
    diff: str = ""


def _site(path: str, **changes) -> Site:
    fields = {
        "path": path,
        "layer_kind": "linear",
        "features": 32,
        "feature_axis": -1,
        "dtype": "float32",
        "source": f"{Path.cwd()}/net.py:7",
        "captured_as": "rewritten",
        "why_not_better": "",
        "seeds": 8,
        "slots": 4,
        "layer_class": "Linear",
        "predicted": {"us": 2.0, "layer_us": 100.0},
    }
    return Site(**(fields | changes))


def _report(blocks: int = 3) -> Report:
    tree = [ModuleRow("", "Net", 0), ModuleRow("h", "ModuleList", 0)]
    for i in range(blocks):
        tree += [ModuleRow(f"h.{i}", "Block", 0), ModuleRow(f"h.{i}.fc", "Linear", 1056)]
        tree += [ModuleRow(f"h.{i}.norm", "LayerNorm", 64), ModuleRow(f"h.{i}.act", "ReLU", 0)]
    misses = [
        Miss(f"h.{i}.norm", "LayerNorm", "kind 'norm' is not in kinds", "net.py:8") for i in range(blocks)
    ]
    misses += [Miss(f"h.{i}.act", "ReLU", "it has no weights", "net.py:9") for i in range(blocks)]
    plan = Plan(
        sites=tuple(_site(f"h.{i}.fc") for i in range(blocks)),
        misses=tuple(misses),
        regions=(RegionNote("", "Net", "matched", "looks at a shape", "net.py:5"),),
        model_class="Net",
        morphc_version="0.1.0",
    )
    return Report(
        plan, (Record("capture", diff="+a\n-b"),), ("equal",), 0.5, {"": "def forward(): ..."}, tuple(tree)
    )


class TestTable:
    def test_equal_layers_of_numbered_blocks_share_a_row(self):
        text = str(_report())
        row = next(line for line in text.splitlines() if line.startswith("h.*.fc"))
        assert row.split() == [
            "h.*.fc",
            "×3",
            "Linear",
            "32",
            "8",
            "4",
            "rewritten",
            "2.00",
            "us",
            "2.0%",
            "net.py:7",
        ]

    def test_layers_that_differ_do_not(self):
        report = Report(Plan(sites=(_site("h.0.fc"), _site("h.1.fc", seeds=4))))
        assert "h.0.fc" in str(report)
        assert "h.1.fc" in str(report)

    def test_says_why_not_for_layers_with_weights_and_counts_the_rest(self):
        text = str(_report())
        assert re.search(r"h\.\*\.norm +×3 +LayerNorm +kind 'norm' is not in kinds", text)
        assert "3 modules without weights" in text
        assert "h.*.act" not in text

    def test_costs_are_of_a_training_step(self):
        assert "predicted cost 6.00 us a training step, 2.0% of the watched layers" in str(_report())
        assert "predicted, a training step" in render(_report())

    def test_is_complete_without_sites_and_costs(self):
        assert "no layer got a site" in str(Report(Plan()))
        assert "?" in str(Report(Plan(sites=(_site("fc", predicted={}),))))

    def test_measured_times_get_a_column(self):
        report = Report(Plan(sites=(_site("fc"),)), measured={"fc": 3.5})
        assert "measured" in str(report)
        assert "3.50 us" in str(report)

    def test_narrow_terminal_gets_fewer_columns_instead_of_torn_ones(self):
        from rich.console import Console

        from morphc.reporttable import print_report

        console = Console(file=io.StringIO(), width=60, color_system=None)
        print_report(_report(), console)
        text = console.file.getvalue()
        assert re.search(r"h\.\*\.fc +×3 .* 2\.00 us +2\.0%", text)
        assert "net.py:7" not in text

    def test_root_has_a_name(self):
        assert "(root)" in str(Report(Plan(sites=(_site(""),))))


class TestJson:
    def test_totals_are_sums_over_sites(self):
        totals = json.loads(_report().to_json())["totals"]
        assert (totals["sites"], totals["seeds"], totals["slots"]) == (3, 24, 12)
        assert totals["us"] == 6.0
        assert totals["share"] == pytest.approx(0.02)
        assert totals["parameters"] == 3 * (1056 + 64)
        assert totals["levels"] == {"rewritten": 0, "matched": 1, "as_written": 0}

    def test_called_twice_costs_twice(self):
        assert Report(Plan(sites=(_site("fc", calls=2),))).totals.us == 4.0


class TestPage:
    def test_needs_no_network(self):
        page = render(_report())
        assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)
        assert "@import" not in page
        assert "url(" not in page

    def test_holds_every_module_with_its_site_or_reason(self):
        data = _data(render(_report()))
        nodes = {node["path"]: node for node in data["nodes"]}
        assert list(nodes)[:4] == ["", "h", "h.0", "h.0.fc"]
        assert nodes["h.0.fc"]["site"]["us"] == 2.0
        assert nodes["h.0.norm"]["miss"]["reason"] == "kind 'norm' is not in kinds"
        assert nodes[""]["region"]["level"] == "matched"
        assert data["texts"][nodes[""]["graph"]] == "def forward(): ..."
        parents = [data["nodes"][node["up"]]["path"] for node in data["nodes"][1:]]
        assert parents[:3] == ["", "h", "h.0"]

    def test_text_of_the_model_can_not_become_markup(self):
        nasty = "</script><script>alert(1)</script><!--"
        plan = Plan(sites=(_site(nasty, why_not_better=nasty),), model_class=nasty)
        page = render(Report(plan, verification=(nasty,), graphs={nasty: nasty}))
        assert "<script>alert" not in page
        assert _data(page)["nodes"][1]["path"] == nasty

    def test_functional_sites_hang_below_their_owner(self):
        plan = Plan(sites=(_site("attn.in_proj_weight", parameter="in_proj_weight"),))
        report = Report(plan, tree=(ModuleRow("", "Net", 0), ModuleRow("attn", "Attention", 12)))
        nodes = page_data(report)["nodes"]
        assert [node["path"] for node in nodes] == ["", "attn", "attn.in_proj_weight"]
        assert nodes[2]["up"] == 1

    def test_equal_graphs_are_kept_once_and_long_ones_are_cut(self):
        graphs = {"": "x" * 100_000, **{f"h.{i}": "same" for i in range(3)}}
        data = page_data(Report(_report().plan, graphs=graphs, tree=_report().tree))
        assert len(data["texts"]) == 2
        assert "60,000 more characters" in data["texts"][0]

    def test_two_thousand_modules_stay_below_two_megabytes(self):
        assert len(render(_report(blocks=500))) < 2_000_000


class TestGraphFiles:
    def test_root_and_dots(self):
        assert graph_files(["", "h.0.mlp"]) == {"": "root.py", "h.0.mlp": "h.0.mlp.py"}

    def test_no_two_paths_share_a_file(self):
        paths = ["", "root", "a/b", "a_b", "A_b", "..", "a b", "ä", "x" * 300, "x" * 300 + "y", "_"]
        files = graph_files(paths)
        assert len({name.lower() for name in files.values()}) == len(paths)
        for name in files.values():
            assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,130}\.py", name)


class TestOutputFolder:
    def test_is_there_only_at_the_end(self, tmp_path):
        out = tmp_path / "a" / "out"
        with OutputFolder(out) as folder:
            folder.write("plan.json", "{}")
            assert not out.exists()
        assert (out / "plan.json").read_text() == "{}"

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_exception_leaves_nothing(self, tmp_path, error):
        with pytest.raises(error), OutputFolder(tmp_path / "a" / "out") as folder:  # noqa: PT012
            folder.write("plan.json", "{}")
            raise error
        assert list(tmp_path.iterdir()) == []

    def test_interrupt_between_the_renames_brings_the_old_one_back(self, tmp_path, monkeypatch):
        out = tmp_path / "out"
        with OutputFolder(out) as folder:
            folder.write("plan.json", "old")
        rename = Path.rename

        def interrupted(self, target):
            if self.suffix == ".partial":
                raise KeyboardInterrupt
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt), OutputFolder(out) as folder:
            folder.write("plan.json", "new")
        assert (out / "plan.json").read_text() == "old"
        assert list(tmp_path.iterdir()) == [out]

    def test_place_taken_meanwhile_is_not_overwritten(self, tmp_path):
        out = tmp_path / "out"
        with pytest.raises(ConfigError, match=r"no plan\.json"), OutputFolder(out) as folder:  # noqa: PT012
            folder.write("plan.json", "{}")
            out.mkdir()
            (out / "thesis.tex").write_text("mine")
        assert [entry.name for entry in out.iterdir()] == ["thesis.tex"]
        assert list(tmp_path.iterdir()) == [out]

    def test_link_is_followed_and_stays(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "out").symlink_to(tmp_path / "real")
        with OutputFolder(tmp_path / "out") as folder:
            folder.write("plan.json", "{}")
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "real" / "plan.json").exists()


class TestWords:
    def test_numbers(self):
        assert [us_text(x) for x in (0.5, 42, 1234, 5e6)] == ["0.50 us", "42.0 us", "1.23 ms", "5.00 s"]
        assert [percent(x) for x in (0.25, 0.021, 0.0002, 0, float("nan"))] == [
            "25%",
            "2.1%",
            "<0.1%",
            "0.0%",
            "?",
        ]

    def test_paths(self):
        assert numberless("h.11.mlp.fc1") == "h.*.mlp.fc1"
        assert shorten("at /v/lib/python3.11/site-packages/timm/vit.py:3 here") == "at timm/vit.py:3 here"
        assert shorten(f"{Path.cwd()}/net.py:3") == "net.py:3"

    def test_cost_without_a_host_cost_has_no_share(self):
        cost = cost_of(_site("fc", predicted={"us": 1.0}))
        assert cost is not None
        assert cost.share != cost.share


def _data(page: str) -> dict:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def test_costs_are_expressions_in_the_rows():
    import sympy
    import torch
    from torch import nn

    import morphc

    host = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    model = morphc.compile(host, (torch.randn(8, 64),), config=morphc.Config(seeds_per_layer=8))
    report = morphc.report(model)
    rows = sympy.Symbol("rows")
    texts = report.expressions("0")
    assert set(texts) == {
        f"{what}_{unit}" for what in ("dormant", "step", "host") for unit in ("bytes", "flops")
    }
    # A Linear reads its input, weight and bias, and writes its output; a multiply-add counts as two.
    host_bytes = sympy.sympify(texts["host_bytes"], locals={"rows": rows})
    assert host_bytes.subs(rows, 10) == 4 * (10 * 64 + 10 * 128 + 64 * 128 + 128)
    assert sympy.sympify(texts["host_flops"], locals={"rows": rows}).subs(rows, 10) >= 10 * 2 * 64 * 128
    assert json.loads(report.to_json())["expressions"]["2"] == report.expressions("2")
    with pytest.raises(KeyError, match="no site at 'nowhere'"):
        report.expressions("nowhere")
