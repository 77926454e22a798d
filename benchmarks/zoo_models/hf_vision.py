"""transformers: vision."""

from __future__ import annotations

from typing import Any

from .hf import entry
from .registry import pixels

VIT = {
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "hidden_dropout_prob": 0.1,
}
CONV_PYRAMID = {"num_channels": 3, "hidden_sizes": [16, 64], "depths": [1, 1]}


def vision(name: str, model_class: str, config_class: str, options: dict[str, Any], **rest: Any) -> None:
    """One image model on 32x32 pictures."""
    inputs = rest.pop("inputs", pixels(3, 32))
    entry(name, "vision", model_class, config_class, inputs, options=options, **rest)


# Convolutional hosts take any side: the length is the side.
SIDES: dict[str, Any] = {"inputs": pixels(3), "length": 32, "other_length": 48}

vision("vit", "ViTForImageClassification", "ViTConfig", VIT, extras=("save_pretrained",))
vision("deit", "DeiTForImageClassification", "DeiTConfig", VIT)
vision("beit", "BeitModel", "BeitConfig", {
    **VIT, "use_relative_position_bias": True, "layer_scale_init_value": 0.1, "drop_path_rate": 0.2,
})  # fmt: skip
vision("swin", "SwinForImageClassification", "SwinConfig", {
    "image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.2,
})  # fmt: skip
vision("swinv2", "Swinv2Model", "Swinv2Config", {
    "image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4],
    "window_size": 4,
})  # fmt: skip
vision("convnext", "ConvNextForImageClassification", "ConvNextConfig", {
    **CONV_PYRAMID, "num_stages": 2, "drop_path_rate": 0.2,
}, **SIDES)  # fmt: skip
vision("resnet", "ResNetForImageClassification", "ResNetConfig", {
    **CONV_PYRAMID, "embedding_size": 16, "layer_type": "bottleneck",
}, **SIDES)  # fmt: skip
vision("regnet", "RegNetForImageClassification", "RegNetConfig", {
    **CONV_PYRAMID, "embedding_size": 16, "groups_width": 16,
}, **SIDES)  # fmt: skip
vision("mobilenet_v2", "MobileNetV2ForImageClassification", "MobileNetV2Config", {
    "image_size": 32, "depth_multiplier": 0.25,
}, **SIDES)  # fmt: skip
vision("segformer", "SegformerForSemanticSegmentation", "SegformerConfig", {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 64],
    "patch_sizes": [7, 3],
    "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 32,
}, **SIDES)  # fmt: skip
vision("poolformer", "PoolFormerForImageClassification", "PoolFormerConfig", {
    "hidden_sizes": [16, 64], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3],
    "strides": [4, 2],
    "padding": [2, 1],
}, **SIDES)  # fmt: skip
vision("dinov2", "Dinov2Model", "Dinov2Config", {**VIT, "patch_size": 8, "use_swiglu_ffn": True})
vision("vit_mae", "ViTMAEModel", "ViTMAEConfig", {**VIT, "mask_ratio": 0.5},
       note="drops patches by random noise, in eval mode too")  # fmt: skip
vision("mobilevit", "MobileViTModel", "MobileViTConfig", {
    "image_size": 32, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64],
    "num_attention_heads": 2,
}, **SIDES)  # fmt: skip
vision("levit", "LevitForImageClassification", "LevitConfig", {
    "image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
    "key_dim": [8, 8, 8], "patch_size": 16,
}, inputs=pixels(3, 64), modes=("train",),
   note="eval mode keeps a part of the autograd graph for the next call")  # fmt: skip
vision("dpt", "DPTForDepthEstimation", "DPTConfig", {
    **VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 16, 16, 16],
    "fusion_hidden_size": 16, "is_hybrid": False, "reassemble_factors": [4, 2, 1, 0.5],
})  # fmt: skip
vision(
    "yolos",
    "YolosForObjectDetection",
    "YolosConfig",
    {**VIT, "image_size": [32, 32], "num_detection_tokens": 4},
)
