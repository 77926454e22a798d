"""Growth inside transformers' `Trainer`.

trainer = Trainer(model=morphc.compile(model, example), args=args, train_dataset=data,
                  callbacks=[GrowCallback(evaluate=validation_loss)])
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from morphc.errors import CheckpointError, ConfigError
from morphc.grow.controllers import Controller
from morphc.grow.evaluation import Evaluate
from morphc.grow.grower import Event, Grower
from morphc.grow.snapshot import MANIFEST, Snapshot
from morphc.integrations.common import (
    check_grows,
    check_optimizer,
    restore_training_state,
    training_state,
)
from morphc.runtime.recycling import Hook

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("morphc.integrations.hf needs transformers: pip install 'morphc[hf]'") from error

FOLDER = "morphc"
"""Inside a checkpoint: what the Trainer doesn't save of a model that grows."""


def checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer keeps the checkpoint of this step."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


class GrowCallback(TrainerCallback):
    """A `Grower` that the Trainer drives; `grower` from the beginning of `train` on.

    controller, evaluate, better, tick_every, on_recycle: as for `Grower`. metric: what of an evaluation's metrics is
    told to `Grower.epoch`. on_event: called with every Event in which something happened. resume_from: the checkpoint
    whose state of growth is loaded on a resume, where it isn't in `output_dir`.
    trainer: needed where the loss isn't the model's own output (`compute_loss_func`, label smoothing, a `compute_loss`
    of yours, `torch_compile`): `trainer.add_callback(GrowCallback(..., trainer=trainer))`.

    The slots step after every step of the optimizer, whatever accumulation, clipping and precision the Trainer does.
    The Trainer's schedule isn't rewound by a rollback, since its steps aren't.
    """

    def __init__(
        self,
        controller: Controller | None = None,
        evaluate: Evaluate | None = None,
        *,
        metric: str = "eval_loss",
        better: Literal["lower", "higher"] = "lower",
        tick_every: int = 16,
        on_recycle: Hook | None = None,
        on_event: Callable[[Event], object] | None = None,
        trainer: Trainer | None = None,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        self.controller, self.evaluate, self.on_event = controller, evaluate, on_event
        self.metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        self.options: dict[str, Any] = {"tick_every": tick_every, "better": better, "on_recycle": on_recycle}
        self.resume_from = resume_from
        self.grower: Grower | None = None
        self._losses: list[Tensor] = []
        self._hook: Any = None
        self._trainer = trainer
        if trainer is not None:
            check_grows(cast(nn.Module, trainer.model), "the Trainer's model")
            vars(trainer)["training_step"] = self._noting(trainer.training_step)

    # -- the loss --------------------------------------------------------------------------------------------

    def _noting(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            loss = step(*args, **kwargs)
            self._losses.append(loss.detach())
            return loss

        return training_step

    def _look(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a forward in training: what `backward` is given is the model's loss times the gradient that comes back
        for it, however the Trainer divides it for accumulation.
        """
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            loss = output[0] if loss is None and output[0].numel() == 1 else loss
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(partial(self._told, loss.detach()))  # type: ignore[no-untyped-call]

    def _told(self, loss: Tensor, gradient: Tensor) -> None:
        assert self.grower is not None
        scale = self.grower.rates.noted.value
        factor = gradient.detach().to(torch.float32)
        if scale is not None:
            factor = factor / scale.to(factor.device)
        self._losses.append((loss * factor).reshape(()))

    # -- the Trainer's events ----------------------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say at once if the model can't grow."""
        check_grows(kwargs["model"], "the Trainer's model")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the Grower, and bring it to where the checkpoint was."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        check_grows(model, "the Trainer's model")
        if args.n_gpu > 1:
            raise ConfigError(
                f"the Trainer sees {args.n_gpu} GPUs in one process and would use DataParallel, whose copies of the "
                "model last one step; start one process a GPU (torchrun), or show it one (CUDA_VISIBLE_DEVICES=0)"
            )
        scaler = getattr(optimizer, "scaler", None)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        check_optimizer(model, optimizer, "the Trainer's optimizer")
        self.grower = Grower(model, optimizer, self.controller, self.evaluate, scaler, **self.options)
        self._losses.clear()
        if self._trainer is None:
            self._unhook()
            self._hook = model.register_forward_hook(self._look)
        if state.global_step:
            self._resume(self.grower, args, state)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The slots' step, while the gradients are there."""
        assert self.grower is not None
        if not self._losses:
            raise ConfigError(
                f"GrowCallback saw no loss in what {type(kwargs['model']).__name__} returns: it is computed outside of "
                "it (compute_loss_func, label smoothing, compute_loss), or in a compiled graph; give the callback the "
                "Trainer: trainer.add_callback(GrowCallback(..., trainer=trainer))"
            )
        loss = torch.stack(self._losses).mean()
        self._losses.clear()
        self._tell(self.grower.step(loss))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The metric of an evaluation while training; of several evaluation sets the one that `metric` names."""
        metrics: Mapping[str, float] = kwargs["metrics"]
        if self.grower is None:
            return
        if self.metric in metrics:
            self._tell(self.grower.epoch(metrics[self.metric]))
            return
        sets = [name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")]
        if sets == ["eval"] or any(self.metric.startswith(f"{name}_") for name in sets):
            raise ConfigError(
                f"metric={self.metric!r} isn't among the evaluation's metrics: {', '.join(sorted(metrics))}"
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Beside the checkpoint's own files: seeds, slots and the Grower."""
        if self.grower is None or not state.is_world_process_zero:
            return
        folder = checkpoint_of(args, state)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} isn't there: no state of growth can be saved for this checkpoint"
            )
        Snapshot({"step": state.global_step, **training_state(self.grower)}).save(folder / FOLDER)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at no more forwards."""
        self._unhook()

    # -- helpers ------------------------------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        if event and self.on_event is not None:
            self.on_event(event)

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _resume(self, grower: Grower, args: TrainingArguments, state: TrainerState) -> None:
        named = [self.resume_from, args.resume_from_checkpoint]
        places = [Path(place) for place in named if isinstance(place, str | os.PathLike)]
        places.append(checkpoint_of(args, state))
        for place in places:
            if (place / FOLDER / MANIFEST).is_file():
                tree = Snapshot.load(place / FOLDER).tree
                if tree["step"] != state.global_step:
                    raise CheckpointError(
                        f"{place / FOLDER} is of step {tree['step']}, the Trainer resumes at {state.global_step}"
                    )
                restore_training_state(grower, tree)
                return
        raise CheckpointError(
            f"the Trainer resumes at step {state.global_step}, and there is no state of growth in "
            f"{' or '.join(str(place) for place in places)}; name the checkpoint: GrowCallback(resume_from=...)"
        )
