"""Growth inside Lightning's `Trainer`, with automatic and with manual optimization.

trainer = Trainer(callbacks=[GrowCallback(evaluate=validation_loss, metric="val_loss")])
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from morphc.errors import ConfigError, NotMorphedError, did_you_mean
from morphc.grow.controllers import Controller
from morphc.grow.evaluation import Evaluate
from morphc.grow.grower import Event, Grower
from morphc.integrations.common import (
    check_grows,
    check_optimizer,
    hide_slots_from_ddp,
    restore_training_state,
    roots,
    training_state,
)
from morphc.runtime.recycling import Hook


def _callback_class() -> Any:
    """`Callback` of the package that the program uses: `lightning`, or the older name of the same."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        names.reverse()
    for name in names:
        try:
            return import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != name.split(".")[0]:
                raise
    raise ImportError("morphc.integrations.lightning needs Lightning: pip install 'morphc[lightning]'")


Callback = _callback_class()


class GrowCallback(Callback):  # type: ignore[misc, valid-type]
    """A `Grower` that Lightning drives; `grower` from the beginning of `fit` on.

    controller, evaluate, better, tick_every, on_recycle: as for `Grower`; `evaluate` is given the compiled model, which
    need not be the LightningModule. module: path of the compiled model inside the LightningModule, where there is more
    than one. optimizer: number of the one whose steps count, where more than one trains the compiled model. metric:
    what of `callback_metrics` is told to `Grower.epoch` after a validation. on_event: called with every Event in
    which something happened.

    The slots step at the end of a batch in which the optimizer has stepped. With manual optimization `training_step`
    has to return the loss, and gradients are to be cleared before `backward`, not after `step`. Seeds, slots and the
    Grower are in Lightning's checkpoints. A schedule isn't rewound by a rollback, since Lightning's steps aren't.
    """

    def __init__(
        self,
        controller: Controller | None = None,
        evaluate: Evaluate | None = None,
        *,
        module: str | None = None,
        optimizer: int | None = None,
        metric: str | None = None,
        better: Literal["lower", "higher"] = "lower",
        tick_every: int = 16,
        on_recycle: Hook | None = None,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        self.controller, self.evaluate, self.on_event = controller, evaluate, on_event
        self.module, self.optimizer, self.metric = module, optimizer, metric
        self.options: dict[str, Any] = {"tick_every": tick_every, "better": better, "on_recycle": on_recycle}
        self.grower: Grower | None = None
        self._losses: list[Tensor] = []
        self._saved: Mapping[str, Any] | None = None
        self._steps = 0
        self._stepped = False
        self._hook: Any = None

    # -- Lightning's hooks -------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before a strategy wraps the LightningModule: DDP leaves the slots to the Grower."""
        hide_slots_from_ddp(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the Grower; in a resumed run, bring it to where the checkpoint was."""
        model = self._model(pl_module)
        optimizer = self._optimizer(model, trainer.optimizers)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.grower = Grower(model, optimizer, self.controller, self.evaluate, scaler, **self.options)
        self._losses.clear()
        self._steps, self._stepped = trainer.global_step, False
        if len(trainer.optimizers) > 1:
            # `global_step` counts the steps of all of them.
            self._hook = optimizer.register_step_post_hook(self._note_step)
        if self._saved:
            restore_training_state(self.grower, self._saved)
            self._saved = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The slots' step, while the gradients are there."""
        assert self.grower is not None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach().reshape(()))
        stepped = self._stepped if self._hook is not None else trainer.global_step > self._steps
        if not stepped:
            return
        self._steps, self._stepped = trainer.global_step, False
        if not self._losses:
            if pl_module.automatic_optimization:
                return  # the batch was skipped: training_step gave None
            raise ConfigError(
                f"{type(pl_module).__name__}.training_step returns no loss; with manual optimization return it, or a "
                "dict with 'loss', for the Grower to see"
            )
        mean = torch.stack(self._losses).mean()
        self._losses.clear()
        self._tell(self.grower.step(mean))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """The metric of a validation while fitting."""
        if self.metric is None or self.grower is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.metric not in trainer.callback_metrics:
            raise ConfigError(
                f"metric={self.metric!r} isn't among what was logged."
                f"{did_you_mean(self.metric, trainer.callback_metrics)}"
            )
        self._tell(self.grower.epoch(trainer.callback_metrics[self.metric]))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the hook off the optimizer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint: seeds, slots and the Grower."""
        return training_state(self.grower) if self.grower is not None else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep it until the optimizers are there."""
        self._saved = state_dict

    # -- helpers ------------------------------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        if event and self.on_event is not None:
            self.on_event(event)

    def _note_step(self, *_: Any) -> None:
        self._stepped = True

    def _model(self, pl_module: nn.Module) -> nn.Module:
        name = type(pl_module).__name__
        found = roots(pl_module)
        if not found:
            raise NotMorphedError(
                f"{name} holds no model with seeds; give it one: self.net = morphc.compile(net, example_inputs)"
            )
        if self.module is None and len(found) > 1:
            raise ConfigError(
                f"{name} holds {len(found)} compiled models; name one: module={' or '.join(map(repr, found))}"
            )
        path = next(iter(found)) if self.module is None else self.module
        if path not in found:
            raise ConfigError(f"{name} has no compiled model at module={path!r}.{did_you_mean(path, found)}")
        check_grows(found[path], f"{name}.{path}" if path else name)
        return found[path]

    def _optimizer(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> torch.optim.Optimizer:
        if self.optimizer is not None and not 0 <= self.optimizer < len(optimizers):
            raise ConfigError(f"optimizer={self.optimizer} is none of the {len(optimizers)} optimizers")
        if self.optimizer is not None or len(optimizers) == 1:
            chosen = optimizers[self.optimizer or 0]
            check_optimizer(model, chosen, "the optimizer")
            return chosen
        mine = {id(param) for param in model.parameters()}
        held = [
            number
            for number, optimizer in enumerate(optimizers)
            if any(id(param) in mine for group in optimizer.param_groups for param in group["params"])
        ]
        if len(held) != 1:
            raise ConfigError(
                f"{len(held)} of the {len(optimizers)} optimizers train the compiled model; name the one whose steps "
                f"count: optimizer={' or '.join(map(str, held)) or '...'}"
            )
        return optimizers[held[0]]
