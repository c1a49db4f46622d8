"""Rows of the model's layers as diffusers has them: q, k and v apart, the halves of some modulations exchanged."""

# O out features, R rank

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from sd3pipe.adapters.targets import QKV_PARTS

Rows: TypeAlias = Callable[[Tensor], Tensor]  # some of a tensor's rows, or all in another order

PATCH_AXES = (-1, 2, 2)  # of the patch embedder, a 2 x 2 convolution, whose factors files keep with those axes


def rows_of_part(index: int) -> Rows:
    """Returns what takes the rows of q (0), k (1) or v (2) from those of a fused layer."""
    return lambda tensor: tensor.chunk(QKV_PARTS)[index]


def swapped_halves(tensor: Tensor) -> Tensor:
    """Returns the rows with their two halves exchanged."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def block_diagonal(blocks: Mapping[int, Tensor], rows: int) -> Tensor:
    """Returns the blocks of q, k and v on one diagonal; a missing one leaves its rows zero and adds no column."""
    any_block = next(iter(blocks.values()))
    return torch.block_diag(*(blocks.get(index, any_block.new_zeros(rows, 0)) for index in range(QKV_PARTS)))


def diagonal_blocks(up_OR: Tensor) -> list[Tensor] | None:
    """Returns the three equal diagonal blocks of a matrix whose other entries are all zero, else None."""
    rows, ranks = up_OR.shape
    if rows % QKV_PARTS or ranks % QKV_PARTS:
        return None
    blocks = [row.chunk(QKV_PARTS, dim=1)[i] for i, row in enumerate(up_OR.chunk(QKV_PARTS))]
    return blocks if torch.equal(torch.block_diag(*blocks), up_OR) else None
