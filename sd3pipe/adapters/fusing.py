"""Native layers as diffusers has them, on the factors: q, k, v split and joined without loss, halves, alpha."""

# O out features, I in features, R rank

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sd3pipe.adapters.deltas import Delta, LoHaDelta, LoRADelta
from sd3pipe.adapters.layers import QKV_PARTS, diagonal_blocks
from sd3pipe.errors import InputError


def fold_alpha(delta: LoRADelta) -> LoRADelta:
    """Returns the same change with alpha = rank, for files that carry no alpha."""
    if delta.scale == 1.0:
        return delta
    return replace(delta, up=delta.up.float() * delta.scale, alpha=float(delta.rank))


def swap_halves(delta: Delta) -> Delta:
    """Returns the change with the two halves of its rows exchanged."""
    if isinstance(delta, LoRADelta):
        magnitude = None if delta.magnitude is None else _swapped(delta.magnitude)
        return replace(delta, up=_swapped(delta.up), magnitude=magnitude)
    if isinstance(delta, LoHaDelta):
        return replace(delta, w1_a=_swapped(delta.w1_a), w2_a=_swapped(delta.w2_a))
    raise InputError("a LoKr under diffusers' names on a modulation with exchanged halves has no native form")


def split_qkv(delta: LoRADelta) -> tuple[LoRADelta, LoRADelta, LoRADelta]:
    """Returns the changes of q, k and v: with ranks of their own where up is block-diagonal, else with one down."""
    ups = delta.up.chunk(QKV_PARTS)
    magnitudes = (None,) * QKV_PARTS if delta.magnitude is None else delta.magnitude.chunk(QKV_PARTS)
    blocks = diagonal_blocks(delta.up, QKV_PARTS)
    if blocks is not None and all(bool(block.any()) for block in blocks):
        downs = delta.down.chunk(QKV_PARTS)
        parts = [
            replace(delta, down=downs[i], up=blocks[i], alpha=delta.alpha / QKV_PARTS, magnitude=magnitudes[i])
            for i in range(QKV_PARTS)
        ]
    else:
        parts = [replace(delta, up=ups[i], magnitude=magnitudes[i]) for i in range(QKV_PARTS)]
    return parts[0], parts[1], parts[2]


def join_qkv(parts: Mapping[int, Delta]) -> Delta:
    """Returns the one change of a fused layer whose q (0), k (1) and v (2) rows change as given, or do not if missing.

    Raises InputError where no single delta of the same kind does that.
    """
    deltas = list(parts.values())
    if all(isinstance(delta, LoRADelta) for delta in deltas):
        return _join_lora({index: delta for index, delta in parts.items() if isinstance(delta, LoRADelta)})
    if all(isinstance(delta, LoHaDelta) for delta in deltas):
        return _join_loha({index: delta for index, delta in parts.items() if isinstance(delta, LoHaDelta)})
    kinds = ", ".join(sorted({delta.algorithm for delta in deltas}))
    raise InputError(f"q, k and v are adapted apart ({kinds}), which one factor pair of the fused layer cannot do")


def _join_lora(parts: Mapping[int, LoRADelta]) -> LoRADelta:
    first = next(iter(parts.values()))
    rows = first.shape[0]
    magnitude = _joined_magnitude(parts)
    same_scale = all(delta.scale == first.scale for delta in parts.values())
    if same_scale and all(torch.equal(delta.down, first.down) for delta in parts.values()):
        up = torch.cat([parts[i].up if i in parts else first.up.new_zeros(rows, first.rank) for i in range(QKV_PARTS)])
        return LoRADelta(down=first.down, up=up, alpha=first.alpha, magnitude=magnitude, base_norm=first.base_norm)
    if not same_scale:
        parts = {index: fold_alpha(delta) for index, delta in parts.items()}
    down = torch.cat([parts[index].down for index in sorted(parts)])
    up = _block_diagonal({index: delta.up for index, delta in parts.items()}, rows)
    scale = first.scale if same_scale else 1.0
    return LoRADelta(down=down, up=up, alpha=scale * down.shape[0], magnitude=magnitude, base_norm=first.base_norm)


def _join_loha(parts: Mapping[int, LoHaDelta]) -> LoHaDelta:
    first = next(iter(parts.values()))
    rows, order = first.shape[0], sorted(parts)
    scaled = {index: delta.w1_a.float() * (delta.scale / first.scale) for index, delta in parts.items()}
    same_scale = all(delta.scale == first.scale for delta in parts.values())
    w1_a = {index: delta.w1_a for index, delta in parts.items()} if same_scale else scaled
    w1_b = torch.cat([parts[index].w1_b for index in order])
    return LoHaDelta(
        w1_a=_block_diagonal(w1_a, rows),
        w1_b=w1_b,
        w2_a=_block_diagonal({index: delta.w2_a for index, delta in parts.items()}, rows),
        w2_b=torch.cat([parts[index].w2_b for index in order]),
        alpha=first.scale * w1_b.shape[0],
    )


def _block_diagonal(blocks: Mapping[int, Tensor], rows: int) -> Tensor:
    """Returns the blocks on the diagonal of one matrix; a missing one leaves its rows zero and adds no column."""
    any_block = next(iter(blocks.values()))
    return torch.block_diag(*(blocks.get(index, any_block.new_zeros(rows, 0)) for index in range(QKV_PARTS)))


def _joined_magnitude(parts: Mapping[int, LoRADelta]) -> Tensor | None:
    magnitudes = [delta.magnitude for _, delta in sorted(parts.items())]
    present = [magnitude for magnitude in magnitudes if magnitude is not None]
    if not present:
        return None
    if len(present) < QKV_PARTS:
        raise InputError("a DoRA that adapts only some of q, k and v has no form in the fused layer")
    return torch.cat(present)


def _swapped(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])
