"""transformers: several modalities at once."""

from __future__ import annotations

from typing import Any

import torch

from .hf import SMALL, entry
from .registry import Inputs, floats, ids

TEXT = {**SMALL, "vocab_size": 96, "eos_token_id": 95}
VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
IMAGE_TOKEN = 5
PATCHES = 16


def pictures_and_text(batch: int, length: int) -> Inputs:
    """Ids ending in the largest one (CLIP pools there), and pictures."""
    tokens = ids(batch, length, vocab=94)
    tokens[:, -1] = 95
    mask = torch.ones_like(tokens)
    return (), {"input_ids": tokens, "pixel_values": floats(batch, 3, 32, 32), "attention_mask": mask}


def interleaved(batch: int, length: int) -> Inputs:
    """A run of image tokens, then text, as LLaVA expects it."""
    tokens = torch.cat([torch.full((batch, PATCHES), IMAGE_TOKEN), ids(batch, length, low=10)], dim=1)
    return (), {
        "input_ids": tokens,
        "pixel_values": floats(batch, 3, 32, 32),
        "attention_mask": torch.ones_like(tokens),
    }


def multimodal(name: str, model_class: str, config_class: str, options: dict[str, Any], **rest: Any) -> None:
    """One multimodal model."""
    inputs = rest.pop("inputs", pictures_and_text)
    defaults = {"length": 8, "other_length": 6}
    entry(name, "multimodal", model_class, config_class, inputs, options=options, **{**defaults, **rest})


multimodal("clip", "CLIPModel", "CLIPConfig", {
    "text_config": TEXT, "vision_config": VISION, "projection_dim": 32,
}, extras=("save_pretrained",))  # fmt: skip
multimodal("siglip", "SiglipModel", "SiglipConfig", {
    "text_config": {**TEXT, "max_position_embeddings": 8, "projection_size": 64}, "vision_config": VISION,
})  # fmt: skip
multimodal("blip", "BlipForConditionalGeneration", "BlipConfig", {
    "text_config": {**TEXT, "encoder_hidden_size": 64, "projection_dim": 32}, "vision_config": VISION,
})  # fmt: skip
multimodal("vilt", "ViltModel", "ViltConfig", {
    **TEXT, "image_size": 32, "patch_size": 8, "type_vocab_size": 2, "modality_type_vocab_size": 2,
})  # fmt: skip
multimodal("clap_text", "ClapTextModel", "ClapTextConfig", {**TEXT, "max_position_embeddings": 80},
           inputs=lambda batch, length: ((), {"input_ids": ids(batch, length)}))  # fmt: skip
multimodal("chinese_clip", "ChineseCLIPModel", "ChineseCLIPConfig", {
    "text_config": TEXT, "vision_config": VISION, "projection_dim": 32,
})  # fmt: skip
multimodal("llava", "LlavaForConditionalGeneration", "LlavaConfig", {
    "text_config": {"model_type": "llama", **SMALL, "num_key_value_heads": 2},
    "vision_config": {"model_type": "clip_vision_model", **VISION},
    "image_token_index": IMAGE_TOKEN, "vision_feature_layer": -1,
}, inputs=interleaved, note="features of pictures scattered into the embeddings of a Llama")  # fmt: skip
multimodal("visual_bert", "VisualBertModel", "VisualBertConfig", {**TEXT, "visual_embedding_dim": 32},
           inputs=lambda batch, length: ((), {
               "input_ids": ids(batch, length),
               "attention_mask": torch.ones(batch, length, dtype=torch.long),
               "visual_embeds": floats(batch, 4, 32),
               "visual_attention_mask": torch.ones(batch, 4),
               "visual_token_type_ids": torch.ones(batch, 4, dtype=torch.long),
           }))  # fmt: skip
multimodal("lxmert", "LxmertModel", "LxmertConfig", {
    **TEXT, "num_qa_labels": 4, "l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 32,
}, inputs=lambda batch, length: ((), {
    "input_ids": ids(batch, length), "visual_feats": floats(batch, 4, 32), "visual_pos": floats(batch, 4, 4),
}))  # fmt: skip
