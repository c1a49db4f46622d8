"""Which blocks are streamed, and which copies one training step needs. Plain arithmetic, without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sd3pipe.words import KeptActivations, ModulationMode

Part = Literal["whole", "body", "modulation"]
STAGING_BUFFERS = 3  # one is copied from, two are read into
RING_SLOTS = 2  # one slot computes while the other is filled


@dataclass(frozen=True, slots=True, order=True)
class Copy:
    """One copy from host to device: a part of one block."""

    block: int
    part: Part


def spread_evenly(num_streamed: int, depth: int) -> tuple[int, ...]:
    """Returns the numbers of the blocks to stream, as far from each other as possible.

    A resident block between two streamed ones gives the next copy twice the time. Raises ValueError.
    """
    if not 0 <= num_streamed <= depth:
        raise ValueError(f"{num_streamed} of {depth} blocks cannot be streamed")
    return tuple((2 * k + 1) * depth // (2 * num_streamed) for k in range(num_streamed))


def kept_activations(depth: int, *, all_kept: int, attention_kept: int) -> tuple[KeptActivations, ...]:
    """Returns what each block keeps for its backward pass: blocks that keep little are spread evenly among the others.

    Raises ValueError for more blocks than there are.
    """
    kept: list[KeptActivations] = ["all"] * depth
    less = spread_evenly(depth - all_kept, depth)
    for number in less:
        kept[number] = "none"
    for number in spread_evenly(attention_kept, len(less)):
        kept[less[number]] = "attention"
    return tuple(kept)


def step_copies(rings: Sequence[Sequence[int]], *, modulation: ModulationMode, first: bool = False) -> list[Copy]:
    """Returns the copies of one step, forward and backward, in the order in which they are needed.

    `rings` has the streamed blocks of each shape, ascending. The forward pass leaves the last blocks of each ring in
    its slots and the backward pass starts with them; it leaves the first blocks there, of which the next step's
    forward pass needs the modulation only. The `first` step finds the slots empty.
    """
    whole: Part = "whole" if modulation == "stream" else "body"
    forward = sorted(block for ring in rings for block in ring)
    at_turn = {block for ring in rings for block in ring[-RING_SLOTS:]}
    at_start = set() if first else {block for ring in rings for block in ring[:RING_SLOTS]}
    copies = []
    for block in forward:
        if block not in at_start:
            copies.append(Copy(block, whole))
        elif modulation == "stream" and block not in at_turn:  # those came whole, and never left
            copies.append(Copy(block, "modulation"))
    return copies + [Copy(block, "body") for block in reversed(forward) if block not in at_turn]
