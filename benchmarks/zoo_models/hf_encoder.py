"""transformers: encoders."""

from __future__ import annotations

from typing import Any

import torch

from .hf import SMALL, entry
from .registry import Inputs, ids, masked_ids, token_ids

TOKENS: dict[str, Any] = {"length": 16, "other_length": 8}
BERT = {**SMALL, "type_vocab_size": 2}


def encoder(name: str, model_class: str, config_class: str, options: dict[str, Any], **rest: Any) -> None:
    """One encoder, fed with ids and a mask."""
    inputs = rest.pop("inputs", masked_ids)
    entry(name, "encoder", model_class, config_class, inputs, options=options, **{**TOKENS, **rest})


def labelled(batch: int, length: int) -> Inputs:
    """Ids, segments, and a label a row: the output holds a loss."""
    tokens = ids(batch, length)
    segments = torch.zeros_like(tokens)
    segments[:, length // 2 :] = 1
    return (), {"input_ids": tokens, "token_type_ids": segments, "labels": torch.arange(batch) % 2}


def global_mask(batch: int, length: int) -> Inputs:
    """Ids with global attention on the first token."""
    tokens = ids(batch, length)
    everywhere = torch.zeros_like(tokens)
    everywhere[:, 0] = 1
    return (), {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "global_attention_mask": everywhere,
    }


encoder("bert", "BertModel", "BertConfig", BERT, extras=("save_pretrained",))
encoder("bert_mlm", "BertForMaskedLM", "BertConfig", BERT)
encoder("bert_classifier", "BertForSequenceClassification", "BertConfig", BERT, inputs=labelled)
encoder("roberta", "RobertaModel", "RobertaConfig", {**BERT, "max_position_embeddings": 80})
encoder("albert", "AlbertModel", "AlbertConfig", {**BERT, "embedding_size": 32, "hidden_dropout_prob": 0.1},
        note="one group of weights, run in every layer")  # fmt: skip
encoder("electra", "ElectraForPreTraining", "ElectraConfig", {**BERT, "embedding_size": 32})
encoder("distilbert", "DistilBertForSequenceClassification", "DistilBertConfig", {
    "vocab_size": 96, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "max_position_embeddings": 64,
    "pad_token_id": 0,
})  # fmt: skip
encoder("deberta", "DebertaModel", "DebertaConfig", {
    **BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16,
})  # fmt: skip
encoder("deberta_v2", "DebertaV2Model", "DebertaV2Config", {
    **BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True,
    "position_buckets": 8, "norm_rel_ebd": "layer_norm",
})  # fmt: skip
encoder("mpnet", "MPNetModel", "MPNetConfig", {**SMALL, "max_position_embeddings": 80})
encoder("funnel", "FunnelModel", "FunnelConfig", {
    "vocab_size": 96, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 64, "n_head": 4,
    "d_head": 16,
    "d_inner": 96,
})  # fmt: skip
encoder(
    "longformer", "LongformerModel", "LongformerConfig", {**BERT, "attention_window": 4}, inputs=global_mask
)
encoder("big_bird", "BigBirdModel", "BigBirdConfig", {**BERT, "attention_type": "original_full"})
encoder("squeezebert", "SqueezeBertModel", "SqueezeBertConfig", {
    **BERT, "embedding_size": 64, "q_groups": 2, "k_groups": 2, "v_groups": 2, "post_attention_groups": 1,
    "intermediate_groups": 2, "output_groups": 2,
})  # fmt: skip
encoder("mobilebert", "MobileBertModel", "MobileBertConfig", {
    **BERT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32,
})  # fmt: skip
encoder("modernbert", "ModernBertModel", "ModernBertConfig", {
    **SMALL, "global_attn_every_n_layers": 2, "local_attention": 8, "mlp_dropout": 0.1, "cls_token_id": 1,
    "sep_token_id": 2,
})  # fmt: skip
encoder("roformer", "RoFormerModel", "RoFormerConfig", {**BERT, "embedding_size": 64})
encoder("convbert", "ConvBertModel", "ConvBertConfig", {**BERT, "embedding_size": 64, "conv_kernel_size": 3})
encoder("nystromformer", "NystromformerModel", "NystromformerConfig", {
    **BERT, "num_landmarks": 4, "segment_means_seq_len": 16, "conv_kernel_size": 5,
}, inputs=token_ids, other_length=0)  # fmt: skip
encoder("fnet", "FNetModel", "FNetConfig", {**BERT, "tpu_short_seq_length": 16}, inputs=token_ids)
encoder("canine", "CanineModel", "CanineConfig", {
    **{k: v for k, v in BERT.items() if k != "vocab_size"}, "type_vocab_size": 4, "num_hash_functions": 4,
    "num_hash_buckets": 32, "local_transformer_stride": 8, "downsampling_rate": 4,
}, length=32, other_length=24)  # fmt: skip
encoder("xlm_roberta_token", "XLMRobertaForTokenClassification", "XLMRobertaConfig", {
    **BERT, "max_position_embeddings": 80, "num_labels": 5,
})  # fmt: skip
