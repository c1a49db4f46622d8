"""Which pictures, rows and captions each step sees: a pure function of (items, seed, epoch), without any state.

An epoch's occurrences (picture x repeat) are put in a random order, cut into batches of equal latent and text shape,
and the batches are put in a random order. Epochs follow one another without a gap; a step takes the next
accumulation x processes micro-batches, which its processes share out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sd3pipe.cache.join import Numbers, RowLists
from sd3pipe.diffusion.draws import Ids, hashes, mix, uniforms


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetRules:
    """How one subset is weighed and sampled; in no cache key, so it may change without encoding."""

    name: str
    loss_weight: float = 1.0  # with the prior loss weight of regularisation pictures in it
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    diff_output_preservation: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """All pictures of a training run, or its held-out ones.

    `ids` identify a picture by content and subset, whatever else is in the dataset; `repeats` says how often it comes
    in an epoch. `latents` lists its crops and flips, `captions` its caption variants. `latent_shapes` (h, w of each
    latent row) and `text_lengths` (T5 tokens of each text row) decide what fits into one batch.
    """

    names: Sequence[str]
    ids: Ids
    subsets: Numbers
    repeats: Numbers
    rules: tuple[SubsetRules, ...]
    latents: RowLists
    captions: RowLists
    empty_caption: int
    latent_shapes: NDArray[np.int64]
    text_lengths: Numbers

    def __len__(self) -> int:
        return len(self.ids)

    def rule(self, name: str) -> NDArray[np.float64]:
        """Returns a number of each picture's subset."""
        return np.array([getattr(rules, name) for rules in self.rules], dtype=np.float64)[self.subsets]


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

    def part(self, chosen: Numbers, index: int) -> "MicroBatch":
        """Returns some of the samples as a batch of their own."""
        return MicroBatch(
            epoch=self.epoch,
            index=index,
            pictures=self.pictures[chosen],
            ids=self.ids[chosen],
            latent_rows=self.latent_rows[chosen],
            text_rows=self.text_rows[chosen],
        )


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Position:
    """The next micro-batch of a run."""

    epoch: int = 0
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Samples in micro-batches, each made when it is asked for: batch i has samples order[starts[i]:ends[i]]."""

    samples: MicroBatch
    order: Numbers
    starts: Numbers
    ends: Numbers

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[MicroBatch]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> MicroBatch:
        return self.samples.part(self.order[self.starts[index] : self.ends[index]], index)


def epoch_batches(items: Items, *, seed: int, epoch: int, batch_size: int) -> Batches:
    """Returns the micro-batches of one epoch in their order. The last batch of a shape may be smaller."""
    pictures = np.repeat(np.arange(len(items)), items.repeats)
    repeats = _count_up(items.repeats)
    ids = mix(items.ids[pictures] ^ mix(repeats.astype(np.uint64)))
    which = (uniforms(ids, seed, "latent row", epoch) * items.latents.counts(pictures)).astype(np.int64)
    occurrences = MicroBatch(
        epoch=epoch,
        index=0,
        pictures=pictures,
        ids=ids,
        latent_rows=items.latents.pick(pictures, which),
        text_rows=_text_rows(items, pictures, repeats, ids, seed, epoch),
    )
    batches = _cut(items, occurrences, hashes(ids, seed, "order", epoch), batch_size)
    firsts = ids[batches.order[batches.starts]]
    order = np.argsort(hashes(firsts, seed, "batch order", epoch), kind="stable")
    return replace(batches, starts=batches.starts[order], ends=batches.ends[order])


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
        for end in range(index + 1, len(batches) + 1):
            pending.append(batches[end - 1])
            if len(pending) == accumulation * num_ranks:
                yield StepPlan(
                    micro_batches=tuple(pending[rank::num_ranks]),
                    end=Position(epoch=epoch, index=end),
                    epochs_done=epoch + (end == len(batches)),
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
    everything = MicroBatch(
        epoch=0,
        index=0,
        pictures=pictures,
        ids=items.ids,
        latent_rows=items.latents.pick(pictures, first),
        text_rows=items.captions.pick(pictures, first),
    )
    return list(_cut(items, everything, items.ids, batch_size))


def _count_up(counts: Numbers) -> Numbers:
    """Returns 0 .. n - 1 for each n, end to end."""
    starts = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) - np.repeat(starts, counts)


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


def _cut(items: Items, samples: MicroBatch, keys: Ids, batch_size: int) -> Batches:
    """Returns the samples in batches: equal shapes (h, w, T5 tokens) together, by keys inside a shape."""
    shapes = np.column_stack([items.latent_shapes[samples.latent_rows], items.text_lengths[samples.text_rows]])
    order = np.lexsort((keys, *shapes.T[::-1]))
    is_new = np.any(shapes[order][1:] != shapes[order][:-1], axis=1)
    groups = np.concatenate([[0], np.flatnonzero(is_new) + 1])
    sizes = np.diff(np.concatenate([groups, [len(order)]]))
    of_group = -(-sizes // batch_size)
    starts = np.repeat(groups, of_group) + _count_up(of_group) * batch_size
    ends = np.minimum(starts + batch_size, np.repeat(groups + sizes, of_group))
    return Batches(samples=samples, order=order, starts=starts, ends=ends)
