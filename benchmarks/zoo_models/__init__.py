"""The zoo: small hosts of many kinds. `ENTRIES` maps a name to its `Entry`."""

from . import (
    hf_audio,
    hf_decoder,
    hf_encoder,
    hf_multimodal,
    hf_seq2seq,
    hf_ssm_moe,
    hf_vision,
    own_containers,
    own_control,
    own_functional,
    own_networks,
    own_special,
    own_state,
    torch_nn,
)
from .registry import ENTRIES, Entry, seed_everything

__all__ = [
    "ENTRIES",
    "Entry",
    "hf_audio",
    "hf_decoder",
    "hf_encoder",
    "hf_multimodal",
    "hf_seq2seq",
    "hf_ssm_moe",
    "hf_vision",
    "own_containers",
    "own_control",
    "own_functional",
    "own_networks",
    "own_special",
    "own_state",
    "seed_everything",
    "torch_nn",
]
