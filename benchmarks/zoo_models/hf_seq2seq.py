"""transformers: encoder-decoders."""

from __future__ import annotations

from typing import Any

import torch

from .hf import GENERATES, entry
from .registry import Inputs, ids

TOKENS: dict[str, Any] = {"length": 12, "other_length": 8, "extras": GENERATES}
BART = {
    "vocab_size": 96,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": 96,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def pair(batch: int, length: int) -> Inputs:
    """Source ids and a shorter target."""
    return (), {"input_ids": ids(batch, length), "decoder_input_ids": ids(batch, length - 3)}


def translation(batch: int, length: int) -> Inputs:
    """Source ids and labels; the target is the labels shifted, with ignored positions at the end."""
    labels = ids(batch, length - 2)
    labels[0, -1] = -100
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -1] = 0
    return (), {"input_ids": ids(batch, length), "attention_mask": mask, "labels": labels}


def seq2seq(name: str, model_class: str, config_class: str, options: dict[str, Any], **rest: Any) -> None:
    """One encoder-decoder."""
    inputs = rest.pop("inputs", pair)
    entry(name, "encoder-decoder", model_class, config_class, inputs, options=options, **{**TOKENS, **rest})


seq2seq("t5", "T5ForConditionalGeneration", "T5Config", T5, inputs=translation)
seq2seq("t5_gated", "T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"})
seq2seq("mt5", "MT5Model", "MT5Config", T5, extras=())
seq2seq("longt5", "LongT5ForConditionalGeneration", "LongT5Config", {**T5, "local_radius": 4})
seq2seq("bart", "BartForConditionalGeneration", "BartConfig", BART, inputs=translation)
seq2seq("mbart", "MBartForConditionalGeneration", "MBartConfig", BART)
seq2seq("pegasus", "PegasusForConditionalGeneration", "PegasusConfig", {**BART, "encoder_layerdrop": 0.5})
seq2seq("m2m100", "M2M100ForConditionalGeneration", "M2M100Config", BART)
seq2seq("marian", "MarianMTModel", "MarianConfig", {**BART, "decoder_vocab_size": 96})
seq2seq("blenderbot", "BlenderbotForConditionalGeneration", "BlenderbotConfig", BART)
seq2seq("led", "LEDForConditionalGeneration", "LEDConfig", {
    **BART, "attention_window": 4, "max_encoder_position_embeddings": 64,
    "max_decoder_position_embeddings": 64,
}, extras=("save_pretrained",))  # fmt: skip
seq2seq("prophetnet", "ProphetNetModel", "ProphetNetConfig", {
    "vocab_size": 96, "hidden_size": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    "max_position_embeddings": 64, "ngram": 2, "num_buckets": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}, extras=())  # fmt: skip
