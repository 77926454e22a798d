"""A representative part of the zoo. All of it: `python benchmarks/zoo.py`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from zoo_models import ENTRIES, checks
from zoo_models.candidates import executed

HOSTS = [
    # one of each family of transformers
    "gpt2", "llama", "bert", "deberta_v2", "t5", "vit", "swin", "wav2vec2", "clip", "mamba", "mixtral",
    # torch.nn
    "lstm_classifier", "transformer_encoder", "attention_kdim_vdim",
    # own models
    "resnet_own", "resnet_channels_last", "branch_on_value", "branch_on_shape", "checkpoint_non_reentrant",
    "called_twice", "tied_weights", "ema_buffer", "parametrized", "hooks_keep_inplace", "functional_linear",
    "matmul_forms", "activation_table", "output_dataclass", "bound_methods", "sequential_root", "linear_root",
    "peft_lora_gpt2", "quantized_dynamic", "bfloat16_mlp",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits are compared: the order of a reduction must not depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", HOSTS)
def test_compiled_host_is_bitwise_the_host(name: str) -> None:
    result = checks.check(ENTRIES[name])
    told = [
        f"{failure['check']}: {failure['message']}\n{failure['traceback']}" for failure in result["failures"]
    ]
    assert not told, "\n".join(told)


def test_each_executed_layer_of_the_subset_has_a_site() -> None:
    rows = []
    for name in HOSTS:
        if ENTRIES[name].family not in ("torch.nn", "functional", "mixture-of-experts"):
            rows += [(name, row) for row in checks.check_sites(ENTRIES[name])]
    assert rows
    assert [(name, row["path"], row["reason"]) for name, row in rows if not row["site"]] == []


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("linear_root", {""}),
        ("called_twice", {"shared", "out"}),
        ("tied_weights", {"body", "head"}),
        ("matmul_forms", {"a", "b", "c", "d", "e"}),
        ("functional_tied_head", {"body", "embedding.weight"}),
        ("childs_weight", {"used", "bypassed"}),
        ("attention_kdim_vdim", {
            "out", "attention.out_proj", "attention.q_proj_weight", "attention.k_proj_weight",
            "attention.v_proj_weight",
        }),
    ],
)  # fmt: skip
def test_the_count_of_executed_layers_needs_no_morphc(name: str, paths: set[str]) -> None:
    candidates, unregistered = executed(ENTRIES[name])
    assert {candidate.path for candidate in candidates} == paths
    assert unregistered == []


def test_a_product_with_an_unregistered_parameter_is_told_apart() -> None:
    candidates, unregistered = executed(ENTRIES["unregistered_list"])
    assert [candidate.path for candidate in candidates] == ["out"]
    assert unregistered == ["linear"]


def test_comparison_sees_a_sign_of_zero_and_takes_a_nan_for_itself() -> None:
    from zoo_models.tree import differences, freeze

    host = freeze({"x": torch.tensor([0.0, float("nan")])})
    assert differences(host, freeze({"x": torch.tensor([0.0, float("nan")])})) == []
    assert differences(host, freeze({"x": torch.tensor([-0.0, float("nan")])})) != []
