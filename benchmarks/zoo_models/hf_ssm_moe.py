"""transformers: state-space and recurrent models, and mixtures of experts."""

from __future__ import annotations

from typing import Any

from .hf import GENERATES, SMALL, entry
from .registry import ids, token_ids

TOKENS: dict[str, Any] = {"length": 12, "other_length": 7, "extras": GENERATES}
GQA = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
MAMBA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "state_size": 8,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {**GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def recurrent(name: str, model_class: str, config_class: str, options: dict[str, Any], **rest: Any) -> None:
    """One state-space or recurrent language model."""
    entry(name, "state-space", model_class, config_class, token_ids, options=options, **{**TOKENS, **rest})


def experts(name: str, model_class: str, config_class: str, options: dict[str, Any], **rest: Any) -> None:
    """One mixture of experts."""
    inputs = rest.pop("inputs", token_ids)
    entry(
        name, "mixture-of-experts", model_class, config_class, inputs, options=options, **{**TOKENS, **rest}
    )


recurrent("mamba", "MambaForCausalLM", "MambaConfig", MAMBA)
recurrent("falcon_mamba", "FalconMambaForCausalLM", "FalconMambaConfig", MAMBA)
recurrent("mamba2", "Mamba2ForCausalLM", "Mamba2Config", {
    **MAMBA, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 4,
})  # fmt: skip
recurrent("recurrent_gemma", "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", {
    **GQA, "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 8,
})  # fmt: skip
recurrent("rwkv", "RwkvForCausalLM", "RwkvConfig", {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64,
    "intermediate_size": 96, "context_length": 32, "bos_token_id": 1, "eos_token_id": 2,
    "use_cache": False,
}, extras=("save_pretrained",))  # fmt: skip
recurrent("jamba", "JambaForCausalLM", "JambaConfig", {
    **GQA, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
}, extras=())  # fmt: skip
recurrent("bamba", "BambaForCausalLM", "BambaConfig", {
    **GQA, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8,
    "mamba_chunk_size": 4, "mamba_n_groups": 1,
}, extras=())  # fmt: skip

experts(
    "mixtral",
    "MixtralForCausalLM",
    "MixtralConfig",
    {**GQA, "num_local_experts": 4, "router_jitter_noise": 0.1},
)
experts("mixtral_eager", "MixtralForCausalLM", "MixtralConfig", {
    **GQA, "num_local_experts": 4, "experts_implementation": "eager",
})  # fmt: skip
experts("qwen2_moe", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 32})
experts("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", MOE)
experts("olmoe", "OlmoeForCausalLM", "OlmoeConfig", MOE)
experts("phimoe", "PhimoeForCausalLM", "PhimoeConfig", {**GQA, "num_local_experts": 4})
experts("granitemoe", "GraniteMoeForCausalLM", "GraniteMoeConfig", {**GQA, "num_local_experts": 4})
experts("deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", {
    **SMALL, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 16,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}, extras=("generate",))  # fmt: skip
experts("switch_transformers", "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", {
    "vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4,
    "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 64,
    "relative_attention_num_buckets": 8, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}, inputs=lambda batch, length: (
    (), {"input_ids": ids(batch, length), "decoder_input_ids": ids(batch, length - 3)},
), extras=())  # fmt: skip
