"""The questions of a caption check, and their answers as tables by picture, caption and noise."""

# P pictures, O other captions, N noises, S noise levels

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sd3pipe.cache.join import join_pictures
from sd3pipe.caption_findings import CheckedPicture, LearntBy
from sd3pipe.diffusion.sheet import Column
from sd3pipe.errors import InputError
from sd3pipe.judging.bootstrap import Array, Resampled
from sd3pipe.judging.caption_check import (
    LOW_NOISE,
    advantages,
    change_nothing,
    gains,
    gap,
    means,
    other_captions,
    suspects,
    what_was_learnt,
)
from sd3pipe.judging.rows import ResultRows
from sd3pipe.judging.velocity_errors import Asked, Noise, Question
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.picture_losses import PictureLosses

_ERROR, _MOVED = 0, 1  # of an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedPicture:
    """One picture in its first crop with its first caption; rows are numbers in their caches."""

    name: str
    subset: str
    held_out: bool
    row: int
    own: int
    others: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionCheck:
    """What is asked of which pictures: under the base all captions, under each adapter a picture's own."""

    asked: Asked
    pictures: Sequence[AskedPicture]
    empty_row: int
    noises: Sequence[Noise]
    adapters: Sequence[Column]

    def questions(self, column: Column | None) -> Iterator[Question]:
        """Yields the questions to the base (None), or to an adapter."""
        for picture in self.pictures:
            texts = (picture.own,) if column else (picture.own, self.empty_row, *picture.others)
            for text in dict.fromkeys(texts):
                for noise in self.noises:
                    yield self._question(picture, text, noise, column)

    def checked(self, rows: ResultRows) -> list[CheckedPicture]:
        """Returns what the base's answers, all of which are there, say of each picture."""
        captioned = [picture for picture in self.pictures if picture.own != self.empty_row and picture.others]
        if not captioned:
            return [_unsaid(picture) for picture in self.pictures]
        own_PN, moved_PN = (self._table(rows, captioned, number) for number in (_ERROR, _MOVED))
        empty_PN = self._table(rows, captioned, _ERROR, text=self.empty_row)
        others_PON = np.array([
            [[self._answer(rows, picture, text, noise)[_ERROR] for noise in self.noises] for text in picture.others]
            for picture in captioned
        ])  # fmt: skip
        found = advantages(own_PN, empty_PN, others_PON)
        said = {
            picture: replace(
                _unsaid(picture), advantage=found.score(number), suspect=bool(suspect), changes_nothing=bool(nothing)
            )
            for number, (picture, suspect, nothing) in enumerate(
                zip(captioned, suspects(found), change_nothing(moved_PN), strict=True)
            )
        }
        return [said.get(picture, _unsaid(picture)) for picture in self.pictures]

    def learnt(self, rows: ResultRows, column: Column, checked: Sequence[CheckedPicture]) -> list[CheckedPicture]:
        """Returns the pictures with what an adapter has learnt of each."""
        gained, low_noise, held_out_P = self._gains(rows, column)
        words = what_was_learnt(gained, low_noise, held_out_P)
        return [
            replace(item, gained=gained.score(number), learnt=word)
            for number, (item, word) in enumerate(zip(checked, words, strict=True))
        ]

    def summary(self, rows: ResultRows, column: Column) -> LearntBy:
        """Returns what an adapter gained by subset, and the gap of trained to held-out pictures at low noise."""
        gained, low_noise, held_out_P = self._gains(rows, column)
        subsets = sorted({picture.subset for picture in self.pictures})
        members = {name: np.array([picture.subset == name for picture in self.pictures]) for name in subsets}
        return LearntBy(
            checkpoint=column.label if column.step is None else column.step,
            gained_by_subset={name: means(gained, members_P) for name, members_P in members.items()},
            memorised_gap=gap(low_noise, held_out_P),
        )

    def _gains(self, rows: ResultRows, column: Column) -> tuple[Resampled, Resampled, NDArray[np.bool_]]:
        """Returns what was gained at all noise levels and at low ones, and which pictures are held out."""
        base_PN = self._table(rows, self.pictures, _ERROR)
        adapted_PN = self._table(rows, self.pictures, _ERROR, column=column)
        low = [number for number, noise in enumerate(self.noises) if noise.sigma <= LOW_NOISE] or [0]
        held_out_P = np.array([picture.held_out for picture in self.pictures])
        return gains(base_PN, adapted_PN), gains(base_PN[:, low], adapted_PN[:, low]), held_out_P

    def _table(
        self,
        rows: ResultRows,
        pictures: Sequence[AskedPicture],
        number: int,
        *,
        text: int | None = None,
        column: Column | None = None,
    ) -> Array:
        return np.array([
            [
                self._answer(rows, picture, picture.own if text is None else text, noise, column)[number]
                for noise in self.noises
            ]
            for picture in pictures
        ], np.float64)  # fmt: skip

    def _answer(
        self, rows: ResultRows, picture: AskedPicture, text: int, noise: Noise, column: Column | None = None
    ) -> NDArray[np.float32]:
        return rows.values(self._question(picture, text, noise, column).key)

    def _question(self, picture: AskedPicture, text: int, noise: Noise, column: Column | None) -> Question:
        adapter, multiplier = ("", 1.0) if column is None else (column.adapter_hash, column.multiplier)
        return self.asked.question(picture.row, text, noise, adapter, multiplier)


def read_pictures(asked: Asked, architecture: MMDiTArchitecture, *, most_others: int) -> tuple[list[AskedPicture], int]:
    """Returns the pictures of two caches, and the row of the empty caption. Raises InputError, StaleError."""
    latents, text = asked.latents, asked.text
    joined = join_pictures(latents, text)
    if not len(joined):
        raise InputError(f"{latents.where} and {text.where} have no picture in common")
    key = text.manifest.extra.get("empty_caption")
    if not isinstance(key, str):
        raise InputError(f"{text.where} does not say which row the empty caption is: encode the text again")
    for layout in text.index.layouts:
        widths = {name: shape[-1] for name, _, shape in layout}
        if widths["t5xxl"] != architecture.context_width:
            raise InputError(
                f"{text.where} holds texts that are {widths['t5xxl']} wide, and the model reads "
                f"{architecture.context_width}: encode them with the text encoders that belong to the model"
            )
    empty = text.number(key)
    first = np.zeros(len(joined), dtype=np.int64)
    rows, texts = (lists.pick(np.arange(len(joined)), first).tolist() for lists in (joined.latents, joined.captions))
    owns = sorted({*texts} - {empty}, key=lambda row: text.keys[row].tobytes())
    pictures = [
        AskedPicture(
            name=joined.names[number],
            subset=joined.subsets[number],
            held_out=joined.splits[number] == "validation",
            row=rows[number],
            own=texts[number],
            others=tuple(other_captions(joined.image_hashes[number], texts[number], owns, most_others)),
        )
        for number in range(len(joined))
    ]
    fewest = min(len(picture.others) for picture in pictures)  # tables want as many of each
    return [replace(picture, others=picture.others[:fewest]) for picture in pictures], empty


def with_training(pictures: Sequence[CheckedPicture], losses: Sequence[PictureLosses]) -> list[CheckedPicture]:
    """Returns the pictures with what a run's own losses say of them."""
    by_name = {(item.subset, item.name): item for item in losses}
    return [replace(picture, in_training=by_name.get((picture.subset, picture.name))) for picture in pictures]


def _unsaid(picture: AskedPicture) -> CheckedPicture:
    return CheckedPicture(
        name=picture.name,
        subset=picture.subset,
        held_out=picture.held_out,
        advantage=None,
        suspect=False,
        changes_nothing=False,
    )
