"""Special hosts: dtypes, quantized and scripted children, PEFT, subclassed tensors, autocast inside."""

from __future__ import annotations

import copy
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .hf import config, model
from .registry import Inputs, features, floats, ids, masked_ids, zoo

FAMILY = "special"
WIDE = features(32)


def typed(dtype: torch.dtype, *shape: int) -> Any:
    """Features in another dtype."""
    return lambda batch, _: ((floats(batch, *shape, dtype=dtype),), {})


def mlp() -> nn.Sequential:
    """Linear, GELU, LayerNorm, Linear."""
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Dropout(0.1), nn.Linear(64, 16))


@zoo("float64_mlp", FAMILY, typed(torch.float64, 32))
def float64_mlp() -> nn.Module:
    """Double precision."""
    return mlp().double()


@zoo("bfloat16_mlp", FAMILY, typed(torch.bfloat16, 32))
def bfloat16_mlp() -> nn.Module:
    """bfloat16."""
    return mlp().bfloat16()


@zoo("float16_mlp", FAMILY, typed(torch.float16, 32))
def float16_mlp() -> nn.Module:
    """float16."""
    return mlp().half()


@zoo("bfloat16_conv", FAMILY, typed(torch.bfloat16, 3, 12, 12))
def bfloat16_conv() -> nn.Module:
    """bfloat16 convolutions."""
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(inplace=True), nn.Conv2d(64, 8, 3)).bfloat16()


@zoo("mixed_dtypes", FAMILY, WIDE)
class MixedDtypes(nn.Module):
    """A float32 norm amid bfloat16 layers, casts between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64).bfloat16(), nn.Linear(64, 64).bfloat16()
        self.norm = nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.up(x.bfloat16()).float())
        return self.down(h.bfloat16()).float()


@zoo("autocast_inside", FAMILY, WIDE)
class AutocastInside(nn.Module):
    """torch.autocast in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.body(x)
        return y.float()


@zoo("complex_layer", FAMILY, WIDE)
class ComplexLayer(nn.Module):
    """A complex-valued Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(32, 64)
        self.middle = nn.Linear(64, 64, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(torch.complex(self.before(x), self.before(-x))).abs()


@zoo("quantized_dynamic", FAMILY, WIDE, input_grads=False)
def quantized_dynamic() -> nn.Module:
    """Linear layers quantized by torch.ao.quantization.quantize_dynamic."""
    host = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    quantization = importlib.import_module("torch.ao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return quantization.quantize_dynamic(host, {nn.Linear}, torch.qint8)


@zoo("quantized_beside_float", FAMILY, WIDE, input_grads=False)
def quantized_beside_float() -> nn.Module:
    """A quantized body under a trained float head."""
    return nn.Sequential(quantized_dynamic(), nn.Tanh(), nn.Linear(64, 10))


class Scripted(nn.Module):
    """To be scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(x))


@zoo("script_child", FAMILY, WIDE)
def script_child() -> nn.Module:
    """A ScriptModule among the children."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return nn.Sequential(nn.Linear(32, 32), torch.jit.script(Scripted()), nn.Linear(32, 64))


@zoo("traced_child", FAMILY, WIDE)
def traced_child() -> nn.Module:
    """A traced module among the children."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return nn.Sequential(
            nn.Linear(32, 32), torch.jit.trace(Scripted(), torch.zeros(2, 32)), nn.Linear(32, 64)
        )


@zoo("fx_graph_module", FAMILY, WIDE)
def fx_graph_module() -> nn.Module:
    """The host is itself a torch.fx.GraphModule."""
    return torch.fx.symbolic_trace(nn.Sequential(nn.Linear(32, 64), nn.ReLU(inplace=True), nn.Linear(64, 64)))


@zoo("exported_module", FAMILY, WIDE, other_batch=None, modes=("as_built",))
def exported_module() -> nn.Module:
    """The host came out of torch.export; its graph calls aten ops on parameters."""
    host = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))
    return torch.export.export(host, (torch.zeros(2, 32),)).module()


def gpt2() -> nn.Module:
    """A tiny GPT-2."""
    return model(
        "GPT2LMHeadModel", config("GPT2Config", vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32)
    )


@zoo("peft_lora_gpt2", FAMILY, masked_ids, length=8, other_length=5, extras=("generate",))
def peft_lora_gpt2() -> nn.Module:
    """GPT-2 wrapped by PEFT's LoRA."""
    host, peft = gpt2(), importlib.import_module("peft")
    settings = peft.LoraConfig(
        r=4, lora_dropout=0.1, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    host = peft.get_peft_model(host, settings)
    for name, weight in host.named_parameters():
        if "lora_B" in name:  # zero at birth: the adapter would have no effect
            nn.init.normal_(weight, std=0.02)
    return host


@zoo("peft_lora_llama", FAMILY, masked_ids, length=8, other_length=5)
def peft_lora_llama() -> nn.Module:
    """Llama wrapped by PEFT's LoRA with DoRA and a trained head."""
    llama = model("LlamaForCausalLM", config(
        "LlamaConfig", vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=32,
    ))  # fmt: skip
    peft = importlib.import_module("peft")
    settings = peft.LoraConfig(
        r=4, use_dora=True, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]
    )
    return peft.get_peft_model(llama, settings)


def embeds(batch: int, length: int) -> Inputs:
    """Embeddings in place of ids, and a cache asked for."""
    return (), {"inputs_embeds": floats(batch, length, 64), "use_cache": True, "output_hidden_states": True}


@zoo("gpt2_embeds_and_cache", FAMILY, embeds, length=8, other_length=5)
def gpt2_embeds_and_cache() -> nn.Module:
    """GPT-2 fed with embeddings; returns cache and hidden states."""
    return gpt2()


@zoo(
    "gpt2_checkpointing", FAMILY, lambda batch, length: ((ids(batch, length),), {}), length=8, other_length=5
)
def gpt2_checkpointing() -> nn.Module:
    """transformers' own gradient checkpointing switched on."""
    host = gpt2()
    host.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return host


@zoo("deepcopied_layers", FAMILY, features(-1, 32), length=6, other_length=4)
class DeepcopiedLayers(nn.Module):
    """Clones of one block, and a subclass of a torch.nn transformer layer."""

    class Layer(nn.TransformerEncoderLayer):
        def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(src, *args, **kwargs) + src

    def __init__(self) -> None:
        super().__init__()
        block = DeepcopiedLayers.Layer(32, 4, 64, batch_first=True)
        self.layers = nn.ModuleList(copy.deepcopy(block) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@zoo("func_grad_inside", FAMILY, WIDE, unmeasured=("energy.0", "energy.2"))
class FuncGradInside(nn.Module):
    """torch.func.grad and vmap over a layer in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(32, 64), nn.Softplus(), nn.Linear(64, 1))
        self.out = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        force = torch.func.vmap(torch.func.grad(lambda row: self.energy(row).sum()))(x)
        return self.out(force)


@zoo("autograd_grad_inside", FAMILY, WIDE)
class AutogradGradInside(nn.Module):
    """Double backward: the forward differentiates a layer with create_graph."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.energy(leaf).sum(), leaf, create_graph=True)
        return force


@zoo("functional_call_inside", FAMILY, WIDE)
class FunctionalCallInside(nn.Module):
    """torch.func.functional_call of a child with scaled weights (fast weights)."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        fast = {name: weight * 0.5 for name, weight in self.child.named_parameters()}
        return self.child(x) + torch.func.functional_call(self.child, fast, (x,))
