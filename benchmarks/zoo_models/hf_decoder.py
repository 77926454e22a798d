"""transformers: decoder-only language models."""

from __future__ import annotations

from typing import Any

from .hf import GENERATES, SMALL, entry
from .registry import masked_ids

GPT = {
    "vocab_size": 96,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
# Enough for the mask to matter: a row of the batch ends in padding.
TOKENS: dict[str, Any] = {"length": 12, "other_length": 7, "extras": GENERATES}


def decoder(name: str, model_class: str, config_class: str, options: dict[str, Any], **rest: Any) -> None:
    """One causal language model."""
    entry(name, "decoder", model_class, config_class, masked_ids, options=options, **{**TOKENS, **rest})


decoder("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT)
decoder(
    "gpt2_classifier", "GPT2ForSequenceClassification", "GPT2Config", {**GPT, "pad_token_id": 0}, extras=()
)
decoder("gpt_neo", "GPTNeoForCausalLM", "GPTNeoConfig", {
    "vocab_size": 96, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96,
    "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "window_size": 8,
    "bos_token_id": 1, "eos_token_id": 2,
})  # fmt: skip
decoder("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", {**SMALL, "hidden_dropout": 0.1})
decoder("gptj", "GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 8, "resid_pdrop": 0.1})
decoder("codegen", "CodeGenForCausalLM", "CodeGenConfig", {**GPT, "rotary_dim": 8, "n_ctx": 64})
decoder("llama", "LlamaForCausalLM", "LlamaConfig", {**GQA, "attention_dropout": 0.1})
decoder("llama_tied", "LlamaForCausalLM", "LlamaConfig", {**GQA, "tie_word_embeddings": True})
decoder("llama_eager", "LlamaForCausalLM", "LlamaConfig", {
    **GQA, "attn_implementation": "eager", "attention_bias": True,
}, extras=("generate",))  # fmt: skip
decoder("mistral", "MistralForCausalLM", "MistralConfig", {**GQA, "sliding_window": 8})
decoder("qwen2", "Qwen2ForCausalLM", "Qwen2Config", GQA)
decoder("qwen3", "Qwen3ForCausalLM", "Qwen3Config", GQA)
decoder("gemma", "GemmaForCausalLM", "GemmaConfig", GQA)
decoder(
    "gemma2", "Gemma2ForCausalLM", "Gemma2Config", {**GQA, "sliding_window": 8, "query_pre_attn_scalar": 16}
)
decoder("phi", "PhiForCausalLM", "PhiConfig", {**SMALL, "resid_pdrop": 0.1})
decoder("phi3", "Phi3ForCausalLM", "Phi3Config", {**GQA, "resid_pdrop": 0.1})
decoder("opt", "OPTForCausalLM", "OPTConfig", {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 32})
decoder("bloom", "BloomForCausalLM", "BloomConfig", {
    "vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
})  # fmt: skip
decoder(
    "falcon", "FalconForCausalLM", "FalconConfig", {**SMALL, "hidden_dropout": 0.1, "ffn_hidden_size": 96}
)
decoder("mpt", "MptForCausalLM", "MptConfig", {
    "vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2,
})  # fmt: skip
decoder("stablelm", "StableLmForCausalLM", "StableLmConfig", {**SMALL, "num_key_value_heads": 4})
decoder("olmo2", "Olmo2ForCausalLM", "Olmo2Config", GQA)
decoder("cohere", "CohereForCausalLM", "CohereConfig", GQA)
decoder("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", {**GQA, "residual_dropout": 0.1})
decoder("xglm", "XGLMForCausalLM", "XGLMConfig", {
    "vocab_size": 96, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
})  # fmt: skip
decoder("xlnet", "XLNetLMHeadModel", "XLNetConfig", {
    "vocab_size": 96, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}, extras=("save_pretrained",))  # fmt: skip
