"""The functions of a step, compiled before the first request where the device gains by it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from learngenes.device import compiled, padded, varying
from learngenes.stepping import arithmetic
from learngenes.stepping.arithmetic import BLOCK_KINDS
from learngenes.stepping.lanes import Lanes
from learngenes.stepping.schedules import COLUMNS
from learngenes.stepping.weights import SharedWeights


@dataclass(frozen=True)
class Kernels:
    """The functions of `arithmetic` that a step calls, as they are or compiled, and their lanes."""

    embed: Callable[..., Tensor] = arithmetic.embed
    materialised_block: Callable[..., Tensor] = arithmetic.materialised_block
    factored_block: Callable[..., Tensor] = arithmetic.factored_block
    finish: Callable[..., tuple[Tensor, Tensor]] = arithmetic.finish
    lanes: Lanes = field(default_factory=Lanes)

    @classmethod
    def compiled(cls, device: torch.device) -> "Kernels":
        lanes = Lanes.of(device)
        return cls(
            compiled(arithmetic.embed, device, lanes.threads),
            compiled(arithmetic.materialised_block, device, lanes.threads),
            compiled(arithmetic.factored_block, device, lanes.threads),
            compiled(arithmetic.finish, device, lanes.threads),
            lanes,
        )

    @property
    def are_compiled(self) -> bool:
        return self.embed is not arithmetic.embed

    def warm_up(self, shared: SharedWeights) -> None:
        """Compile whatever a batch of this family and dtype can call.

        torch.compile makes a kernel of its own for a size of one, so each is called with one
        model, row or image and with several (and for tensors that are the same one, so none are);
        all other sizes that vary are marked.
        """
        network, dtype = shared.network, shared.compute
        d, t = network.width, network.tokens
        picture = (network.in_channels, network.sample_size, network.sample_size)

        def zeros(*shape: int, dtype: torch.dtype = dtype, dims: tuple[int, ...] = (0,)) -> Tensor:
            return varying(torch.zeros(shape, dtype=dtype, device=shared.device), dims)

        few = padded(1, shared.device)
        for rows in (few, 6):
            self.embed(zeros(rows, *picture, dtype=torch.float32), *shared.embedder)
        for models, rows in ((1, few), (1, 6), (3, 1), (3, 4)):
            self.materialised_block(
                zeros(models, rows, t, d, dims=(0, 1)),
                zeros(models, rows, 6 * d, dims=(0, 1)),
                tuple(zeros(models, n, m) for m, n in (kind.shape(d) for kind in BLOCK_KINDS)),
                zeros(models, 9 * d),
                shared.heads,
            )
        rank = min(5, network.rank)
        for rows in (few, 6):
            self.factored_block(
                zeros(rows, t, d),
                zeros(rows, 6 * d),
                shared.block_factors,
                zeros(rows, len(BLOCK_KINDS), rank, dims=(0, 2)),
                zeros(rows, 9 * d),
                shared.heads,
            )
        for rows, images in ((few, 1), (6, 1), (6, 3)):
            shapes: tuple[tuple[int, ...], ...] = (picture, picture, (len(COLUMNS),), ())
            self.finish(
                zeros(rows, t, d),
                varying(zeros(rows, 6 * d)[:, : 2 * d], (0,)),
                *shared.final,
                *(zeros(images, *shape, dtype=torch.float32) for shape in shapes),
                *(zeros(images, dtype=torch.long) for _ in range(2)),
            )
