"""What can be trained on: pictures with their latent rows, caption rows and subset, as flat arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd3pipe.cache.join import Numbers, RowLists
from sd3pipe.diffusion.draws import Ids


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
