"""How well a caption explains a picture: the error of the predicted velocity at fixed noise levels and draws.

After Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier" (arXiv:2303.16203): under the caption
that belongs to a picture the model removes noise best, and on equal noise the difference is no matter of luck. Each
error is a row of results, keyed by all that it is made from.
"""

# B batch, C latent channels, h w latent pixels, L text tokens, D text width, P pooled width

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd3pipe import stopping
from sd3pipe.cache.keys import Ingredients
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.tensors import row_to_torch
from sd3pipe.console import Progress
from sd3pipe.diffusion.draws import normals
from sd3pipe.diffusion.flow import add_noise, velocity_target
from sd3pipe.judging.references import mean_latents
from sd3pipe.judging.rows import ResultKey, result_key
from sd3pipe.models.conditioning import assemble_conditioning
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.models.vae import to_model_space
from sd3pipe.rules.flow import NUM_TIMESTEPS

RECIPE_VERSION = 1  # raised when our own code makes other errors of the same rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """A noise level, and which of several draws of noise."""

    sigma: float
    draw: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """How well one text explains one picture under one noise; rows are numbers in their caches."""

    latent_row: int
    text_row: int
    noise: Noise
    key: ResultKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The caches that questions are about, and what answers them: fingerprints of base and adapter, precision."""

    latents: CacheReader
    text: CacheReader
    base: str
    precision: str

    def question(
        self, latent_row: int, text_row: int, noise: Noise, adapter_hash: str = "", multiplier: float = 1.0
    ) -> Question:
        """Returns a question with the key of its answer."""
        source = {
            "latents": self.latents.keys[latent_row].tobytes().hex(),
            "text": self.text.keys[text_row].tobytes().hex(),
            "sigma": noise.sigma,
            "draw": noise.draw,
        }
        ingredients = Ingredients(
            recipe={"precision": self.precision, "multiplier": multiplier if adapter_hash else 0.0},
            recipe_version=RECIPE_VERSION,
            fingerprints={"mmdit": self.base, "adapter": adapter_hash},
        )
        key = result_key("errors", source, ingredients)
        return Question(latent_row=latent_row, text_row=text_row, noise=noise, key=key)


class Answerer:
    """Answers questions with one model. Texts go through it in batches of one size, so none depends on the others."""

    def __init__(
        self,
        asked: Asked,
        mmdit: MMDiT,
        *,
        device: torch.device,
        empty_row: int,
        batch_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._asked, self._mmdit, self._empty = asked, mmdit, empty_row
        self._batch_size, self._dtype, self._device = batch_size, dtype, device

    @torch.no_grad()
    def answers(
        self, questions: Sequence[Question], bar: Progress | None = None
    ) -> Iterator[Sequence[tuple[ResultKey, NDArray[np.float32]]]]:
        """Yields the rows of the questions about one picture under one noise at a time: error, and how far from empty.

        The second number is the mean square by which the text moves the prediction away from that without any text.
        """
        for asked in _groups(questions):
            stopping.check()
            row, noise = asked[0].latent_row, asked[0].noise
            clean_Chw = to_model_space(mean_latents(self._asked.latents, row))
            key = self._asked.latents.keys[row].tobytes().hex()
            noise_Chw = torch.from_numpy(normals(tuple(clean_Chw.shape), "velocity error", noise.draw, key))
            target_Chw = velocity_target(clean_Chw, noise_Chw)
            noisy_1Chw = add_noise(clean_Chw[None], noise_Chw[None], torch.tensor([noise.sigma]))
            texts = list(dict.fromkeys([self._empty, *(item.text_row for item in asked)]))
            velocity_of = self._velocities(noisy_1Chw, noise.sigma, texts)
            empty_Chw = velocity_of[self._empty]
            yield [(item.key, _numbers(velocity_of[item.text_row], target_Chw, empty_Chw)) for item in asked]
            if bar is not None:
                bar.advance(len(asked))

    def passes(self, questions: Sequence[Question]) -> int:
        """Returns how many batches the questions take, where texts are equally long."""
        texts = (len({self._empty, *(item.text_row for item in asked)}) for asked in _groups(questions))
        return sum(-(-number // self._batch_size) for number in texts)

    def answer_one(self, question: Question) -> None:
        """Sends one batch through the model."""
        empty = replace(question, text_row=self._empty)
        list(self.answers([empty]))

    def _velocities(self, noisy_1Chw: Tensor, sigma: float, texts: Sequence[int]) -> dict[int, Tensor]:
        """Returns the predicted velocity under each text, in fp32 on the CPU."""
        rows = {text: row_to_torch(self._asked.text.row(text)) for text in texts}
        found: dict[int, Tensor] = {}
        by_length = sorted(texts, key=lambda text: len(rows[text]["t5xxl"]))
        for _, group in groupby(by_length, key=lambda text: len(rows[text]["t5xxl"])):
            equal = list(group)
            for start in range(0, len(equal), self._batch_size):
                batch = equal[start : start + self._batch_size]
                filled = batch + batch[-1:] * (self._batch_size - len(batch))
                velocity_BChw = self._predict(noisy_1Chw, sigma, [rows[text] for text in filled])
                found |= dict(zip(batch, velocity_BChw, strict=False))
        return found

    def _predict(self, noisy_1Chw: Tensor, sigma: float, rows: Sequence[dict[str, Tensor]]) -> Tensor:
        context_BLD, pooled_BP = assemble_conditioning(rows, dtype=self._dtype)
        noisy_BChw = noisy_1Chw.repeat(len(rows), 1, 1, 1).to(self._device)
        timesteps_B = torch.full((len(rows),), sigma * NUM_TIMESTEPS, device=self._device)
        velocity_BChw = self._mmdit(
            noisy_BChw, timesteps_B, context_BLD.to(self._device), pooled_BP.to(self._device, self._dtype)
        )
        return velocity_BChw.float().cpu()


def _groups(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """Yields the questions about one picture under one noise."""
    ordered = sorted(questions, key=lambda item: (item.latent_row, item.noise.sigma, item.noise.draw))
    for _, group in groupby(ordered, key=lambda item: (item.latent_row, item.noise)):
        yield list(group)


def _numbers(velocity_Chw: Tensor, target_Chw: Tensor, empty_Chw: Tensor) -> NDArray[np.float32]:
    error = (velocity_Chw - target_Chw).double().square().mean()
    moved = (velocity_Chw - empty_Chw).double().square().mean()
    return np.array([error.item(), moved.item()], dtype=np.float32)
