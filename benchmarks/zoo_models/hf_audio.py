"""transformers: audio."""

from __future__ import annotations

from typing import Any

from .hf import entry
from .registry import Inputs, floats, ids

WAV2VEC = {
    "vocab_size": 32,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "conv_dim": (32, 32),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
    "pad_token_id": 0,
}
# The feature extractors set `requires_grad` on their input: it may not ask for a gradient already.
LENGTHS: dict[str, Any] = {"length": 400, "other_length": 320, "input_grads": False}


def waves(batch: int, length: int) -> Inputs:
    """Raw audio."""
    return (), {"input_values": floats(batch, length)}


def mel(batch: int, length: int) -> Inputs:
    """Log-mel frames, channels first, and a few target ids."""
    return (), {"input_features": floats(batch, 16, length), "decoder_input_ids": ids(batch, 5)}


def audio(name: str, model_class: str, config_class: str, options: dict[str, Any], **rest: Any) -> None:
    """One audio model."""
    inputs = rest.pop("inputs", waves)
    entry(name, "audio", model_class, config_class, inputs, options=options, **{**LENGTHS, **rest})


audio("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", WAV2VEC, extras=("save_pretrained",),
      note="weight_norm by parametrization; layer drop by the RNG")  # fmt: skip
audio("wav2vec2_stable", "Wav2Vec2Model", "Wav2Vec2Config", {
    **WAV2VEC, "do_stable_layer_norm": True, "feat_extract_norm": "layer",
})  # fmt: skip
audio("hubert", "HubertModel", "HubertConfig", WAV2VEC)
audio("wavlm", "WavLMModel", "WavLMConfig", {**WAV2VEC, "num_buckets": 16})
audio("sew", "SEWModel", "SEWConfig", {**WAV2VEC, "squeeze_factor": 2})
audio("unispeech_classifier", "UniSpeechForSequenceClassification", "UniSpeechConfig", {
    **WAV2VEC, "classifier_proj_size": 32,
})  # fmt: skip
audio("whisper", "WhisperForConditionalGeneration", "WhisperConfig", {
    "vocab_size": 96, "num_mel_bins": 16, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "max_source_positions": 16, "max_target_positions": 16, "dropout": 0.1, "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}, inputs=mel, length=32, other_length=0)  # fmt: skip
audio("ast", "ASTForAudioClassification", "ASTConfig", {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "patch_size": 8,
    "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16, "hidden_dropout_prob": 0.1,
}, inputs=lambda batch, _: ((floats(batch, 32, 16),), {}), length=0, other_length=0)  # fmt: skip
audio("speech_to_text", "Speech2TextForConditionalGeneration", "Speech2TextConfig", {
    "vocab_size": 96, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_conv_layers": 2,
    "conv_kernel_sizes": (5, 5), "conv_channels": 64, "input_feat_per_channel": 16,
    "max_source_positions": 64,
    "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}, inputs=lambda batch, length: (
    (), {"input_features": floats(batch, length, 16), "decoder_input_ids": ids(batch, 5)},
), length=24, other_length=16)  # fmt: skip
audio("encodec", "EncodecModel", "EncodecConfig", {
    "num_filters": 8, "upsampling_ratios": [4, 2], "hidden_size": 16, "codebook_size": 16, "codebook_dim": 16,
    "num_lstm_layers": 1, "num_residual_layers": 1, "target_bandwidths": [1.0], "sampling_rate": 800,
}, inputs=lambda batch, length: ((floats(batch, 1, length),), {}), length=160, other_length=128,
   input_grads=False, note="LSTM, weight_norm, vector quantisation")  # fmt: skip
audio("univnet", "UnivNetModel", "UnivNetConfig", {
    "model_in_channels": 16, "model_hidden_channels": 8, "num_mel_bins": 8, "resblock_kernel_sizes": [3],
    "resblock_stride_sizes": [4], "resblock_dilation_sizes": [[1, 3]], "kernel_predictor_num_blocks": 1,
    "kernel_predictor_hidden_channels": 16,
}, inputs=lambda batch, length: (
    (floats(batch, length, 8),), {"noise_sequence": floats(batch, length, 16)},
), length=10, other_length=6)  # fmt: skip
