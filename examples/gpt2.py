"""GPT-2 from transformers with random weights (nothing is downloaded): compile, train a step, generate, save.

`morphc compile examples/gpt2.py -o out/gpt2` writes the plan, the regions as readable Python and a report page.
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
config = GPT2Config(
    n_layer=4, n_head=4, n_embd=256, vocab_size=1024, n_positions=128, bos_token_id=0, eos_token_id=0
)
model = GPT2LMHeadModel(config)
example_inputs = (torch.randint(1, 1024, (4, 128)),)


def main() -> None:
    import morphc

    grown = morphc.compile(model, example_inputs, config=morphc.Config(seeds_per_layer=128))
    print(morphc.report(grown))

    ids = example_inputs[0]
    loss = grown(ids, labels=ids).loss
    loss.backward()
    print(
        f"loss {loss.item():.3f}, and the host's parameters have gradients: {model.lm_head.weight.grad is not None}"
    )

    text = grown.generate(ids[:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)
    print(f"generate still works: {text.shape[1]} tokens")
    with tempfile.TemporaryDirectory() as folder:
        morphc.fold(grown).save_pretrained(folder)
        again = GPT2LMHeadModel.from_pretrained(folder)
    print(f"folded, saved and loaded as a plain {type(again).__name__}")


if __name__ == "__main__":
    main()
