"""The in-projection of `nn.MultiheadAttention`, which torch computes inside of its functional attention.

Its sites are named by parameter: `in_proj_weight` is one site over the packed features q | k | v, and with `kdim` or
`vdim` there are `q_proj_weight`, `k_proj_weight` and `v_proj_weight`. The module's own forward always runs; only its
call of `F.multi_head_attention_forward` is caught, and only while there is something to do:

1. All sites dormant, no telemetry due (and always in eval mode): nothing is caught, fast paths are kept.
2. All sites dormant, telemetry due: torch's function runs, then the projections are computed once more without
   gradients and measured. A compiled graph holds an op that does so on sampled steps only; exported graphs don't. As
   these values are no part of the graph, there is no gradient telemetry.
3. Some site not dormant: the same computation in steps, projections -> sites -> attention -> out-projection, operation
   by operation as torch does it. Nested tensors, which only the fast path can read, are refused by torch meanwhile.

Queries and keys may have different numbers of rows, so a packed site can't always stand on one tensor. Where query,
key and value are one tensor it does; otherwise it is taken third by third. For that its seeds are a multiple of three
that cuts each third alike: no chunk has features of two thirds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from morphc.errors import ConfigError
from morphc.lifecycle import Mode
from morphc.runtime.bank import FREE, SlotBank
from morphc.runtime.regions import WatchedForward
from morphc.runtime.site import SeedSite
from morphc.runtime.telemetry import exporting

PACKED: Final = "in_proj_weight"
SEPARATE: Final = ("q_proj_weight", "k_proj_weight", "v_proj_weight")

Three = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of `F.multi_head_attention_forward`, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    embed_dim_to_check: int
    num_heads: int
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    add_zero_attn: bool
    dropout_p: float
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    training: bool = True
    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    use_separate_proj_weight: bool = False
    q_proj_weight: Tensor | None = None
    k_proj_weight: Tensor | None = None
    v_proj_weight: Tensor | None = None
    static_k: Tensor | None = None
    static_v: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False


class Third(SeedSite):
    """A third of a packed site: the q, k or v part of its features, its seeds, and its share of the banks."""

    def __init__(self, whole: SeedSite, index: int) -> None:
        seeds = whole.seeds // 3
        super().__init__(
            whole.path,
            whole.features // 3,
            seeds,
            offset=whole.offset + index * seeds,
            state=whole.state,
            telemetry_every=whole.telemetry_every,
            telemetry_values=whole.telemetry_values,
            near_zero=whole.near_zero,
            gradient_telemetry=whole.gradient_telemetry,
        )
        self.first = index * seeds
        self.slots = whole.slots
        self.follow_plan()

    def owner_of(self, bank: SlotBank) -> Tensor:
        """[K]: the third's own seed that holds each slot, -1 where free or held by a seed of another third."""
        seed = bank.owner - self.first
        return torch.where((seed >= 0) & (seed < self.seeds), seed, FREE)


def divides_thirds(features: int, seeds: int) -> bool:
    """Whether `seeds` chunks cut each third of `features` alike, so that none crosses from one to the next."""
    return seeds % 3 == 0 and features // 3 % (seeds // 3) == 0


class AttentionForward(WatchedForward):
    """The forward of a MultiheadAttention whose in-projection has sites, by their paths in `sites`.

    Raises ConfigError for a packed site whose chunks don't divide the thirds.
    """

    def __init__(
        self, module: nn.Module, sites: Mapping[str, SeedSite], owner_of: Mapping[str, nn.Module]
    ) -> None:
        super().__init__(module, sites, owner_of)
        self.by_name = {path.rpartition(".")[2]: site for path, site in self.sites.items()}
        packed = self.by_name.get(PACKED)
        self.thirds: tuple[Third, ...] = ()
        if packed is not None:
            if not divides_thirds(packed.features, packed.seeds):
                raise ConfigError(
                    f"seeds={packed.seeds} for {packed.path!r}, which packs q, k and v of {packed.features // 3} "
                    f"features each: use three times a divisor of {packed.features // 3}"
                )
            self.thirds = tuple(Third(packed, index) for index in range(3))
            packed.__dict__["parts"] = self.thirds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active() and not self._due():
            return self._own()(*args, **kwargs)
        with _Caught(self):
            return self._own()(*args, **kwargs)

    def active(self) -> bool:
        """Whether some site changes a value or its gradient. What trains in isolation does so for gradients only."""
        if torch.compiler.is_compiling() and not exporting():
            return True  # a graph holds the sites in every mode
        grad = torch.is_grad_enabled()
        return any(site.mode == Mode.ACTIVE or (grad and site.mode) for site in self.by_name.values())

    def _due(self) -> bool:
        """Whether a dormant forward is to be measured. One that isn't is counted here, as `SeedSite.watch` does."""
        if not self.module.training:
            return False
        if torch.compiler.is_compiling():
            return False
        if torch._C._current_graph_task_id() != -1:
            return False
        pulses = [site.pulse for site in self.by_name.values() if site.pulse.every]
        if any(pulse.count % pulse.every == 0 for pulse in pulses):
            return True
        for pulse in pulses:
            pulse.count += 1
        return False

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        """What stands in for a call of `F.multi_head_attention_forward`."""
        call = Call(*args, **kwargs)
        own = call.q_proj_weight if call.use_separate_proj_weight else call.in_proj_weight
        name = SEPARATE[0] if call.use_separate_proj_weight else PACKED
        if own is not getattr(self.module, name):
            return F.multi_head_attention_forward(*args, **kwargs)  # of another attention, inside of this one
        if self.active():
            return self._in_steps(call)
        out = F.multi_head_attention_forward(*args, **kwargs)
        # Afterwards: arguments that torch refuses must be refused in its own words.
        with torch.no_grad():
            self._project(call, (call.query, call.key, call.value))
        return out

    # -- projections -------------------------------------------------------------------------------------

    def _project(self, call: Call, inputs: Three) -> Three:
        """q, k and v behind their sites."""
        if call.use_separate_proj_weight:
            weights = call.q_proj_weight, call.k_proj_weight, call.v_proj_weight
            projected: list[Tensor] = []
            for name, x, weight, bias in zip(
                SEPARATE, inputs, weights, _thirds(call.in_proj_bias), strict=True
            ):
                assert weight is not None
                y = F.linear(x, weight, bias)
                site = self.by_name.get(name)
                projected.append(y if site is None else site(y, x))
            return projected[0], projected[1], projected[2]
        q, k, v = inputs
        weight, bias = call.in_proj_weight, call.in_proj_bias
        assert weight is not None
        site = self.by_name[PACKED]
        if q is k and k is v:
            q, k, v = _unpacked(site(F.linear(q, weight, bias), q), 3)
            return q, k, v
        if k is v:
            width = q.shape[-1]
            weight_q, weight_kv = torch.split(weight, [width, 2 * width])
            bias_q, bias_kv = (None, None) if bias is None else torch.split(bias, [width, 2 * width])
            projected = [F.linear(q, weight_q, bias_q), *_unpacked(F.linear(k, weight_kv, bias_kv), 2)]
        else:
            operands = zip(inputs, weight.chunk(3), _thirds(bias), strict=True)
            projected = [F.linear(*each) for each in operands]
        return self._by_thirds(site, (projected[0], projected[1], projected[2]), inputs)

    def _by_thirds(self, site: SeedSite, values: Three, inputs: Three) -> Three:
        """The packed site on tensors with rows of their own; one forward is counted once."""
        if torch.compiler.is_compiling():
            each = zip(self.thirds, values, inputs, strict=True)
            q, k, v = (third.traced(value, x, self.module.training) for third, value, x in each)
            return q, k, v
        if self.module.training:
            for third, value in zip(self.thirds, values, strict=True):
                third.pulse.every, third.pulse.count = site.pulse.every, site.pulse.count
                third.watch(value)
            site.pulse.count = self.thirds[0].pulse.count
        if not site.mode:
            return values
        q, k, v = (third.join(value, x) for third, value, x in zip(self.thirds, values, inputs, strict=True))
        return q, k, v

    # -- attention ---------------------------------------------------------------------------------------

    def _in_steps(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """`F.multi_head_attention_forward` with the sites between its in-projection and the rest."""
        batched = F._mha_shape_check(  # type: ignore[attr-defined]
            call.query, call.key, call.value, call.key_padding_mask, call.attn_mask, call.num_heads
        )
        inputs = call.query, call.key, call.value
        padding = call.key_padding_mask
        if not batched:
            inputs = call.query.unsqueeze(1), call.key.unsqueeze(1), call.value.unsqueeze(1)
            padding = None if padding is None else padding.unsqueeze(0)
        _check(call, inputs)
        rows, batch, width = inputs[0].shape
        padding, mask, causal = _masks(call, padding, inputs)
        q, k, v = self._project(call, inputs)
        if call.bias_k is not None and call.bias_v is not None:
            k = torch.cat([k, call.bias_k.repeat(1, batch, 1)])
            v = torch.cat([v, call.bias_v.repeat(1, batch, 1)])
            mask, padding = _one_more(mask), _one_more(padding)
        q = _heads(q, call.num_heads)
        k = _heads(k, call.num_heads) if call.static_k is None else call.static_k
        v = _heads(v, call.num_heads) if call.static_v is None else call.static_v
        if call.add_zero_attn:
            nothing = torch.zeros((q.shape[0], 1, q.shape[2]), dtype=k.dtype, device=k.device)
            k, v = torch.cat([k, nothing], dim=1), torch.cat([v, nothing.to(v.dtype)], dim=1)
            mask, padding = _one_more(mask), _one_more(padding)
        mask = _merged(mask, padding, batch, call.num_heads)
        dropout = call.dropout_p if call.training else 0.0
        weights = None
        if call.need_weights:
            mixed, weights = _explicit(q, k, v, mask, dropout)
            mixed = mixed.transpose(0, 1).reshape(rows * batch, width)
        else:
            mixed = _fused(q, k, v, mask, dropout, causal, batch)
            mixed = mixed.permute(2, 0, 1, 3).reshape(batch * rows, width)
        out = F.linear(mixed, call.out_proj_weight, call.out_proj_bias)
        out = out.view(rows, batch, out.shape[1])
        if weights is not None:
            weights = weights.view(batch, call.num_heads, rows, k.shape[1])
            weights = weights.mean(dim=1) if call.average_attn_weights else weights
        if batched:
            return out, weights
        return out.squeeze(1), None if weights is None else weights.squeeze(0)


class _Caught(TorchFunctionMode):
    """Hands calls of the functional attention to `forward`; all else goes its way."""

    def __init__(self, forward: AttentionForward) -> None:
        super().__init__()
        self.forward = forward

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.multi_head_attention_forward:
            return self.forward.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _thirds(bias: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if bias is None else bias.chunk(3)


def _unpacked(packed: Tensor, count: int) -> tuple[Tensor, ...]:
    """[..., count * E] as `count` tensors [..., E], each contiguous."""
    split = torch.unflatten(packed, -1, (count, packed.shape[-1] // count)).unsqueeze(0)
    stacked = split.transpose(0, -2).squeeze(-2).contiguous()
    # By index and not by unbind, as in torch: the backward adds up, and -0.0 + 0.0 is 0.0.
    return tuple(stacked[index] for index in range(count))


def _check(call: Call, inputs: Three) -> None:
    """torch's own conditions on the inputs."""
    query, key, value = inputs
    if query.shape[-1] != call.embed_dim_to_check:
        raise AssertionError(
            f"was expecting embedding dimension of {call.embed_dim_to_check}, but got {query.shape[-1]}"
        )
    if call.use_separate_proj_weight and key.shape[:2] != value.shape[:2]:
        raise AssertionError(
            f"key's sequence and batch dims {key.shape[:2]} do not match value's {value.shape[:2]}"
        )
    if not call.use_separate_proj_weight and key.shape != value.shape:
        raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")


def _masks(call: Call, padding: Tensor | None, inputs: Three) -> tuple[Tensor | None, Tensor | None, bool]:
    """Padding mask and attention mask as floats, the latter [1 or N * heads, L, S]; and the causal hint.

    The hint alone is enough for the fused attention; beside a padding mask or weights it is the mask that counts.
    """
    query, key, _ = inputs
    padding = F._canonical_mask(
        padding, "key_padding_mask", F._none_or_dtype(call.attn_mask), "attn_mask", query.dtype
    )
    if call.is_causal and call.attn_mask is None:
        raise RuntimeError(
            "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
            "`generate_square_subsequent_mask` to create this mask."
        )
    if call.is_causal and padding is None and not call.need_weights:
        return None, None, True
    mask = F._canonical_mask(call.attn_mask, "attn_mask", None, "", query.dtype, check_other=False)
    if mask is not None:
        mask = mask.unsqueeze(0) if mask.dim() == 2 else mask
        rows, batch = query.shape[:2]
        count = 1 if call.attn_mask is not None and call.attn_mask.dim() == 2 else batch * call.num_heads
        if mask.shape != (count, rows, key.shape[0]):
            assert call.attn_mask is not None
            expected = (count, rows, key.shape[0])[3 - call.attn_mask.dim() :]
            raise RuntimeError(
                f"The shape of the {call.attn_mask.dim()}D attn_mask is {call.attn_mask.shape}, "
                f"but should be {expected}."
            )
    return padding, mask, call.is_causal and padding is None


def _one_more(mask: Tensor | None) -> Tensor | None:
    """The mask for one more key, which everybody may attend to."""
    return None if mask is None else F.pad(mask, (0, 1))


def _heads(x: Tensor, heads: int) -> Tensor:
    """[L, N, E] -> [N * heads, L, E / heads]."""
    rows, batch, width = x.shape
    return x.view(rows, batch * heads, width // heads).transpose(0, 1)


def _merged(mask: Tensor | None, padding: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """Both masks in one, [N * heads or 1, L or 1, S]."""
    if padding is None:
        return mask
    keys = padding.shape[-1]
    padding = padding.view(batch, 1, 1, keys).expand(-1, heads, -1, -1).reshape(batch * heads, 1, keys)
    return padding if mask is None else mask + padding


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Attention with its weights [N * heads, L, S]."""
    scaled = q * math.sqrt(1.0 / float(q.shape[-1]))
    scores = (
        torch.bmm(scaled, k.transpose(-2, -1))
        if mask is None
        else torch.baddbmm(mask, scaled, k.transpose(-2, -1))
    )
    weights = F.softmax(scores, dim=-1)
    if dropout > 0.0:
        weights = F.dropout(weights, p=dropout)
    return torch.bmm(weights, v), weights


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, batch: int
) -> Tensor:
    """[N, heads, L, E / heads] from torch's fused attention."""
    if mask is not None:
        shared = mask.shape[0] == 1 and mask.dim() == 3
        mask = mask.unsqueeze(0) if shared else mask.view(batch, -1, mask.shape[1], k.shape[1])
    q, k, v = (x.view(batch, -1, x.shape[1], x.shape[2]) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
