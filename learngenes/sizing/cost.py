"""What a size costs: exact parameter bytes, and peak activations from the network's live set.

d is the network's width, r the rank, L the depth; see shapes in `learngenes.config.Kind`.
"""

from dataclasses import dataclass

from learngenes.config import TIME_FREQUENCIES, Kind, Mode, NetworkConfig, Size

BYTES_PER_FLOAT32 = 4
SCHEDULE_BYTES = 4 * 1000 * BYTES_PER_FLOAT32
"""The tables of a thousand-step noise schedule that a diffusers scheduler keeps."""


@dataclass(frozen=True)
class Workload:
    """The sampling that a budget is stated for."""

    n: int = 4
    guided: bool = True

    @property
    def rows(self) -> int:
        """Rows of a forward pass: a guided image needs a second, unconditional one."""
        return self.n * (2 if self.guided else 1)


def learngene_parameters(network: NetworkConfig, rank: int) -> int:
    """U and V of every kind: 23 d r, whatever the depth."""
    return rank * sum(sum(kind.shape(network.width)) for kind in Kind)


def scale_parameters(network: NetworkConfig, size: Size) -> int:
    """Sigma and biases, which a model owns: L (5 r + 15 d)."""
    biases = sum(kind.shape(network.width)[0] for kind in Kind)
    return size.depth * (len(Kind) * size.rank + biases)


def dense_parameters(network: NetworkConfig, depth: int) -> int:
    """Weights written out, and biases: L (18 d^2 + 15 d)."""
    shapes = [kind.shape(network.width) for kind in Kind]
    return depth * sum(m * n + m for m, n in shapes)


def stem_parameters(network: NetworkConfig) -> int:
    """Patch, position, time and class embedders, final layer."""
    d, patch = network.width, network.patch_values
    patches = patch * d + d + network.tokens * d
    time = TIME_FREQUENCIES * d + d + d * d + d
    classes = (network.num_classes + 1) * d
    final = 2 * d * d + 2 * d + patch * d + patch
    return patches + time + classes + final


def weight_bytes(network: NetworkConfig, size: Size, mode: Mode) -> int:
    """Bytes of all parameters of a model served alone, float32."""
    if mode is Mode.MATERIALISED:
        blocks = dense_parameters(network, size.depth)
    else:
        blocks = learngene_parameters(network, size.rank) + scale_parameters(network, size)
    return BYTES_PER_FLOAT32 * (stem_parameters(network) + blocks)


def activation_bytes(network: NetworkConfig, size: Size, mode: Mode, workload: Workload) -> int:
    """Peak bytes alive inside one denoising step.

    The widest moment is in the feed-forward. Alive for each token: the residual stream before
    and after attention and its modulated copy (d each), and the 4 d hidden features before and
    after GELU or, factored, those features and two copies of the r products. Alive for each
    row: modulation (6 d), conditioning and time embedding (d each). The sampler holds a few
    images beside the network.
    """
    d = network.width
    hidden = 8 * d if mode is Mode.MATERIALISED else max(8 * d, 4 * d + 2 * size.rank)
    per_row = network.tokens * (3 * d + hidden) + 8 * d
    image = network.in_channels * network.sample_size**2
    return BYTES_PER_FLOAT32 * (workload.rows * per_row + workload.n * 6 * image) + SCHEDULE_BYTES


def memory_bytes(network: NetworkConfig, size: Size, mode: Mode, workload: Workload) -> int:
    """What the model itself needs on the device: weights and peak activations."""
    return weight_bytes(network, size, mode) + activation_bytes(network, size, mode, workload)


def flops(network: NetworkConfig, size: Size, mode: Mode, workload: Workload) -> int:
    """Floating-point operations of one denoising step (a multiply-add is two)."""
    d, tokens = network.width, network.tokens
    per_layer = 0
    for kind in Kind:
        m, n = kind.shape(d)
        products = m * n if mode is Mode.MATERIALISED else size.rank * (m + n)
        per_layer += products * (1 if kind is Kind.ADALN else tokens)
    per_layer += 2 * tokens * tokens * d  # attention scores and mixing
    stem = 2 * tokens * network.patch_values * d + TIME_FREQUENCIES * d + 3 * d * d
    return 2 * workload.rows * (size.depth * per_layer + stem)
