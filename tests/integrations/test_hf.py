"""GrowCallback in transformers' Trainer."""

from __future__ import annotations

import shutil

import pytest
import torch

import morphc
from morphc import Lifecycle
from morphc.errors import CheckpointError, ConfigError, NotMorphedError
from morphc.grow.controllers import Germinate

transformers = pytest.importorskip(
    "transformers", reason="the Trainer is transformers': pip install 'morphc[hf]'"
)

from morphc.integrations.hf import GrowCallback  # noqa: E402

SITE = "transformer.h.0.mlp.c_proj"
FAST = {
    "minimum_ticks": (3, 2, 1, 1, 2),
    "graft_ticks": 2,
    "min_isolated_improvement": -1.0,
    "min_contribution": -10.0,
    "cull_contribution": -20.0,
    "min_improvement": -1.0,
    "min_stability": 0.0,
    "min_final_stability": 0.0,
}
IDS = (torch.arange(32).unsqueeze(1) * 5 + torch.arange(12)) % 16
DATA = [{"input_ids": row, "labels": row} for row in IDS]


def host() -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"resid_pdrop": 0.1, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=16, n_positions=12, n_embd=16, n_layer=1, n_head=2, **options)
    return transformers.GPT2LMHeadModel(config)


def grown(**options) -> torch.nn.Module:
    config = morphc.Config(
        **{"seeds_per_layer": 2, "slots": 2, "rank": 4, "blueprint": "widen", **FAST, **options}
    )
    return morphc.compile(host(), (), {"input_ids": IDS[:2], "labels": IDS[:2]}, config=config)


def loss_of(model: torch.nn.Module) -> float:
    return float(model(input_ids=IDS, labels=IDS).loss)


def arguments(folder, **options):
    chosen = {
        "max_steps": 40,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "learning_rate": 3e-3,
        "logging_strategy": "no",
        "save_steps": 16,
        "eval_strategy": "steps",
        "eval_steps": 8,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **{**chosen, **options})


def callback(**options) -> GrowCallback:
    controller = morphc.ScheduleController([(4, Germinate(SITE, (0,), candidates=2))])
    return GrowCallback(controller, loss_of, tick_every=2, **options)


def trainer_of(folder, model, call=None, **options):
    return transformers.Trainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=DATA,
        eval_dataset=DATA[:8],
        callbacks=[call] if call is not None else [],
    )


def test_a_seed_grows_and_a_resume_goes_on_bit_for_bit(tmp_path):
    moves = []
    call = callback(on_event=lambda event: moves.extend(t.target for t in event.transitions if t))
    trainer = trainer_of(tmp_path, grown(), call)
    trainer.train()
    assert moves == [Lifecycle(number) for number in range(1, 8)]
    assert call.grower.steps == 40
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert call.grower.metrics == evaluated
    assert len(evaluated) == 5

    again, other = grown(), callback()
    trainer_of(tmp_path, again, other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert other.grower.metrics == evaluated
    assert other.grower.losses.state_dict() == call.grower.losses.state_dict()

    folded = morphc.fold(trainer.model)
    assert type(folded) is type(host())
    trainer.model.eval()
    torch.testing.assert_close(folded.eval()(IDS).logits, trainer.model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_same_by_either_way_and_with_accumulation_what_backward_was_given(tmp_path):
    found = []
    for given in (False, True):
        trainer = trainer_of(tmp_path, grown(), max_steps=4, save_strategy="no")
        call = callback(trainer=trainer if given else None)
        trainer.add_callback(call)
        trainer.train()
        found.append((list(call.grower.losses.ticks), trainer.state.log_history[-1]["train_loss"]))
    (ticks, reported), (other, _) = found
    assert ticks == pytest.approx(other, rel=1e-6)
    # The Trainer reports the sum over the two parts of a step, each backward was given one of them.
    assert 2 * sum(ticks) / len(ticks) == pytest.approx(reported, rel=1e-5)


def test_a_loss_outside_of_the_model_needs_the_trainer(tmp_path):
    options = {"label_smoothing_factor": 0.1, "max_steps": 4, "save_strategy": "no", "eval_strategy": "no"}
    with pytest.raises(ConfigError, match="trainer=trainer"):
        trainer_of(tmp_path, grown(), callback(), **options).train()
    trainer = trainer_of(tmp_path, grown(), None, **options)
    call = callback(trainer=trainer)
    trainer.add_callback(call)
    trainer.train()
    assert call.grower.steps == 4


def test_a_compiled_graph_needs_the_trainer_too_and_grows(tmp_path):
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "save_strategy": "no"}
    trainer = trainer_of(tmp_path, grown(), eval_strategy="no", **options)
    call = callback(trainer=trainer)
    trainer.add_callback(call)
    trainer.train()
    assert call.grower.seeds[SITE].lifecycle[0] == Lifecycle.FOSSILIZED


def test_a_model_that_can_not_grow_is_refused_at_once(tmp_path):
    with pytest.raises(
        NotMorphedError, match=r"the Trainer's model, a GPT2LMHeadModel, carries no seeds.*compile"
    ):
        trainer_of(tmp_path, host(), callback())
    bare = grown(blueprint="depthwise")
    with pytest.raises(ConfigError, match="no slot for any of them"):
        trainer_of(tmp_path, bare, callback())


def test_an_optimizer_of_something_else_is_refused(tmp_path):
    optimizer = torch.optim.AdamW(host().parameters())
    trainer = transformers.Trainer(
        model=grown(),
        args=arguments(tmp_path),
        train_dataset=DATA,
        eval_dataset=DATA,
        optimizers=(optimizer, None),
        callbacks=[callback()],
    )
    with pytest.raises(ConfigError, match="trains none of the"):
        trainer.train()


def test_a_metric_that_is_not_there_is_named(tmp_path):
    options = {"max_steps": 2, "eval_steps": 1, "save_strategy": "no"}
    with pytest.raises(ConfigError, match=r"metric='eval_accuracy' isn't among .* eval_loss"):
        trainer_of(tmp_path, grown(), callback(metric="accuracy"), **options).train()


def test_a_checkpoint_without_its_state_of_growth_is_refused(tmp_path):
    trainer_of(tmp_path, grown(), callback(), max_steps=16).train()
    place = tmp_path / "checkpoint-16"
    shutil.move(place / "morphc", tmp_path / "elsewhere" / "morphc")
    with pytest.raises(CheckpointError, match="resume_from="):
        trainer_of(tmp_path, grown(), callback()).train(resume_from_checkpoint=str(place))
    call = callback(resume_from=tmp_path / "elsewhere")
    trainer_of(tmp_path, grown(), call, max_steps=20).train(resume_from_checkpoint=str(place))
    assert call.grower.steps == 20


def test_a_rollback_lets_the_schedule_go_on(tmp_path):
    trainer = trainer_of(tmp_path, grown(), save_strategy="no")
    step, told = trainer.training_step, []

    def poisoned(*args, **kwargs):
        loss = step(*args, **kwargs)
        grafts = not told and Lifecycle.GRAFTING in call.grower.seeds.lifecycle.tolist()
        return loss * float("nan") if grafts else loss

    trainer.training_step = poisoned
    call = callback(trainer=trainer, on_event=lambda event: told.append(event) if event.rolled_back else None)
    trainer.add_callback(call)
    trainer.train()
    (event,) = told
    assert event.rolled_back == "a loss of nan"
    assert event.rewound_to < event.step
    assert trainer.state.global_step == 40
    assert call.grower.steps == 40 - (event.step - event.rewound_to)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0  # a linear schedule ends there
    assert Lifecycle.FINE_TUNING not in call.grower.seeds.lifecycle.tolist()


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    call = callback()
    trainer = trainer_of(tmp_path, grown(), call)
    monkeypatch.setattr(type(trainer.args), "n_gpu", property(lambda args: 2))
    with pytest.raises(ConfigError, match="torchrun"):
        call.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=None)


def test_the_best_model_comes_back_with_its_seeds(tmp_path):
    options = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    trainer = trainer_of(tmp_path, grown(), callback(), save_steps=8, **options)
    trainer.train()
    assert trainer.state.best_global_step == 8  # the worst, to be told from the last
    states = morphc.seeds(trainer.model)
    assert states[SITE].lifecycle.tolist() == [Lifecycle.TRAINING, Lifecycle.DORMANT]
    assert states[SITE].mode.name == "TRAINING"
    assert all(
        site.lifecycle.tolist() == [Lifecycle.DORMANT] * 2
        for path, site in states.sites.items()
        if path != SITE
    )
