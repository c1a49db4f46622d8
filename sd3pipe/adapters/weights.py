"""How many weights an adapter trains, and how wide its rank activations are, from sizes and options. Free of torch.

The layers that train a kind (`fresh_layer`) have these shapes; whoever adds a kind adds its shapes here, too.
"""

# in a Kronecker product I = M N in features, O = L K out features, with w1 [L, M] and w2 [K, N]

import math
from typing import TypeAlias

from sd3pipe.adapters.sizes import Sizes
from sd3pipe.adapters.targets import QKV_PARTS, AdapterSpec, target_ranks

Shape: TypeAlias = tuple[int, ...]

_OF_LORA = ("lora", "tlora", "dora")


def trained_shapes(sizes: Sizes, spec: AdapterSpec) -> list[Shape]:
    """Returns the shapes of all weights that an adapter trains on a model whose linear layers have these sizes.

    Raises ParameterError where there is nothing to train, or a rule matches nothing.
    """
    ranks = target_ranks(sizes, spec)
    return [shape for path, rank in ranks.items() for shape in _layer_shapes(path, sizes[path], rank, spec)]


def adapter_weights(sizes: Sizes, spec: AdapterSpec) -> int:
    """Returns how many weights an adapter trains. Raises ParameterError."""
    return sum(map(math.prod, trained_shapes(sizes, spec)))


def activation_rank(spec: AdapterSpec) -> int:
    """Returns how many rank activations a layer has per token, 0 for kinds that are no product of two thin matrices.

    A LoKr's, which are as many as its factors make them, train counts with all else that its layers keep.
    """
    return spec.rank if spec.algorithm in _OF_LORA else 0


def lokr_shapes(out_features: int, in_features: int, rank: int, factor: int) -> dict[str, tuple[int, ...]]:
    """Returns LyCORIS' choice: w1 whole and small; w2 thin where the rank is below half of its longer side."""
    rows_L, rows_K = factor_pair(out_features, factor)
    columns_M, columns_N = factor_pair(in_features, factor)
    if rank < max(rows_K, columns_N) / 2:
        return {"w1": (rows_L, columns_M), "w2_a": (rows_K, rank), "w2_b": (rank, columns_N)}
    return {"w1": (rows_L, columns_M), "w2": (rows_K, columns_N)}


def factor_pair(number: int, largest: int = -1) -> tuple[int, int]:
    """Returns (m, n) with m n = number and m <= n, m as large as can be and at most `largest` (-1: any)."""
    bound = math.isqrt(number) if largest < 1 else min(largest, math.isqrt(number))
    smaller = max(m for m in range(1, bound + 1) if number % m == 0)
    return smaller, number // smaller


def block_width(features: int, largest: int) -> int:
    """Returns the largest width of at most `largest` that blocks of so many features can have."""
    return max(width for width in range(1, min(features, largest) + 1) if features % width == 0)


def turned_width(path: str, out_features: int, largest: int) -> int:
    """Returns the width of the blocks that turn a layer's outputs, where q, k and v are turned apart."""
    return block_width(out_features // QKV_PARTS if path.endswith(".qkv") else out_features, largest)


def _layer_shapes(path: str, size: tuple[int, int], rank: int, spec: AdapterSpec) -> list[Shape]:
    rows, columns = size
    match spec.algorithm:
        case "lokr":
            return [*lokr_shapes(rows, columns, rank, spec.lokr_factor).values()]
        case "loha":
            return 2 * [(rows, rank), (rank, columns)]
        case "oft":
            width = turned_width(path, rows, rank)
            return [(rows // width, width, width)]
        case "oftv2":
            width = block_width(columns, rank)
            return [(columns // width, width * (width - 1) // 2)]
        case "dora":
            return [(rank, columns), (rows, rank), (rows,)]
    if spec.split_qkv and path.endswith(".qkv"):
        return [(QKV_PARTS * rank, columns), (QKV_PARTS, rows // QKV_PARTS, rank)]
    return [(rank, columns), (rows, rank)]
