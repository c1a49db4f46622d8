"""A run's samples in the store of drawn pictures, which `sample` and `judge` share: none is drawn twice."""

# B batch, C latent channels, h w latent pixels

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from sd3pipe.diffusion.kept_latents import keep_latents, read_latents
from sd3pipe.diffusion.picture_store import PictureStore, adapter_words, made_from, picture_key
from sd3pipe.diffusion.prompts import SamplePrompt
from sd3pipe.diffusion.sampler import SamplingSettings
from sd3pipe.errors import InputError
from sd3pipe.fingerprint import hash_file
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.params.train import TrainParams
from sd3pipe.words import Precision


def draws_as_sample(params: TrainParams) -> bool:
    """Whether the run draws with the very weights that its adapter files and its base hold.

    Packed or merged bases, eight-bit products, scaled positions and adapters that are saved in fewer bits than they
    have, or trained in bf16, draw other pictures than `sample` does with the files. Streaming changes no bit.
    """
    other_base = params.memory.base_dtype or params.memory.matmul_dtype or params.base_weights
    other_adapter = params.full_bf16 or params.saving.save_precision not in (None, "float")
    return not (other_base or other_adapter or params.positions.enable_scaled_pos_embed)


@dataclass(slots=True, kw_only=True)
class SharedSamples:
    """Hands pictures to the store: the base's at once, a step's when its adapter is saved, whose hash names them."""

    store: PictureStore
    base: str  # fingerprint of the MMDiT
    architecture: MMDiTArchitecture
    defaults: SamplingSettings
    precision: Precision
    _step: int = -1
    _drawn: list[tuple[SamplePrompt, Tensor]] = field(default_factory=list)  # at that step

    def of_base(self, prompt: SamplePrompt) -> Tensor | None:
        """Returns the latents of the base's picture, None where nobody has drawn it."""
        key = self._key(prompt, "")
        if not self.store.has(key):
            return None
        try:
            return read_latents(self.store.file(key), self.architecture.in_channels)
        except InputError:  # damaged: it is drawn again
            return None

    def keep_base(self, prompt: SamplePrompt, latents_BChw: Tensor) -> None:
        """Keeps a picture that the base drew alone."""
        self._keep(prompt, latents_BChw, "")

    def remember(self, step: int, prompt: SamplePrompt, latents_BChw: Tensor) -> None:
        """Remembers what was drawn at a step until its adapter is saved; what came before is forgotten."""
        if step != self._step:
            self._step, self._drawn = step, []
        self._drawn.append((prompt, latents_BChw.cpu()))

    def saved(self, step: int, adapter: Path) -> None:
        """Keeps what was drawn at a step, under the name of the adapter file that was saved of it."""
        if step == self._step:
            adapter_hash = hash_file(adapter)
            for prompt, latents_BChw in self._drawn:
                self._keep(prompt, latents_BChw, adapter_hash)
            self._drawn = []

    def _keep(self, prompt: SamplePrompt, latents_BChw: Tensor, adapter_hash: str) -> None:
        key = self._key(prompt, adapter_hash)
        if self.store.folder is not None and not self.store.has(key):
            words = prompt.parameters(self.defaults, self.architecture, more=adapter_words(adapter_hash, 1.0))
            keep_latents(self.store.file(key), latents_BChw, prompt=prompt.prompt, parameters=words)

    def _key(self, prompt: SamplePrompt, adapter_hash: str) -> str:
        made = made_from(prompt, prompt.settings(self.defaults), self.architecture, self.base, self.precision)
        return picture_key(adapter_hash=adapter_hash, multiplier=1.0, seed=prompt.own_seed, made_from=made)
