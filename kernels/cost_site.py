"""What a site and its host layer move and compute, as formulas in the rows.

Two backends, two models. The Triton kernels read the activation once for telemetry and touch only active
columns in place. The torch backend runs one op after another over temporaries, so what counts there is how
often the activation passes through memory; that number was measured, not derived.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import msgspec

from morphc.kernels.blueprints import base
from morphc.kernels.cost_terms import Cost, Quantity, ceil_div, dtype_bytes

Backend = Literal["torch", "triton"]

# Float32 arithmetic per element of the telemetry's sums: shift 1, sum 1, square and sum 2, row sum 1,
# zeros 2, maximum 2, non-finite 2; and square and sum 2 per row and chunk.
TELEMETRY_FLOPS = 11
TELEMETRY_CHUNK_FLOPS = 2
# 4-byte numbers per chunk that one row split leaves behind, and that the accumulators hold.
TELEMETRY_FIELDS = 8
# Rows that one program of the telemetry kernel walks.
ROWS_PER_SPLIT = 128
# Bytes that a scattered access moves at least. Measured on the H200: 10 % of 1024 chunks of 8 bytes cost what
# 64 bytes each would cost, and chunks of 128 bytes cost no more than they hold.
GRANULE = 64
# Flops of one hidden unit's GELU and its derivative's share, tanh by exp and divide. On the H200 all of 4096
# chunks of 2 at rank 16 (537 M hidden units) take 261 us: 30 flops each at 60 Tflop/s.
HIDDEN_FLOPS = 30
BLEND_FLOPS = {"residual": 2, "lerp": 3, "multiply": 20, "gate": 24}

# The torch backend, fitted by `python benchmarks/calibrate_cost.py` on one thread of a Xeon with torch 2.13, over
# 8x64 to 4096x4096 and chunks of 1 to 256. A pass is one float32 element at the cache's bandwidth; what torch
# does slowly (reductions over a short axis, gathers) counts as the passes that take as long. Telemetry walks
# blocks of rows that stay in the cache: 29.5 passes an element, 111 a row and chunk, 18 ops.
TORCH_TELEMETRY_PASSES = 29
TORCH_TELEMETRY_CHUNK_PASSES = 111
TORCH_TELEMETRY_OPS = 18
# Active seeds: 121 passes an element of the slots' chunks (gathered, masked, blended, scattered), 99 a hidden
# unit, 30 an element of the whole site (which is rebuilt), 17 ops.
TORCH_ACTIVE_PASSES = 121
TORCH_HIDDEN_PASSES = 99
TORCH_WHOLE_PASSES = 30
TORCH_ACTIVE_OPS = 17

# Blueprints without a pointwise function on hidden units, and those whose work is no matmul.
_NO_HIDDEN = frozenset({"affine", "lowrank", "depthwise"})
_NO_MATMUL = frozenset({"affine", "depthwise"})


class SiteShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the cost of a site depends on, besides its rows.

    fused: the host's activation runs in the site's own kernel, which reads the value anyway. owns_input:
    active columns may be written in place, else the whole value is copied. (Both matter to Triton only.)
    tap_features: width of the layer's or block's input. spatial: spatial axes behind a convolution. obstacle:
    why the block can't be widened.
    """

    features: int
    seeds: int
    slots: int = 0
    rank: int = 16
    blueprint: str = "bottleneck"
    blend: str = "residual"
    dtype: str = "float32"
    telemetry_every: int = 16
    telemetry_values: int = 0
    fused: bool = False
    owns_input: bool = False
    tap_features: int = 0
    spatial: int = 0
    conv: base.ConvGeometry | None = None
    activation: str = "gelu"
    gated: bool = False
    obstacle: str = ""

    @property
    def chunk(self) -> int:
        """Width of the widest chunk."""
        return -(-self.features // self.seeds)

    @property
    def geometry(self) -> base.Geometry:
        """The place as blueprints see it; a convolution of unknown extent is taken as 1x1."""
        conv = self.conv
        if conv is None and self.spatial:
            ones, zeros = (1,) * self.spatial, (0,) * self.spatial
            conv = base.ConvGeometry(kernel=ones, stride=ones, padding=zeros, dilation=ones)
        return base.Geometry(
            features=self.features,
            chunk=self.chunk,
            rank=self.rank,
            tap_features=self.tap_features,
            spatial=self.spatial,
            layer_conv=conv,
            block_in=conv,
            block_out=conv,
            activation=self.activation,
            gated=self.gated,
            block_obstacle=self.obstacle,
        )

    def sampled(self, rows: int) -> int:
        """Rows that a sample of telemetry takes."""
        most = ceil_div(self.telemetry_values, self.features) if self.telemetry_values else rows
        return min(rows, most)

    def active_seeds(self, fraction: Fraction) -> int:
        """Seeds that are active when `fraction` of them are: rounded up, and no more than there are slots."""
        wanted = -(-self.seeds * fraction.numerator // fraction.denominator)
        return min(wanted, self.slots) if self.slots else wanted


class HostLayer(msgspec.Struct, frozen=True, kw_only=True):
    """The host layer behind which a site stands.

    kind: one of `Config.kinds`. weights: elements of its weight. stride: input positions per output position
    (product over the axes), or output per input for a transposed convolution. What attention does between its
    projections depends on the sequence's length and is left out, so its cost is a lower bound.
    """

    kind: str
    features: int
    in_features: int
    weights: int
    bias: bool = True
    dtype: str = "float32"
    stride: int = 1
    transposed: bool = False
    conv: base.ConvGeometry | None = None


def telemetry(shape: SiteShape, rows: Quantity, backend: Backend) -> Cost:
    """One sample of the telemetry of a site: what a dormant site does when it is due."""
    elements, chunks = rows * shape.features, rows * shape.seeds
    vector = TELEMETRY_FLOPS * elements + TELEMETRY_CHUNK_FLOPS * chunks
    if backend == "torch":
        row_sums = chunks if shape.seeds < shape.features else 0
        passes = TORCH_TELEMETRY_PASSES * elements + TORCH_TELEMETRY_CHUNK_PASSES * row_sums
        return Cost(read=4 * passes, vector=vector, launches=TORCH_TELEMETRY_OPS)
    partials = ceil_div(rows, ROWS_PER_SPLIT) * shape.seeds * TELEMETRY_FIELDS * 4
    totals = shape.seeds * TELEMETRY_FIELDS * 4
    activation = 0 if shape.fused else elements * dtype_bytes(shape.dtype)
    return Cost(
        read=activation + partials + totals,
        written=partials + totals,
        vector=vector,
        launches=1 if shape.fused else 2,
    )


def dormant(shape: SiteShape, rows: Quantity, backend: Backend, *, due: bool) -> Cost:
    """A dormant site: nothing at all, or one sample of telemetry when that is due."""
    return telemetry(shape, rows, backend) if due and shape.telemetry_every else Cost()


def active(shape: SiteShape, rows: Quantity, backend: Backend, fraction: Fraction) -> Cost:
    """The forward of the active seeds alone, without telemetry.

    The torch backend can't know on the host which slots are in use, so it computes all of them.
    """
    count = shape.active_seeds(fraction)
    if not count:
        return Cost()
    if backend == "torch" and shape.slots:
        count = shape.slots
    blueprint = base.get(shape.blueprint)
    geometry, width = shape.geometry, dtype_bytes(shape.dtype)
    parameters = 4 * count * parameters_of(blueprint, geometry)
    hidden = 0 if blueprint.name in _NO_HIDDEN else count * shape.rank * rows
    columns = rows * min(count * shape.chunk, shape.features)
    work = count * _flops(blueprint, geometry, rows)
    vector = HIDDEN_FLOPS * hidden + BLEND_FLOPS[shape.blend] * columns
    tap = rows * geometry.tap_features * width if blueprint.tap != "chunk" else 0
    matmul = 0 if blueprint.name in _NO_MATMUL else work
    vector = vector + (work - matmul)
    if backend == "torch":
        passes = TORCH_ACTIVE_PASSES * columns + TORCH_HIDDEN_PASSES * hidden
        passes = passes + TORCH_WHOLE_PASSES * rows * shape.features
        return Cost(parameters + tap + 4 * passes, 0, matmul, vector, TORCH_ACTIVE_OPS)
    run = -(-shape.chunk * width // GRANULE) * GRANULE
    whole = shape.features * width
    moved = rows * (min(count * run, whole) if shape.owns_input else whole)
    return Cost(parameters + tap + moved, moved, matmul, vector, 1)


def amortised(shape: SiteShape, rows: Quantity, backend: Backend, fraction: Fraction) -> Cost:
    """One training forward with `fraction` of the seeds active, telemetry spread over `telemetry_every`."""
    every = shape.telemetry_every
    sample = telemetry(shape, rows, backend).times(Fraction(1, every)) if every else Cost()
    return sample + active(shape, rows, backend, fraction)


def host_forward(layer: HostLayer, rows: Quantity) -> Cost:
    """One forward of the host layer over `rows` output rows."""
    width, written = dtype_bytes(layer.dtype), rows * layer.features * dtype_bytes(layer.dtype)
    if layer.kind == "embedding":
        return Cost(read=written + 8 * rows, written=written, launches=1)
    bias = layer.features if layer.bias else 0
    parameters = (layer.weights + bias) * width
    if layer.kind == "norm":
        return Cost(read=written + parameters, written=written, vector=8 * rows * layer.features, launches=1)
    ratio = Fraction(1, layer.stride) if layer.transposed else layer.stride
    positions = rows * ratio if layer.stride != 1 else rows
    return Cost(
        read=positions * layer.in_features * width + parameters,
        written=written,
        matmul=2 * layer.weights * (positions if layer.transposed else rows),
        vector=rows * bias,
        launches=1,
    )


def host_step(layer: HostLayer, rows: Quantity) -> Cost:
    """Forward and backward of the host layer; backward is twice forward (input's and weight's gradient)."""
    return host_forward(layer, rows).times(3)


def parameters_of(blueprint: base.Blueprint, geometry: base.Geometry) -> int:
    """Numbers in one slot of `blueprint`."""
    total = 0
    for shape in blueprint.shapes(geometry).values():
        size = 1
        for extent in shape:
            size *= extent
        total += size
    return total


def _flops(blueprint: base.Blueprint, geometry: base.Geometry, rows: Quantity) -> Quantity:
    if not isinstance(rows, int):
        return blueprint.flops(geometry, rows)
    value = blueprint.flops(geometry, rows)  # written for sympy, but plain arithmetic in the rows
    return value if isinstance(value, int | float) else int(value)
