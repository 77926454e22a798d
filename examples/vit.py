"""A vision transformer from transformers with random weights, watched at every Linear and at the patch convolution."""

import torch
from transformers import ViTConfig, ViTForImageClassification

torch.manual_seed(0)
model = ViTForImageClassification(
    ViTConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
)
example_kwargs = {"pixel_values": torch.randn(4, 3, 32, 32)}


def main() -> None:
    import morphc

    grown = morphc.compile(model, example_kwargs=example_kwargs)
    print(morphc.report(grown))
    print(f"logits: {list(grown(**example_kwargs).logits.shape)}")


if __name__ == "__main__":
    main()
