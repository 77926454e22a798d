"""How the slots of a bank learn: AdamW with moments and a step of each slot's own, and isolated training.

    trainer = Trainer(spec, config, device)
    trainer.step(active, bank, gradient, rates)                         # from the bank's own gradients
    trainer.step_all([addresses(active, bank), ...], [gradient, ...], rates)   # of many banks, in one launch
    trainer.reconstruct(x, view, active, bank, loss, rates)             # isolated seeds learn to give their chunk back

`step` is one launch, which also looks whether gradients are finite, and so is `step_all`. `reconstruct` is two:
`train` sums errors and gradients over ranges of rows, as `backward` of `morphc.kernels.gradient` does, and counts the
slots' steps; `adamw` adds the sums up in a fixed order and steps the slots. Nothing of a slot that doesn't train moves.
`morphc.kernels.reference.train` and `.adamw` say what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import is_
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from morphc.errors import UnsupportedKernelError
from morphc.kernels import codegen, gradient, ladder, launch
from morphc.kernels.active import Precision, target_of
from morphc.kernels.codegen import Source
from morphc.kernels.compile import Job
from morphc.kernels.layout import View
from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.kernels.templating import cdiv, next_pow2

DEPTH: Final = 8
FLOATS: Final = 256
ADAMW_WARPS: Final = 4


SCALARS: Final = (
    "lr", "keep", "mean_keep", "mean_rate", "mean_log", "square_keep", "square_rate", "square_log", "eps",
)  # fmt: skip
"""What `Rates.scalars` are called in the kernels."""


class Rates(NamedTuple):
    """The numbers of AdamW."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    @property
    def scalars(self) -> tuple[float, ...]:
        """As the kernel takes them: worked out here in double precision, where 1 - beta keeps its digits."""
        moments = [(beta, 1 - beta, math.log(beta) if beta else -math.inf) for beta in self.betas]
        return (self.lr, 1 - self.lr * self.weight_decay, *moments[0], *moments[1], self.eps)


Addresses = tuple[int, ...]


class Bank(NamedTuple):
    """What a step reads and writes of a bank; all [K, ...] and contiguous, float32, `step` int64."""

    params: Sequence[Tensor]
    means: Sequence[Tensor]
    squares: Sequence[Tensor]
    step: Tensor


class Variant(NamedTuple):
    """What a launch depends on that isn't known before the call."""

    live: bool
    even: bool
    stride: int
    wide: bool
    aligned: bool


@lru_cache(maxsize=256)
def source(spec: KernelSpec, interpreted: bool) -> Source:
    """The file of `train` and `adamw`. Raises UnsupportedKernelError where there are no gradients for `spec`."""
    if reason := gradient.refuses(spec):
        raise UnsupportedKernelError(f"{spec.name}: {reason}")
    return codegen.render(
        "train.py.jinja",
        spec,
        params=gradient.params_of(spec),
        per_slot=gradient.row_size(spec, extra=1),
        dense_columns=0,
        interpreted=interpreted,
    )


def refuses(spec: KernelSpec) -> str:
    """Why `train` has no kernel for `spec`, or an empty string; `adamw` may have one all the same."""
    if reason := gradient.refuses(spec):
        return reason
    crowded = spec.blueprint == "bottleneck" and spec.chunk > gradient.CROWDED
    if crowded and spec.dtype == "float32":
        return (
            f"isolated training over chunks of {spec.chunk} features in float32 takes more registers than a thread "
            f"has; use more seeds, for chunks of {gradient.CROWDED} at most"
        )
    return ""


def default(spec: KernelSpec, rows: int) -> TuneConfig:
    """A config where none was tuned: what won on an H200, for what else the backward's."""
    plain = (
        spec.blueprint == "bottleneck" and spec.dtype != "float32" and spec.blend not in ("multiply", "gate")
    )
    if plain and next_pow2(spec.rank) <= 16 and spec.chunk in (2, 64) and rows * spec.slots >= 1 << 14:
        group = 4 if spec.chunk == 2 else 1
        return TuneConfig(64, group * spec.chunk, 4, 3, group=group, programs=4 if group > 1 else 2)
    return gradient.default(spec, rows)


def train_job(
    spec: KernelSpec,
    config: TuneConfig,
    variant: Variant | None = None,
    *,
    precision: Precision = "tf32x3",
    target: str = "cuda:90",
) -> Job:
    """`train` as `compile_all` and `launch.prepare` take it. target: `cpu` for the interpreter.

    Raises UnsupportedKernelError where `refuses` names a reason.
    """
    if reason := refuses(spec):
        raise UnsupportedKernelError(f"{spec.name}: {reason}")
    variant = variant or Variant(False, False, 16, False, True)
    item = f"*{launch.triton_type(getattr(torch, spec.dtype))}"
    params = {f"{param.name}_ptr": "*fp32" for param in gradient.params_of(spec)}
    pointers = {"x_ptr": item, "list_ptr": "*i32", **params, "partial_ptr": "*fp32"}
    numbers = dict.fromkeys(("rows", "stride", "inner", "workers", "least"), "i32")
    constants = gradient.tile_of(spec, config).constants | {
        "LIVE": int(variant.live),
        "EVEN": int(variant.even),
        "STRIDE": variant.stride,
        "WIDE": int(variant.wide),
        "FAST": int(target.startswith("cuda") and spec.dtype != "float32"),
        "PRECISION": gradient.precision_of(spec, precision, target),
    }
    return Job(
        source(spec, target == "cpu"),
        "train",
        pointers | {"step_ptr": "*i64"} | numbers,
        constants,
        list(pointers) if variant.aligned else [],
        gradient.options_of(config, target),
        target,
    )


def adamw_job(
    spec: KernelSpec,
    config: TuneConfig,
    *,
    wide: bool = False,
    early: bool = False,
    target: str = "cuda:90",
) -> Job:
    """`adamw` as `compile_all` and `launch.prepare` take it."""
    signature = {"list_ptr": "*i32", "partial_ptr": "*fp32", "loss_ptr": "*fp32"}
    for param in gradient.params_of(spec):
        for what in ("", "mean_", "square_"):
            signature[f"{param.name}_{what}ptr"] = "*fp32"
    signature["step_ptr"] = "*i64"
    signature |= dict.fromkeys(SCALARS, "fp32")
    signature |= dict.fromkeys(("rows", "inner", "workers", "least"), "i32")
    tile = gradient.tile_of(spec, config)
    constants = {
        "ROWS": tile.rows,
        "GROUP": tile.group,
        "WIDE": int(wide),
        "DEPTH": DEPTH,
        "FLOATS": _floats(spec, FLOATS),
        "EARLY": int(early),
    }
    options = {"num_warps": ADAMW_WARPS}
    return Job(source(spec, target == "cpu"), "adamw", signature, constants, (), options, target)


def step_job(
    spec: KernelSpec, *, together: bool = False, scaled: bool = False, target: str = "cuda:90"
) -> Job:
    """`step` as `compile_all` and `launch.prepare` take it, or `step_all`."""
    if together:
        signature = {"table_ptr": "*i64", "gradients_ptr": "*i64", "loss_scale_ptr": "*fp32"}
    else:
        signature = {
            "list_ptr": "*i32",
            "step_ptr": "*i64",
            "gradient_ptr": "*fp32",
            "loss_scale_ptr": "*fp32",
        }
        for param in gradient.params_of(spec):
            for what in ("", "mean_", "square_"):
                signature[f"{param.name}_{what}ptr"] = "*fp32"
    signature |= dict.fromkeys(SCALARS, "fp32")
    # A program does all floats of a slot, so it takes many at once.
    constants = {"FLOATS": _floats(spec, 4 * FLOATS), "SCALED": int(scaled)}
    function = "step_all" if together else "step"
    options = {"num_warps": ADAMW_WARPS}
    if target.startswith("cuda"):
        options["maxnreg"] = (
            255  # left alone, ptxas spills two or three registers to have a rounder number of them
        )
    return Job(source(spec, target == "cpu"), function, signature, constants, (), options, target)


def _floats(spec: KernelSpec, most: int) -> int:
    """Floats of a slot that a program does at a time."""
    return min(most, next_pow2(gradient.row_size(spec, extra=1)))


class Trainer:
    """The training of one spec with one config on one device; kernels are compiled when first called for.

    behind: configs to go on to where one spills.
    """

    __slots__ = (
        "banks",
        "behind",
        "config",
        "device",
        "precision",
        "spec",
        "steppers",
        "sums",
        "table",
        "tile",
        "variants",
        "workers",
    )

    def __init__(
        self,
        spec: KernelSpec,
        config: TuneConfig | None,
        device: torch.device,
        precision: Precision = "tf32x3",
        behind: Sequence[TuneConfig] = (),
    ) -> None:
        self.spec = spec
        self.device = device
        self.precision = precision
        self.behind = behind
        # The banks of the last `step_all`, and their addresses on the device.
        self.banks: tuple[Addresses, ...] = ()
        self.table = torch.empty(0, dtype=torch.int64)
        self.steppers: dict[tuple[bool, bool], launch.Prepared] = {}
        self._take(config or default(spec, 1))
        source(spec, device.type == "cpu")

    def _take(self, config: TuneConfig) -> None:
        """Go by `config` from now on."""
        self.config = config
        self.tile = gradient.tile_of(self.spec, config)
        self.workers = launch.multiprocessors(self.device) * max(1, config.programs)
        self.variants: dict[Variant, launch.Prepared] = {}
        self.sums: dict[bool, launch.Prepared] = {}

    def step(
        self, active: Tensor, bank: Bank, gradient: Tensor, rates: Rates, scale: Tensor | None = None
    ) -> None:
        """AdamW of every slot that trains, listed or not; one with a gradient that isn't finite stays as it is.

        gradient: of the bank's parameters, flat, see `morphc.kernels.gradient.sections`. scale: what the loss was
        multiplied by, one float32 on the device.
        """
        given = gradient if scale is None else scale
        kernel = self._stepper(False, scale is not None)
        tensors = (active, bank.step, gradient, given, *_tensors(bank))
        kernel.launch((self.spec.slots, 1, 1), *tensors, *rates.scalars)

    def step_all(
        self,
        banks: Sequence[Addresses],
        gradients: Sequence[Tensor],
        rates: Rates,
        scale: Tensor | None = None,
    ) -> None:
        """`step` of many banks of this spec. Not while a CUDA graph is captured, whose replays find no addresses."""
        if len(banks) != len(self.banks) or not all(map(is_, banks, self.banks)):
            self.table = self._uploaded(banks)
            self.banks = tuple(banks)
        given = self._uploaded([gradient.data_ptr() for gradient in gradients])
        kernel = self._stepper(True, scale is not None)
        scaling = given if scale is None else scale
        kernel.launch((self.spec.slots, len(banks), 1), self.table, given, scaling, *rates.scalars)

    def _uploaded(self, numbers: Sequence[Any]) -> Tensor:
        # From memory that is not pinned, the copy would wait for all that the device has to do.
        made = torch.tensor(numbers, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return made.to(self.device, non_blocking=True)

    def reconstruct(
        self,
        x: Tensor,
        view: View,
        active: Tensor,
        bank: Bank,
        loss: Tensor,
        rates: Rates,
        *,
        live: bool = True,
    ) -> None:
        """One step of all isolated seeds towards giving their own chunk back.

        x: the activation, or with `live=False` the chunks of it that the forward saved; view: of the activation.
        loss: [K] float32, written for the slots of isolated seeds; where it isn't finite the slot stays as it is.
        """
        if not view.rows:
            return
        even, blocks = gradient.blocks_of(self.spec, view, self.tile.rows)
        least = gradient.least_of(self.config, blocks)
        groups = cdiv(self.spec.slots, self.tile.group)
        workers = min(self.workers, blocks * groups)
        size = (workers + groups) * self.tile.group * gradient.row_size(self.spec, extra=1)
        partial = torch.empty(size, dtype=torch.float32, device=self.device)
        bits = 0
        for tensor in (x, active, *bank.params, partial):
            bits |= tensor.data_ptr()
        inner = view.inner if self.spec.layout == "channels_first" else 0
        stride = gradient.common_power(view.stride, inner)
        wide = gradient.is_wide(self.tile, self.spec, view, blocks)
        variant = Variant(live, even, stride, wide, bits % 16 == 0)
        kernel = self.variants.get(variant) or self._prepare(variant)
        if kernel is None:
            self.reconstruct(x, view, active, bank, loss, rates, live=live)
            return
        numbers = (view.rows, view.stride, view.inner, workers, least)
        kernel.launch((workers, 1, 1), x, active, *bank.params, partial, bank.step, *numbers)
        across = cdiv(gradient.row_size(self.spec, extra=1), _floats(self.spec, FLOATS))
        arguments = (*_tensors(bank), bank.step, *rates.scalars, view.rows, view.inner, workers, least)
        self._adamw(wide).launch((across, self.spec.slots, 1), active, partial, loss, *arguments)

    def _prepare(self, variant: Variant) -> launch.Prepared | None:
        """The kernel of a variant; None where it spilled, and another config has been taken instead."""
        target = target_of(self.device)

        def prepare(config: TuneConfig) -> launch.Prepared:
            job = train_job(self.spec, config, variant, precision=self.precision, target=target)
            return launch.prepare_job(job, self.device)

        config, prepared = ladder.first_clean(self.config, self.behind, prepare)
        if config != self.config:
            self.behind = self.behind[self.behind.index(config) + 1 :]
            self._take(config)
            return None
        self.variants[variant] = prepared
        return prepared

    def _adamw(self, wide: bool) -> launch.Prepared:
        if wide not in self.sums:
            early, target = gradient.follows_early(self.device), target_of(self.device)
            job = adamw_job(self.spec, self.config, wide=wide, early=early, target=target)
            self.sums[wide] = launch.prepare_job(job, self.device, pdl=early)
        return self.sums[wide]

    def _stepper(self, together: bool, scaled: bool) -> launch.Prepared:
        key = together, scaled
        if key not in self.steppers:
            job = step_job(self.spec, together=together, scaled=scaled, target=target_of(self.device))
            self.steppers[key] = launch.prepare_job(job, self.device)
        return self.steppers[key]


def _tensors(bank: Bank) -> list[Tensor]:
    found: list[Tensor] = []
    for each in zip(bank.params, bank.means, bank.squares, strict=True):
        found += each
    return found


def addresses(active: Tensor, bank: Bank) -> Addresses:
    """What `Trainer.step_all` takes of a bank. Who asks for them keeps the tensors."""
    return tuple(tensor.data_ptr() for tensor in (active, bank.step, *_tensors(bank)))


def bank_of(bank: Any, names: Sequence[str]) -> Bank:
    """The tensors of a slot bank (`morphc.runtime.bank.SlotBank`), in the order of its parameters."""
    # Not by `get_parameter` and its like, which take longer than the launch.
    params: Mapping[str, Tensor] = bank._parameters
    moments: Mapping[str, Tensor] = bank.opt._buffers
    return Bank(
        [params[name] for name in names],
        [moments[f"exp_avg_{name}"] for name in names],
        [moments[f"exp_avg_sq_{name}"] for name in names],
        moments["step"],
    )
