"""`morphc.fold`: the grown model as a plain module, with no need of morphc.

A slot of a seed that blends (alpha > 0) becomes, in this order of preference:

1. the host layer's own weights: `affine` and `lowrank`;
2. wider host layers: `widen`;
3. a small plain module behind the layer (`foldgraph`): everything else, and case 1 where the weight is shared with
   another layer, quantized, computed on each call, or of a layer that is not known; blends `multiply` and `gate`.

What can't be any of these is refused with the reason, and the model is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from morphc import foldmath
from morphc.errors import FoldError
from morphc.foldgraph import Grown, grown_module, install
from morphc.foldmath import Home, exact, home_of
from morphc.foldparameter import ParameterHome, apply_to_parameter, parameter_home
from morphc.kernels.blueprints.affine import Affine
from morphc.kernels.blueprints.base import get
from morphc.kernels.blueprints.lowrank import LowRank
from morphc.kernels.blueprints.widen import Widen
from morphc.kernels.reference.chunks import bounds
from morphc.kernels.spec import NO_BLOCK
from morphc.lifecycle import TABLE, Lifecycle
from morphc.passes.clone import clone_tree
from morphc.passes.plan import Block
from morphc.runtime.plain import plain_attributes, plain_value
from morphc.runtime.requests import SiteRequest
from morphc.runtime.sharded import is_dtensor
from morphc.runtime.site import SeedSite
from morphc.runtime.store import SeedStore, root_of, store_of

M = TypeVar("M", bound=nn.Module)
How = Literal["own weights", "wider layers", "small module"]

_LINEAR_BLENDS = ("residual", "lerp")
_WAY_OUT = (
    "take these seeds out of the blend (CULLED) before folding, or keep the model whole with morphc.save"
)


@dataclass(frozen=True)
class Step:
    """How the blending slots of one bank are folded. `why` says why not better, empty where it is the best."""

    grown: Grown
    request: SiteRequest
    how: How
    why: str = ""

    @property
    def line(self) -> str:
        """One line for a report."""
        site, count = self.grown, len(self.grown.seeds)
        noun = "seed" if count == 1 else "seeds"
        tail = f" ({self.why})" if self.why else ""
        return (
            f"{site.path or '<root>'}: {count} {noun} of {site.blueprint}, {site.blend} -> {self.how}{tail}"
        )


def fold(model: M) -> M:
    """The model as a plain module that computes the same and needs no morphc; `model` itself stays as it is.

    Seeds in GRAFTING, STABILIZATION, EVALUATING, FINE_TUNING and FOSSILIZED with alpha > 0 are folded at their
    current alpha, all others vanish: a model without such seeds folds to its host, bit for bit. Parameters that folding
    doesn't change are shared with `model`.

    In eval mode the outputs equal the model's within, relative to the largest output, 1e-12 in float64, 1e-5 in float32
    and 2e-2 in bfloat16 and float16 (weights are merged in float64 and rounded once). In train mode too, except where
    `widen` passed a BatchNorm (its new channels then use statistics of the batch) or a dropout (its masks
    change with the width). Under autocast small modules compute in the autocast type.

    State-dict keys are the host's, plus a `bias` where a layer had none and needs one, and `<layer>.grown.*` for small
    modules; these are forward hooks, so a layer has to be called, not its `.forward`. Widths kept outside of the
    layers, such as `config.intermediate_size` of transformers' models, are not updated by `widen`.

    Raises NotMorphedError, and FoldError naming site, seeds and reason.
    """
    store, root = store_of(model), root_of(model)
    sharded = next((name for name, param in root.named_parameters() if is_dtensor(param)), None)
    if sharded is not None:
        raise FoldError(
            f"{sharded!r} is sharded among ranks: gather the state dict (get_model_state_dict with "
            "full_state_dict=True), load it into the model compiled without sharding, and fold that (examples/fsdp2.py)"
        )
    plain: Any = _plain(root)
    steps = _steps(store, root, plain)
    for step in steps:
        if step.how != "small module":
            _merge(step, plain)
    for step in steps:
        if step.how == "wider layers":
            _widen(step, plain)
    _install_modules([step for step in steps if step.how == "small module"], root, plain)
    return plain  # type: ignore[no-any-return]


def fold_account(model: nn.Module) -> tuple[str, ...]:
    """What `fold` would do with each bank of blending slots, a line each. Raises as `fold` does."""
    store, root = store_of(model), root_of(model)
    return tuple(step.line for step in _steps(store, root, _plain(root)))


def _plain(root: nn.Module) -> nn.Module:
    plain = clone_tree(root, attributes=plain_attributes, read=plain_value)
    for name in [name for name in vars(plain) if name.startswith("_morphc")]:
        del vars(plain)[name]
    return plain


# -- deciding ------------------------------------------------------------------------------------------------


def _steps(store: SeedStore, root: nn.Module, plain: nn.Module) -> list[Step]:
    names = {id(module): name for name, module in root.named_modules()}
    holders = _holders(plain)
    steps = []
    for path, site in store.sites.items():
        request = store.requests[path]
        for grown in _blending(site):
            if id(request.layer) not in names:
                raise FoldError(
                    f"site {path!r} has seeds that blend, but the layer it watches is no longer in the model: put it "
                    "back, or dismiss its seeds with assign(seeds, Lifecycle.DORMANT)"
                )
            layer = plain.get_submodule(names[id(request.layer)])
            how, why = _decide(grown, request, layer, plain, holders, store)
            if how == "small module" and request.past_hooks:
                because = f" ({why})" if why else ""
                raise FoldError(
                    f"{_who(grown)}: becomes a small module{because}, which hangs in the layer as a hook, and the host "
                    f"calls this layer's forward past its hooks: call the layer itself, not its forward, or {_WAY_OUT}"
                )
            steps.append(Step(grown, request, how, why))
    return steps


def _blending(site: SeedSite) -> list[Grown]:
    state = site.state
    if state.lifecycle.is_meta:
        return []
    rows = slice(site.offset, site.offset + site.seeds)
    lifecycle, alpha = state.lifecycle[rows].tolist(), state.alpha[rows].detach().cpu()
    spans = bounds(site.features, site.seeds)
    found = []
    for name, bank in site.slots.items():
        slots = [
            (slot, seed)
            for slot, seed in enumerate(bank.owner.tolist())
            if seed >= 0 and TABLE[Lifecycle(lifecycle[seed])].forward == "blend" and alpha[seed] > 0
        ]
        if not slots:
            continue
        chosen = torch.tensor([slot for slot, _ in slots], device=bank.owner.device)
        seeds = tuple(seed for _, seed in slots)
        params = {key: bank.get_parameter(key).detach()[chosen] for key in bank.names}
        found.append(
            Grown(
                site.path,
                name,
                bank.blend,
                seeds,
                tuple(spans[seed] for seed in seeds),
                alpha[list(seeds)],
                params,
                bank.geometry,
                site.feature_axis,
            )
        )
    return found


def _holders(root: nn.Module) -> dict[int, int]:
    """How many places hold each parameter. A module that stands twice in the tree is one place."""
    counts: dict[int, int] = {}
    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for parameter in module._parameters.values():
            if parameter is not None:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def _decide(
    grown: Grown,
    request: SiteRequest,
    layer: nn.Module,
    plain: nn.Module,
    holders: dict[int, int],
    store: SeedStore,
) -> tuple[How, str]:
    kind = get(grown.blueprint)
    if request.parameter is not None:
        return _decide_functional(grown, request, layer, holders)
    if type(kind) is Widen:
        reason = _widen_obstacle(grown, request.block, plain, holders)
        if reason:
            raise FoldError(f"{_who(grown)}: widen can't become wider layers, because {reason}; {_WAY_OUT}")
        return "wider layers", ""
    if kind.tap == "block":
        raise FoldError(
            f"{_who(grown)}: a blueprint that reads its block's input can't become a module; {_WAY_OUT}"
        )
    if type(kind) not in (Affine, LowRank):
        return "small module", ""
    if grown.blend not in _LINEAR_BLENDS:
        return "small module", f"blend {grown.blend!r} is not linear"
    home = _own_home(layer, request.path, holders, store)
    if isinstance(home, str):
        return "small module", home
    if type(kind) is LowRank:
        if request.owner is not None:
            return "small module", "it reads the input of the module that owns the layer"
        if home.into is None:
            return "small module", "the layer's weight has no full input axis"
        return "own weights", ""
    gains = home.gains_bias and request.owner is None
    if not gains and any(foldmath.needs_bias(layer, home, merge) for merge in _merges(grown)):
        return "small module", "the layer has no bias that could take the shift"
    return "own weights", ""


def _decide_functional(
    grown: Grown, request: SiteRequest, owner: nn.Module, holders: dict[int, int]
) -> tuple[How, str]:
    name = str(request.parameter)
    reason = ""
    if type(get(grown.blueprint)) is not Affine:
        reason = f"blueprint {grown.blueprint!r} needs a module, and a functional layer has no place for one"
    elif grown.blend not in _LINEAR_BLENDS:
        reason = f"blend {grown.blend!r} is not linear"
    else:
        found = parameter_home(owner, name, grown.feature_axis)
        if isinstance(found, str):
            reason = found
        elif holders.get(id(getattr(owner, name)), 0) > 1:
            reason = "its weight is shared with another layer"
        elif found.bias is None and any(bool(merge.shift.any()) for merge in _merges(grown)):
            reason = "the call has no bias that could take the shift"
    if reason:
        raise FoldError(
            f"{_who(grown)}: the functional layer can't be folded, because {reason}; make it an nn.Linear or nn.Conv "
            f"in the host, or {_WAY_OUT}"
        )
    return "own weights", ""


def _own_home(layer: nn.Module, path: str, holders: dict[int, int], store: SeedStore) -> Home | str:
    home = home_of(layer)
    if isinstance(home, str):
        return home
    for name in ("weight", "bias"):
        parameter = layer._parameters.get(name)
        if parameter is not None and holders.get(id(parameter), 0) > 1:
            return f"its {name} is shared with another layer"
    if f"{path}.weight".lstrip(".") in store.requests:
        return "its weight is also used by a function"
    return home


def _widen_obstacle(grown: Grown, block: Block | None, plain: nn.Module, holders: dict[int, int]) -> str:
    if block is None or block.obstacle:
        return block.obstacle if block is not None else NO_BLOCK
    if grown.blend not in _LINEAR_BLENDS:
        return f"blend {grown.blend!r} is not linear"
    for path in (*block.inputs, block.output):
        layer = plain.get_submodule(path)
        home = home_of(layer)
        if isinstance(home, str):
            return f"of {path!r}: {home}"
        if home.into is None:
            return f"{path!r} is no linear layer or convolution without groups"
        for name in ("weight", "bias"):
            parameter = layer._parameters.get(name)
            if parameter is not None and holders.get(id(parameter), 0) > 1:
                return f"the {name} of {path!r} is shared with another layer"
    if block.norm is not None:
        norm = plain.get_submodule(block.norm)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            return f"{block.norm!r} ({type(norm).__name__}) mixes features between the block's two layers"
        if norm.running_mean is None:
            return f"the BatchNorm {block.norm!r} has no statistics of its own"
    return ""


def _who(grown: Grown) -> str:
    shown = ", ".join(map(str, grown.seeds[:8])) + (", ..." if len(grown.seeds) > 8 else "")
    return f"seeds [{shown}] of {grown.path!r} ({grown.blueprint})"


# -- carrying out --------------------------------------------------------------------------------------------


def _keep(grown: Grown, slot: int) -> tuple[Tensor, Tensor]:
    """(a, k) in float64. 1 - a is taken in float32, as the running model does."""
    alpha = grown.alpha[slot]
    keep = 1 - alpha if grown.blend == "lerp" else torch.ones_like(alpha)
    return exact(alpha), exact(keep)


def _merges(grown: Grown) -> list[foldmath.Merge]:
    kind = get(grown.blueprint)
    found = []
    for slot, span in enumerate(grown.spans):
        alpha, keep = _keep(grown, slot)
        params = {name: value[slot] for name, value in grown.params.items()}
        if type(kind) is Affine:
            found.append(foldmath.affine(span, alpha, keep, params["scale"], params["shift"]))
        elif type(kind) is LowRank:
            found.append(foldmath.lowrank(span, alpha, keep, params["in_weight"], params["out_weight"]))
        elif grown.blend == "lerp":
            found.append(foldmath.scaled(span, keep))
    return found


def _merge(step: Step, plain: nn.Module) -> None:
    if step.request.parameter is not None:
        owner = plain.get_submodule(step.grown.path.rpartition(".")[0])
        found = parameter_home(owner, step.request.parameter, step.grown.feature_axis)
        assert isinstance(found, ParameterHome)
        apply_to_parameter(owner, found, _merges(step.grown))
        return
    merges = _merges(step.grown)
    if merges:
        layer = plain.get_submodule(step.grown.path)
        foldmath.apply_merges(layer, _home(layer), merges)


def _widen(step: Step, plain: nn.Module) -> None:
    block, grown = step.request.block, step.grown
    assert block is not None
    last = plain.get_submodule(block.output)
    branches = [("gate_in_weight", "gate_in_bias"), ("in_weight", "in_bias")]
    # The first path of a gated block goes through the activation: that branch is the blueprint's gate.
    names = branches if len(block.inputs) == 2 else branches[1:]
    for path, (weight, bias) in zip(block.inputs, names, strict=True):
        rows = exact(grown.params[weight])
        # [K, in, R] behind a Linear; [K, R, in, *kernel] behind a convolution.
        rows = rows.transpose(1, 2) if rows.dim() == 3 else rows
        first = plain.get_submodule(path)
        foldmath.add_outputs(first, _home(first), rows.flatten(0, 1), exact(grown.params[bias]).flatten())
    foldmath.add_inputs(last, _home(last), _columns(grown))
    if block.norm is not None:
        added = grown.params["in_bias"].numel()
        foldmath.add_channels(plain.get_submodule(block.norm), added)


def _home(layer: nn.Module) -> Home:
    home = home_of(layer)
    assert isinstance(home, Home)
    return home


def _columns(grown: Grown) -> Tensor:
    """[features, K * R, *kernel]: each slot's out-weights in the rows of its own chunk, zero elsewhere."""
    out = exact(grown.params["out_weight"])
    out = out.transpose(1, 2) if out.dim() == 3 else out  # [K, C, R, *kernel]
    slots, _, rank = out.shape[:3]
    columns = torch.zeros(grown.geometry.features, slots * rank, *out.shape[3:], dtype=torch.float64)
    for slot, (start, stop) in enumerate(grown.spans):
        alpha, _ = _keep(grown, slot)
        columns[start:stop, slot * rank : (slot + 1) * rank] = alpha * out[slot, : stop - start]
    return columns


def _install_modules(steps: list[Step], root: nn.Module, plain: nn.Module) -> None:
    names = {id(module): name for name, module in root.named_modules()}
    by_site: dict[str, list[Step]] = {}
    for step in steps:
        by_site.setdefault(step.grown.path, []).append(step)
    for found in by_site.values():
        request = found[0].request
        owner = request.owner if request.owner is not None else request.layer
        name = names[id(owner)]
        layer = plain.get_submodule(name)
        grown = [step.grown for step in found]
        device = next(iter(grown[0].params.values())).device
        install(layer, grown_module(layer, grown, request.output_index, device))
        _leave_fast_path(plain, name)


def _leave_fast_path(plain: nn.Module, path: str) -> None:
    """`nn.TransformerEncoder` may make nested tensors, for a fused path that layers with a hook inside don't take."""
    parts = path.split(".")
    for depth in range(len(parts)):
        owner = plain.get_submodule(".".join(parts[:depth]))
        if isinstance(owner, nn.TransformerEncoder):
            owner.use_nested_tensor = False
