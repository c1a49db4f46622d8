"""Which pictures, rows and captions each step sees: a pure function of (items, seed, epoch), without any state.

An epoch's occurrences (picture x repeat) are put in a random order, cut into batches of equal latent and text shape,
and the batches are put in a random order. Epochs follow one another without a gap; a step takes the next
accumulation x processes micro-batches, which its processes share out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sd3pipe.training.draws import Ids, hashes, mix, uniforms
from sd3pipe.training.items import Items, Numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The samples of one forward and backward pass. `ids` key every random number that belongs to a sample."""

    epoch: int
    index: int  # of the batch in its epoch
    pictures: Numbers
    ids: Ids
    latent_rows: Numbers
    text_rows: Numbers

    def __len__(self) -> int:
        return len(self.pictures)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Position:
    """The next micro-batch of a run."""

    epoch: int = 0
    index: int = 0


def epoch_batches(items: Items, *, seed: int, epoch: int, batch_size: int) -> list[MicroBatch]:
    """Returns the micro-batches of one epoch in their order. The last batch of a shape may be smaller."""
    pictures = np.repeat(np.arange(len(items)), items.repeats)
    repeats = _count_up(items.repeats)
    ids = mix(items.ids[pictures] ^ mix(repeats.astype(np.uint64)))
    latent_rows = _latent_rows(items, pictures, ids, seed, epoch)
    text_rows = _text_rows(items, pictures, repeats, ids, seed, epoch)
    batches = []
    for chosen in _cut(_shapes(items, latent_rows, text_rows), hashes(ids, seed, "order", epoch), batch_size):
        batches.append((pictures[chosen], ids[chosen], latent_rows[chosen], text_rows[chosen]))
    order = np.argsort(hashes(np.array([part[1][0] for part in batches]), seed, "batch order", epoch), kind="stable")
    return [
        MicroBatch(epoch=epoch, index=index, pictures=p, ids=i, latent_rows=latents, text_rows=texts)
        for index, (p, i, latents, texts) in enumerate(batches[number] for number in order)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What one step sees on one process, and where the run stands after it."""

    micro_batches: tuple[MicroBatch, ...]
    end: Position
    epochs_done: int  # complete epochs after the step


def plan_steps(
    items: Items, start: Position, *, seed: int, batch_size: int, accumulation: int, rank: int = 0, num_ranks: int = 1
) -> Iterator[StepPlan]:
    """Yields the steps of one of `num_ranks` processes, without end; together the ranks see what one alone would."""
    epoch, index = start.epoch, start.index
    pending: list[MicroBatch] = []
    while True:
        batches = epoch_batches(items, seed=seed, epoch=epoch, batch_size=batch_size)
        for batch in batches[index:]:
            pending.append(batch)
            if len(pending) == accumulation * num_ranks:
                yield StepPlan(
                    micro_batches=tuple(pending[rank::num_ranks]),
                    end=Position(epoch=epoch, index=batch.index + 1),
                    epochs_done=epoch + (batch.index + 1 == len(batches)),
                )
                pending = []
        epoch, index = epoch + 1, 0


def steps_of_epochs(items: Items, epochs: int, *, seed: int, batch_size: int, micro_batches: int) -> int:
    """Returns how many steps it takes until `epochs` epochs are complete."""
    batches = sum(len(epoch_batches(items, seed=seed, epoch=e, batch_size=batch_size)) for e in range(epochs))
    return -(-batches // micro_batches)


def fixed_batches(items: Items, *, batch_size: int) -> list[MicroBatch]:
    """Returns every picture once with its first latent and caption row, in equal-shape batches: for validation."""
    pictures = np.arange(len(items))
    first = np.zeros_like(pictures)
    latent_rows, text_rows = items.latents.pick(pictures, first), items.captions.pick(pictures, first)
    return [
        MicroBatch(
            epoch=0,
            index=index,
            pictures=pictures[chosen],
            ids=items.ids[chosen],
            latent_rows=latent_rows[chosen],
            text_rows=text_rows[chosen],
        )
        for index, chosen in enumerate(_cut(_shapes(items, latent_rows, text_rows), items.ids, batch_size))
    ]


def _count_up(counts: Numbers) -> Numbers:
    """Returns 0 .. n - 1 for each n, end to end."""
    starts = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) - np.repeat(starts, counts)


def _latent_rows(items: Items, pictures: Numbers, ids: Ids, seed: int, epoch: int) -> Numbers:
    """Returns one of the picture's crops and flips, drawn anew for each occurrence."""
    which = (uniforms(ids, seed, "latent row", epoch) * items.latents.counts(pictures)).astype(np.int64)
    return items.latents.pick(pictures, which)


def _text_rows(items: Items, pictures: Numbers, repeats: Numbers, ids: Ids, seed: int, epoch: int) -> Numbers:
    """Returns the caption variant that is next in the picture's turn, or the empty caption where it is dropped."""
    counts = items.captions.counts(pictures)
    first = (uniforms(items.ids[pictures], seed, "caption variant") * counts).astype(np.int64)
    turn = epoch * items.repeats[pictures] + repeats
    rows = items.captions.pick(pictures, (first + turn) % counts)
    dropped = uniforms(ids, seed, "caption dropout", epoch) < items.rule("caption_dropout_rate")[pictures]
    every = items.rule("caption_dropout_every_n_epochs")[pictures]
    dropped |= (every > 0) & ((epoch + 1) % np.maximum(every, 1) == 0)
    return np.where(dropped, items.empty_caption, rows)


def _shapes(items: Items, latent_rows: Numbers, text_rows: Numbers) -> np.ndarray:
    """Returns (h, w, T5 tokens) of each occurrence, as columns."""
    return np.column_stack([items.latent_shapes[latent_rows], items.text_lengths[text_rows]])


def _cut(shapes: np.ndarray, keys: Ids, batch_size: int) -> list[Numbers]:
    """Returns the occurrences of each batch: equal shapes together, inside a shape in the order of the keys."""
    order = np.lexsort((keys, *shapes.T[::-1]))
    is_new = np.any(shapes[order][1:] != shapes[order][:-1], axis=1)
    groups = np.split(order, np.flatnonzero(is_new) + 1)
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
