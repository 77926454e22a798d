"""Growth in the user's own TensorBoard writer, or whatever else has `add_scalar` and `add_histogram`.

log(writer, grower)                  after a tick or an epoch; it reads the device
log(writer, model, step=1000)        without a Grower
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol

from torch import Tensor, nn

from morphc.errors import ConfigError
from morphc.grow.grower import Grower
from morphc.lifecycle import Lifecycle
from morphc.runtime import commands
from morphc.runtime.seeds import Seeds
from morphc.runtime.store import store_of

HISTOGRAMS: Final = ("variance", "dead_fraction", "correlation", "gradient_norm", "saliency")
"""What is shown of a site's seeds, as far as it was measured."""


class Writer(Protocol):
    """`torch.utils.tensorboard.SummaryWriter`, tensorboardX's, or a Lightning logger's `experiment`."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = ..., /) -> Any:
        """One number."""
        ...

    def add_histogram(self, tag: str, values: Any, global_step: int | None = ..., /) -> Any:
        """The distribution of some numbers."""
        ...


def log(
    writer: Writer,
    grown: Grower | nn.Module,
    step: int | None = None,
    *,
    prefix: str = "morphc",
    histograms: bool = True,
) -> None:
    """Write how growth stands at `step`; a Grower's own count of steps where none is given.

    Scalars: `seeds/<STATE>`, how many there are in each state · of a Grower `loss`, the last tick's mean, and
    `stability` · for each seed that holds a slot `<site>[<seed>]/` with `state`, `alpha`, and what was measured of it
    (`isolated_improvement`, `gradient_ratio` and so on). Histograms over a site's seeds: `<site>/` with the health of
    `HISTOGRAMS`, and over what its held slots learned `<site>/<blueprint>/<parameter>`. What isn't finite is left out.
    Raises ConfigError for a writer without these methods or a model without a step, NotMorphedError without seeds.
    """
    for name in ("add_scalar", "add_histogram"):
        if not callable(getattr(writer, name, None)):
            raise ConfigError(
                f"a {type(writer).__name__} has no {name}(tag, value, step); give log() a SummaryWriter, or an object "
                "that has both add_scalar and add_histogram"
            )
    model = grown.model if isinstance(grown, Grower) else grown
    store_of(model)  # says what is missing before anything else does
    if step is None:
        if not isinstance(grown, Grower):
            raise ConfigError(
                "log(writer, model) needs step=, the number of steps so far; a Grower knows it itself"
            )
        step = grown.steps
    for tag, value in scalars(grown):
        if math.isfinite(value):
            writer.add_scalar(f"{prefix}/{tag}", value, step)
    if not histograms:
        return
    for tag, values in distributions(grown):
        finite = values[values.isfinite()]
        if finite.numel():
            writer.add_histogram(f"{prefix}/{tag}", finite, step)


def scalars(grown: Grower | nn.Module) -> Iterator[tuple[str, float]]:
    """(tag, value) of every scalar that `log` writes."""
    store = store_of(grown.model if isinstance(grown, Grower) else grown)
    states = store.mirror()
    for state in Lifecycle:
        yield f"seeds/{state.name}", float((states.lifecycle == int(state)).sum())
    if isinstance(grown, Grower):
        yield "loss", grown.losses.latest
        yield "stability", grown.losses.stability
        learned: Mapping[tuple[str, int], Mapping[str, float]] = grown.learning()
    else:
        learned = {
            (path, seed): known
            for path, site in store.sites.items()
            for seed, known in commands.measured(store, site, states).items()
        }
    for path, site in store.sites.items():
        for seed in range(site.seeds):
            row = site.offset + seed
            if states.slot[row] < 0:
                continue
            yield f"{path}[{seed}]/state", float(states.lifecycle[row])
            known = {**learned.get((path, seed), {}), "alpha": float(states.alpha[row])}
            yield from ((f"{path}[{seed}]/{name}", value) for name, value in known.items())


def distributions(grown: Grower | nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(tag, values) of every histogram that `log` writes, before what isn't finite is left out."""
    model = grown.model if isinstance(grown, Grower) else grown
    health = grown.measuring.health if isinstance(grown, Grower) else Seeds(model).telemetry()
    for path, site in store_of(model).sites.items():
        rows = slice(site.offset, site.offset + site.seeds)
        measured = health["count"][rows] > 0
        for name in HISTOGRAMS:
            yield f"{path}/{name}", health[name][rows][measured]
        for blueprint, bank in site.slots.items():
            held = bank.owner >= 0
            for name in bank.names:
                yield f"{path}/{blueprint}/{name}", bank.get_parameter(name).detach()[held].float().flatten()
