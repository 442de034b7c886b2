"""Memory that a size needs: exact bytes of weights, and peak activations from the live set.

d is the network's width, r the rank, L the depth; see shapes in `learngenes.config.Kind`.
Depth and rank may be integers or integer arrays: every function is vectorised over them.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learngenes.config import GROUP, TIME_FREQUENCIES, DType, Kind, Mode, NetworkConfig, Size
from learngenes.sizing.budget import Workload

Ints = NDArray[np.int64]

BYTES_PER_FLOAT32 = 4
TILE_ROWS, TILE_INPUTS, TILE_OUTPUTS = 256, 1024, 64
FLOAT_BYTES = {DType.FLOAT32: 4, DType.BFLOAT16: 2}
HELD = {Kind.ADALN: 1, Kind.QKV: 2, Kind.O: 7, Kind.IN: 3, Kind.OUT: 7}
"""Tensors x that are alive beside each kind's product; see `activation_bytes`."""
SCHEDULE_BYTES = 7 * 1000 * BYTES_PER_FLOAT32
"""Bytes of the thousand-step tables that a diffusers scheduler keeps."""


@dataclass(frozen=True)
class Execution:
    """Mode of a size, dtype of its matrices, and what the device computes in."""

    mode: Mode
    dtype: DType
    native_bfloat16: bool = False
    """Whether the device computes in bfloat16; else everything is computed in float32."""
    packing_threads: int = 0
    """Threads that pack a bfloat16 product's operands into memory of torch's allocator."""

    @property
    def compute_bytes(self) -> int:
        return 2 if self.native_bfloat16 and self.dtype is not DType.FLOAT32 else 4

    def scratch_bytes(
        self, rows: Ints | int, inputs: Ints | int, outputs: Ints | int
    ) -> Ints | int:
        """Most bytes that a bfloat16 product keeps beside its operands while it runs.

        oneDNN packs for each thread a tile of the weight, 64 outputs wide, and sums in float32
        a tile of at most 256 rows.
        """
        if self.packing_threads == 0 or self.compute_bytes == BYTES_PER_FLOAT32:
            return 0
        width = TILE_OUTPUTS * self.packing_threads
        packed = width * np.minimum(inputs, TILE_INPUTS) * self.compute_bytes
        tiles = np.minimum(-(-outputs // TILE_OUTPUTS) * TILE_OUTPUTS, width)
        columns = tiles - (outputs < TILE_OUTPUTS) * (tiles - outputs)
        sums = np.minimum(rows * columns, TILE_ROWS * width) * BYTES_PER_FLOAT32
        return np.asarray(packed + sums + 2048)

    def cast_bytes(self, rows: Ints | int, inputs: Ints | int) -> Ints | int:
        """Bytes of a stored matrix cast to the compute dtype, alive for one product."""
        if self.dtype.bits is not None:
            return rows * -(-inputs // GROUP) * GROUP * self.compute_bytes
        cast = FLOAT_BYTES[self.dtype] != self.compute_bytes
        return rows * inputs * self.compute_bytes if cast else 0

    def unpacking_bytes(self, rows: Ints | int, inputs: Ints | int) -> Ints | int:
        """Bytes beside the cast while it is made: codes that share a byte, one to a byte."""
        if self.dtype.bits is None:
            return 0
        groups = rows * -(-inputs // GROUP)
        return groups * (self.compute_bytes + (0 if self.dtype.bits == 8 else GROUP))

    def matrix_bytes(self, rows: Ints | int, inputs: Ints | int) -> Ints | int:
        """Bytes of a stored matrix (rows, inputs), with the scales of its groups."""
        if self.dtype.bits is not None:
            return rounded_bytes(rows, inputs, self.dtype.bits)
        return rows * inputs * FLOAT_BYTES[self.dtype]


def rounded_bytes(rows: Ints | int, inputs: Ints | int, bits: int) -> Ints | int:
    """Bytes of a matrix (rows, inputs) in few bits: whole groups, each with a bfloat16 scale."""
    return rows * -(-inputs // GROUP) * (GROUP * bits // 8 + 2)


def learngene_parameters(network: NetworkConfig, rank: Ints | int) -> Ints | int:
    """Number of scalars in U and V of every kind: 23 d r, whatever the depth."""
    return rank * sum(sum(kind.shape(network.width)) for kind in Kind)


def scale_parameters(network: NetworkConfig, depth: Ints | int, rank: Ints | int) -> Ints | int:
    """Number of scalars in Sigma and biases, which a model owns: L (5 r + 15 d)."""
    return depth * (len(Kind) * rank + _biases(network))


def dense_parameters(network: NetworkConfig, depth: Ints | int) -> Ints | int:
    """Number of scalars in all W, without biases: 18 L d^2."""
    shapes = [kind.shape(network.width) for kind in Kind]
    return depth * sum(m * n for m, n in shapes)


def stem_parameters(network: NetworkConfig) -> int:
    """Number of scalars in the patch, position, time and class embedders and the final layer."""
    d, patch = network.width, network.patch_values
    patches = patch * d + d + network.tokens * d
    time = TIME_FREQUENCIES * d + d + d * d + d
    classes = (network.num_classes + 1) * d
    final = 2 * d * d + 2 * d + patch * d + patch
    return patches + time + classes + final


def decoder_bytes(network: NetworkConfig) -> int:
    """Bytes of the decoder's weights, in float32; 0 for a network of images."""
    if network.autoencoder is None:
        return 0
    return network.autoencoder.decoder_parameters * BYTES_PER_FLOAT32


def decoding_bytes(network: NetworkConfig, images: int, at_once: int = 1) -> int:
    """Peak bytes while latents are decoded, as many at once as the device decodes that measured
    it, or `at_once`, if that is more: then in proportion."""
    if network.autoencoder is None:
        return 0
    measured = network.autoencoder.decode_bytes
    together = min(images, max(at_once, len(measured)))
    if together > len(measured):
        return measured[-1] * together // len(measured)
    return measured[together - 1]


def weight_bytes(
    network: NetworkConfig, depth: Ints | int, rank: Ints | int, execution: Execution
) -> Ints | int:
    """Bytes of all parameters of a model served alone."""
    compute = execution.compute_bytes
    shapes = [kind.shape(network.width) for kind in Kind]
    stem = stem_parameters(network) * compute + decoder_bytes(network)
    if execution.mode.written_out:
        layer = _biases(network) * compute + sum(execution.matrix_bytes(*s) for s in shapes)
        return stem + depth * layer
    factors: Ints | int = 0
    for m, n in shapes:
        factors = factors + execution.matrix_bytes(m, rank) + execution.matrix_bytes(rank, n)
    return stem + factors + scale_parameters(network, depth, rank) * compute


def activation_bytes(
    network: NetworkConfig, rank: Ints | int, execution: Execution, n: int, rows: Ints | int
) -> Ints:
    """Peak bytes alive inside a denoising step of n images: the widest of a block's moments.

    In units of one (rows x tokens, d) tensor, x, alive are: the residual stream (1), beside
    it from the feed-forward on its sum with attention (2), and the modulated input (+1); in
    attention q, k and v (3), their mix and its copy in rows (2); the 4 d hidden features
    before and after GELU (4 + 4). To these come modulation and conditioning of each row (8 d),
    what each product needs, and the images that the sampler holds: x, a step's prediction and
    what the scheduler makes of them, of both rows when guided. Where latents are decoded in the
    end, that may need more.
    """
    d, e = network.width, execution.compute_bytes
    x = rows * network.tokens * d * e
    axis = (-1, *[1] * max(np.ndim(rows), np.ndim(rank)))  # of the kinds, before rows and ranks
    outputs, inputs, tokens, held = (
        np.array(each, dtype=np.int64).reshape(axis)
        for each in zip(
            *(
                (*kind.shape(d), 1 if kind is Kind.ADALN else network.tokens, tensors)
                for kind, tensors in HELD.items()
            ),
            strict=True,
        )
    )
    products = _product_bytes(outputs, inputs, tokens * rows, rank, execution)
    multiplying = np.max(held * x + products, axis=0)
    embedding = rows * TIME_FREQUENCIES * (BYTES_PER_FLOAT32 + e)
    embedding = embedding + execution.scratch_bytes(rows, TIME_FREQUENCIES, d)
    widest = functools.reduce(np.maximum, (multiplying, x + embedding, 3 * x + 8 * x))
    conditioning = 8 * rows * d * e
    image = network.in_channels * network.sample_size**2 * BYTES_PER_FLOAT32
    images = 4 * rows
    widest = np.maximum(widest + conditioning, decoding_bytes(network, n))
    return np.asarray(widest + images * image + SCHEDULE_BYTES)


def memory_bytes(
    network: NetworkConfig,
    depth: Ints | int,
    rank: Ints | int,
    execution: Execution,
    workload: Workload,
) -> Ints | int:
    """Bytes that the model itself needs on the device: weights, its guide's, peak activations."""
    weights = weight_bytes(network, depth, rank, execution)
    activations = activation_bytes(network, rank, execution, workload.n, workload.rows)
    return weights + guide_bytes(network, execution, workload.guide) + activations


def guide_bytes(network: NetworkConfig, execution: Execution, guide: Size | None) -> int:
    """Bytes of the smaller model that guides, without the stem, which it shares; 0 for none."""
    if guide is None:
        return 0
    stem = stem_parameters(network) * execution.compute_bytes + decoder_bytes(network)
    return int(weight_bytes(network, guide.depth, guide.rank, execution)) - stem


def process_bytes(memory: Ints | int, shared: Ints | int, base_bytes: int) -> Ints | int:
    """Bytes of a process that serves one model; its allocator keeps up to a 20th more."""
    return memory + memory // 20 + base_bytes - shared


def making_bytes(network: NetworkConfig, rank: Ints | int, execution: Execution) -> Ints | int:
    """Peak bytes beside the weights while a model is made: float32 copies of the largest matrix.

    W takes itself and a scaled U before it is stored in another dtype; rounding to few bits keeps
    the best codes so far, those that it tries, and their error in two steps.
    """
    written, rounded = execution.mode.written_out, execution.dtype.bits is not None
    copies = written + (written and execution.dtype is not DType.FLOAT32) + 4 * rounded
    inputs = -(-(network.width if written else rank) // GROUP) * GROUP
    widest = max(max(kind.shape(network.width)) for kind in Kind)
    return 0 * rank + copies * widest * inputs * BYTES_PER_FLOAT32


def loading_bytes(network: NetworkConfig, depth: Ints | int, execution: Execution) -> Ints | int:
    """Bytes of imported layers in float32, of which a process makes what it stores."""
    if execution.mode is not Mode.DENSE or execution.dtype is DType.FLOAT32:
        return 0 * depth
    return dense_parameters(network, depth) * BYTES_PER_FLOAT32


def _product_bytes(m: Ints, n: Ints, rows: Ints, rank: Ints | int, execution: Execution) -> Ints:
    """Most bytes that linear layers (m, n) hold beside their inputs: casts, x V and the output."""
    e = execution.compute_bytes
    out = rows * m * e
    if execution.mode.written_out:
        multiplied = out + execution.scratch_bytes(rows, n, m)
        needed = np.maximum(multiplied, execution.unpacking_bytes(m, n))
        return np.asarray(execution.cast_bytes(m, n) + needed)
    reduced = rows * rank * e
    first = execution.cast_bytes(rank, n) + np.maximum(
        reduced + execution.scratch_bytes(rows, n, rank), execution.unpacking_bytes(rank, n)
    )
    second = execution.cast_bytes(m, rank) + np.maximum(
        out + execution.scratch_bytes(rows, rank, m), execution.unpacking_bytes(m, rank)
    )
    return np.asarray(np.maximum(first, reduced + second))


def _biases(network: NetworkConfig) -> int:
    """Number of biases in one layer: 15 d."""
    return sum(kind.shape(network.width)[0] for kind in Kind)


def shared_bytes(network: NetworkConfig, rank: Ints | int, execution: Execution) -> Ints | int:
    """Bytes that a model shares with its loaded family: stem, decoder, a U of full rank."""
    shared = np.zeros_like(rank) + decoder_bytes(network)
    if execution.compute_bytes == BYTES_PER_FLOAT32:
        shared = shared + stem_parameters(network) * BYTES_PER_FLOAT32
    if execution.mode is Mode.FACTORED and execution.dtype is DType.FLOAT32:
        u = _biases(network) * rank * BYTES_PER_FLOAT32
        shared = shared + np.where(rank == network.rank, u, 0)
    return shared
