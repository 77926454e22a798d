"""`Config`: every option of `morphc.compile`, checked where it is made."""

from __future__ import annotations

import math
from typing import Any, Literal, get_type_hints

import msgspec

from morphc.errors import ConfigError, UnknownNameError

SCHEMA_VERSION = 1
KINDS = ("linear", "conv", "norm", "embedding", "attention", "rnn")
BLENDS = ("residual", "lerp", "multiply", "gate")
BACKENDS = ("auto", "torch", "triton")
ISOLATIONS = ("straight_through", "reconstruction")
CURVES = ("linear", "cosine", "sigmoid")
_BOUNDS = (
    "max_reconstruction_loss",
    "min_isolated_improvement",
    "min_contribution",
    "min_stability",
    "cull_contribution",
    "cull_error_rate",
    "min_improvement",
    "min_final_stability",
    "max_drift",
    "min_gradient",
    "max_gradient",
    "rollback_sigma",
    "max_metric_drop",
)
GROWTH = (
    *_BOUNDS,
    "isolation",
    "isolation_every",
    "graft_ticks",
    "graft_curve",
    "graft_patience",
    "minimum_ticks",
    "embargo_ticks",
    "cull_errors",
    "rollback_times",
    "score_weights",
)
"""Options that only a training run reads: they change nothing of what is compiled."""


class _NamesItsFields(msgspec.StructMeta):
    """Turns an unknown option into an error that names the nearest one."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        known = cls.__struct_fields__
        for option in options:
            if option not in known:
                raise UnknownNameError("option", option, known)
        return super().__call__(*args, **options)


class Config(
    msgspec.Struct, metaclass=_NamesItsFields, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """Options of a compiled model.

    seeds_per_layer: seeds of every site: a ceiling (int), a strict `{path pattern: n}`, or `"auto"`.
    slots: slots of every site; None for min(seeds, max(4, 10 %)) within 2 % of the host's memory in all.
    rank: hidden width of a slot's module.
    blueprint: name, or tuple of names, of the modules a slot can hold.
    blend: how an active seed joins its chunk: `residual`, `lerp`, `multiply` or `gate`.
    kinds: which kinds of layer get a site, out of `linear conv norm embedding attention rnn`.
    include, exclude: fnmatch patterns over site paths.
    telemetry_every: sample every n-th training forward; 0 turns telemetry off.
    telemetry_values: a sample of an activation with more values takes each n-th row, n odd, and so about so many; 0
        takes all rows. Where features aren't last in memory, n-th samples of the batch.
    near_zero: |x| at or below it counts as dead (0.0: exact zeros only).
    gradient_telemetry: also sample gradients (one more buffer of the activation's size while it runs).
    seed_lr: factor on the learning rate of the user's first parameter group.
    backend: `torch`, `triton` or `auto`.
    max_overhead: bound of a site's predicted cost over its host layer's, for `seeds_per_layer="auto"`.

    isolation: how a seed learns while the host doesn't see it: `straight_through` (from the task's gradient) or
        `reconstruction` (to give its chunk back; only with blend `lerp`).
    isolation_every: measure a learning seed on every n-th training forward.
    graft_ticks, graft_curve: length of a ramp of alpha, and its form: `linear`, `cosine` or `sigmoid`.
    graft_patience: ticks that a graft may be paused in all before it is given up.
    minimum_ticks: ticks in TRAINING, GRAFTING, STABILIZATION, EVALUATING, FINE_TUNING before a seed may leave.
    embargo_ticks: ticks after a cull or a rollback before the seed may germinate again.
    max_reconstruction_loss ... max_drift, min_gradient, max_gradient: bounds of gates and of grafts, see
        docs/lifecycle.md.
    rollback_sigma, rollback_times, max_metric_drop: what rolls a graft back, see docs/growing.md.
    score_weights: of dead fraction, low variance, correlation, gradient norm and saliency in a seed's score.
    """

    seeds_per_layer: int | dict[str, int] | Literal["auto"] = "auto"
    slots: int | None = None
    rank: int = 16
    blueprint: str | tuple[str, ...] = "bottleneck"
    blend: str = "residual"
    kinds: tuple[str, ...] = ("linear", "conv")
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    telemetry_every: int = 16
    telemetry_values: int = 1 << 23
    near_zero: float = 0.0
    gradient_telemetry: bool = False
    seed_lr: float = 1.0
    backend: str = "auto"
    max_overhead: float = 0.02
    isolation: str = "straight_through"
    isolation_every: int = 4
    graft_ticks: int = 30
    graft_curve: str = "linear"
    graft_patience: int = 200
    minimum_ticks: tuple[int, int, int, int, int] = (100, 50, 20, 30, 50)
    embargo_ticks: int = 100
    max_reconstruction_loss: float = 0.01
    min_isolated_improvement: float = 0.005
    min_contribution: float = 0.0
    min_stability: float = 0.8
    cull_contribution: float = -0.05
    cull_error_rate: float = 0.1
    cull_errors: int = 5
    min_improvement: float = 0.01
    min_final_stability: float = 0.95
    max_drift: float = 0.12
    min_gradient: float = 0.1
    max_gradient: float = 1.0
    rollback_sigma: float = 6.0
    rollback_times: int = 3
    max_metric_drop: float = 0.2
    score_weights: tuple[float, float, float, float, float] = (1.0, 0.5, 0.5, 1.0, 1.0)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for option in ("kinds", "include", "exclude"):
            value = getattr(self, option)
            if isinstance(value, str):
                raise ConfigError(f"{option}={value!r} is one text; write {option}=({value!r},)")
        self._check_types()
        if not self.include:
            raise ConfigError('include=() leaves every layer out; the default is ("*",)')
        spl = self.seeds_per_layer
        counts = spl.items() if isinstance(spl, dict) else [("", spl)] if isinstance(spl, int) else []
        for pattern, count in counts:
            name = f"seeds_per_layer[{pattern!r}]" if pattern else "seeds_per_layer"
            _at_least(name, count, 1, 'give 1 or more, or "auto"; leave a layer out with exclude=')
        if isinstance(spl, str) and spl != "auto":
            raise ConfigError(f'seeds_per_layer={spl!r} is no count; give an int, a dict or "auto"')
        if self.slots is not None:
            _at_least("slots", self.slots, 1, "give 1 or more, or None for the default")
        _at_least("rank", self.rank, 1, "give 1 or more")
        _at_least("telemetry_every", self.telemetry_every, 0, "give 0 (off) or more")
        _at_least("telemetry_values", self.telemetry_values, 0, "give 0 (all rows of any activation) or more")
        for option, value in (("near_zero", self.near_zero), ("seed_lr", self.seed_lr)):
            if not 0.0 <= value < float("inf"):
                raise ConfigError(f"{option}={value!r} must be finite and not negative")
        if not 0.0 < self.max_overhead <= 1.0:
            raise ConfigError(
                f"max_overhead={self.max_overhead!r} must be above 0 and at most 1 (0.02 is 2 %)"
            )
        for kind in self.kinds:
            if kind not in KINDS:
                raise UnknownNameError("kind", kind, KINDS)
        if self.blend not in BLENDS:
            raise UnknownNameError("blend", self.blend, BLENDS)
        if self.backend not in BACKENDS:
            raise UnknownNameError("backend", self.backend, BACKENDS)
        if self.isolation not in ISOLATIONS:
            raise UnknownNameError("isolation", self.isolation, ISOLATIONS)
        if self.graft_curve not in CURVES:
            raise UnknownNameError("graft_curve", self.graft_curve, CURVES)
        if self.isolation == "reconstruction" and self.blend != "lerp":
            raise ConfigError(
                f'isolation="reconstruction" with blend={self.blend!r}: a seed that has learned to give its chunk '
                'back would double it; use blend="lerp", or isolation="straight_through"'
            )
        self._check_lifecycle()
        if not self.blueprints:
            raise ConfigError("blueprint=() names none; name at least one")

    def _check_lifecycle(self) -> None:
        for option in ("isolation_every", "graft_ticks", "rollback_times"):
            _at_least(option, getattr(self, option), 1, "give 1 or more")
        for option in ("graft_patience", "embargo_ticks", "cull_errors"):
            _at_least(option, getattr(self, option), 0, "give 0 or more")
        for ticks in self.minimum_ticks:
            _at_least("minimum_ticks", ticks, 0, "give 0 or more for each of the five states")
        for option in _BOUNDS:
            value = getattr(self, option)
            if not math.isfinite(value):
                raise ConfigError(f"{option}={value!r} is no bound; give a finite number")
        if self.rollback_sigma <= 0 or self.max_metric_drop <= 0:
            raise ConfigError(
                f"rollback_sigma={self.rollback_sigma!r} and max_metric_drop={self.max_metric_drop!r} "
                "must be above 0"
            )
        if not all(0.0 <= weight < math.inf for weight in self.score_weights):
            raise ConfigError(f"score_weights={self.score_weights!r} must be finite and not negative")

    def _check_types(self) -> None:
        hints = get_type_hints(type(self))
        for option in self.__struct_fields__:
            value = getattr(self, option)
            plain = tuple(value) if isinstance(value, list) else value
            try:
                msgspec.convert(plain, hints[option], strict=True)
            except msgspec.ValidationError as error:
                raise ConfigError(f"{option}={value!r} is not of the right type: {error}") from None

    @property
    def blueprints(self) -> tuple[str, ...]:
        """The blueprint names as a tuple."""
        return (self.blueprint,) if isinstance(self.blueprint, str) else self.blueprint

    def to_json(self) -> bytes:
        """Canonical JSON with a schema version."""
        return msgspec.json.encode(self, order="sorted")

    @classmethod
    def from_json(cls, data: bytes | str) -> Config:
        """Inverse of `to_json`. Raises ConfigError naming the field that doesn't fit."""
        try:
            config = msgspec.json.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"not a morphc config: {error}") from error
        if config.schema_version != SCHEMA_VERSION:
            raise ConfigError(
                f"config has schema_version {config.schema_version}, this morphc reads {SCHEMA_VERSION}"
            )
        return config


def _at_least(option: str, value: object, bound: int, way_out: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < bound:
        raise ConfigError(f"{option}={value!r} is not a whole number of at least {bound}; {way_out}")
