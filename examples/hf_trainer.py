"""A small GPT-2 that grows inside transformers' Trainer: `python examples/hf_trainer.py`, some seconds on a CPU.

The Trainer accumulates, clips, evaluates and makes its own AdamW; the callback does the rest. What comes out in the
end is a plain GPT-2 again, wider where it grew.
"""

import tempfile

import torch
import transformers

STEPS, LENGTH, MODULUS = 240, 16, 48
MLP = "transformer.h.0.mlp.c_proj"

torch.manual_seed(0)
model = transformers.GPT2LMHeadModel(
    transformers.GPT2Config(
        vocab_size=64,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
)
example_kwargs = {"input_ids": torch.zeros(2, LENGTH, dtype=torch.long), "use_cache": False}


def progressions(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Rows a, a + d, a + 2d ... modulo `MODULUS`, which the model is to continue."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(MODULUS, (count, 1), generator=draw)
    stride = torch.randint(1, 5, (count, 1), generator=draw)
    rows = (start + stride * torch.arange(LENGTH)) % MODULUS
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    import morphc
    from morphc.grow.controllers import Germinate
    from morphc.integrations.hf import GrowCallback

    # Ticks are shortened: a run of this size has no time for the defaults.
    config = morphc.Config(
        seeds_per_layer=4,
        slots=4,
        rank=16,
        blueprint="widen",
        minimum_ticks=(6, 4, 2, 2, 12),
        graft_ticks=4,
        min_isolated_improvement=0.0,  # most of a language model's gradient is noise, which no seed can take away
        min_final_stability=0.5,
    )
    grown = morphc.compile(model, (), example_kwargs, config=config)
    train, held_out = progressions(512, seed=1), progressions(64, seed=2)
    batch = torch.stack([row["input_ids"] for row in held_out])

    def validation_loss(net: torch.nn.Module) -> float:
        return float(net(input_ids=batch, labels=batch).loss)

    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=grown,
            args=transformers.TrainingArguments(
                output_dir=folder,
                max_steps=STEPS,
                per_device_train_batch_size=16,
                gradient_accumulation_steps=2,
                max_grad_norm=1.0,
                learning_rate=1e-2,
                eval_strategy="steps",
                eval_steps=40,
                save_steps=120,
                logging_strategy="no",
                report_to=[],
                dataloader_pin_memory=False,
                disable_tqdm=True,
            ),
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=[
                GrowCallback(
                    morphc.ScheduleController(
                        [(step, Germinate(MLP, (seed,), candidates=2)) for seed, step in enumerate((20, 80))]
                    ),
                    validation_loss,
                    metric="eval_loss",
                    tick_every=2,
                    on_event=lambda event: [
                        print(f"step {event.step:4d}  {t}") for t in event.transitions if t
                    ],
                )
            ],
        )
        trainer.train()
    plain = morphc.fold(trainer.model)
    plain.eval()
    print(
        f"\nfolded: {type(plain).__name__}, {sum(p.numel() for p in plain.parameters())} parameters", end=", "
    )
    with torch.no_grad():
        print(
            f"validation loss {validation_loss(plain):.4f}, as grown {validation_loss(trainer.model.eval()):.4f}"
        )


if __name__ == "__main__":
    main()
