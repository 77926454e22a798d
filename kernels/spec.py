"""What a kernel is made from: a pure function of a layer's shape, not of the layer."""

from __future__ import annotations

import hashlib
import re
from typing import Final, Literal

import msgspec

from morphc.errors import ConfigError

# Why a blueprint that reads an input can't stand behind a transposed convolution.
TRANSPOSED = "the layer is a transposed convolution, whose input lies on another grid than its output"

Layout = Literal["last", "channels_first", "channels_last"]


class KernelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kernel to generate. Equal layers give equal specs and so share a kernel.

    `chunk` is the widest chunk of the site (`features` in `seeds` chunks as `torch.tensor_split` cuts them);
    rows are symbolic and so not part of it. `arch` is e.g. `cuda:90`, or `any` where nothing was asked for.
    """

    kind: str
    features: int
    seeds: int
    chunk: int
    slots: int
    rank: int
    blueprint: str
    blend: str
    epilogue: str | None
    layout: Layout
    dtype: str
    arch: str = "any"

    @property
    def name(self) -> str:
        """Readable and derived from the fields: `forward_bottleneck_h4096_s1024_k64_r16_bf16`.

        What a kernel hasn't got is left out (`telemetry_h4096_s1024_bf16`, `lifecycle_int32`), and so is what most
        have: the blend `residual`, features last, no epilogue.
        """
        short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
        numbers = {"h": self.features, "s": self.seeds, "k": self.slots, "r": self.rank}
        parts = [self.kind, self.blueprint, "" if self.blend == "residual" else self.blend]
        parts += [f"{letter}{number}" for letter, number in numbers.items() if number]
        parts += [
            short.get(self.dtype, self.dtype),
            "" if self.layout == "last" else self.layout,
            self.epilogue or "",
        ]
        return "_".join(part for part in parts if part)

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON, hex."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()

    @classmethod
    def from_name(cls, name: str) -> KernelSpec:
        """Inverse of `name`; `arch` is `any`. Raises ConfigError for what is no kernel's name."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ConfigError(
                f"{name!r} is no kernel's name; one is forward_bottleneck_h4096_s1024_k64_r16_bf16, "
                "telemetry_h4096_s1024_bf16"
            )
        long = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
        numbers = {letter: int(match[letter] or 0) for letter in "hskr"}
        told = {
            "kind": match["kind"],
            "features": numbers["h"],
            "seeds": numbers["s"],
            "chunk": -(-numbers["h"] // numbers["s"]) if numbers["s"] else 0,
            "slots": numbers["k"],
            "rank": numbers["r"],
            "blueprint": match["blueprint"] or "",
            "blend": match["blend"] or ("residual" if match["blueprint"] else ""),
            "epilogue": match["epilogue"],
            "layout": match["layout"] or "last",
            "dtype": long.get(match["dtype"], match["dtype"]),
        }
        return msgspec.convert(told, cls)


# A user's blueprint may have any name, so what is known of the others is asked for first.
_NAME = re.compile(
    r"(?P<kind>active_list|lifecycle_requests|tap_backward|[a-z]+)"
    r"(?:_(?P<blueprint>[A-Za-z0-9_-]+?))??(?:_(?P<blend>lerp|multiply|gate))?"
    r"(?:_h(?P<h>\d+))?(?:_s(?P<s>\d+))?(?:_k(?P<k>\d+))?(?:_r(?P<r>\d+))?"
    r"_(?P<dtype>bf16|fp16|fp32|fp64|int32)(?:_(?P<layout>channels_first|channels_last))?(?:_(?P<epilogue>\w+))?"
)


class TuneConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Launch parameters of one kernel; a kind that has no use for one leaves it as it is.

    block_rows, block_cols: tile of one program. num_warps, num_stages: Triton's own. group: listed chunks that
    share a tile (P). programs: grid of a persistent kernel, in programs per multiprocessor. splits: row splits
    of a grid that isn't persistent; 0 leaves them to the host module. maxnreg: cap on registers a thread. units:
    hidden units of a chunk that are walked at a time, pieces: into which the columns of a chunk are cut, of kernels
    that can; 0 leaves them to the host module. lanes: threads that share a row of a small chunk, in kernels that can
    do without matrix products; 0: with them.
    """

    block_rows: int
    block_cols: int
    num_warps: int
    num_stages: int
    group: int = 1
    programs: int = 0
    splits: int = 0
    maxnreg: int | None = None
    units: int = 0
    pieces: int = 0
    lanes: int = 0


NO_BLOCK: Final = "no block is known whose last layer it is (every layer of a block has to be watched)"


class Block(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pair of layers with a pointwise function between: `output(act(norm(inputs[0](x))) [* inputs[1](x)])`.

    `inputs` holds one path, or two for a gated block: first the one that goes through `activation`, then the
    one that is multiplied. `norm` is a BatchNorm between them. `shared` is the width of the hidden axis.
    `obstacle` says why the block can't be widened (a cross-feature op, a second consumer, tied weights);
    empty when it can.
    """

    inputs: tuple[str, ...]
    output: str
    activation: str
    kind: Literal["linear", "gated", "conv"]
    hidden: int
    norm: str | None = None
    obstacle: str = ""
