"""Sample pictures while a run trains: one per prompt now and then, and a grid over the steps for each prompt.

They share the store of drawn pictures with `sample` and `judge`: none is drawn twice.
"""

# B batch, C latent channels, h w latent pixels

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sd3pipe.adapters.network import AdapterNetwork
from sd3pipe.console import Progress, progress
from sd3pipe.diffusion.kept_latents import keep_latents, read_latents
from sd3pipe.diffusion.picture_store import PictureStore, adapter_words, made_from, picture_key
from sd3pipe.diffusion.precision import BASE_DTYPES
from sd3pipe.diffusion.prompts import SamplePrompt, read_prompts
from sd3pipe.diffusion.sampler import DEFAULTS, SamplingSettings, decode_pictures
from sd3pipe.errors import InputError
from sd3pipe.files import make_folder
from sd3pipe.fingerprint import hash_file
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.checkpoint import load_vae
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.models.sources import find_component
from sd3pipe.models.vae import VAE
from sd3pipe.params.train import TrainParams
from sd3pipe.training.checkpoints import named_step, step_name
from sd3pipe.training.run import Run, TrainedModel
from sd3pipe.training.run_folder import RunFolder
from sd3pipe.training.state_file import Progressed
from sd3pipe.training.training_data import check_widths
from sd3pipe.words import Precision

log = logging.getLogger(__name__)


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

    def keep(self, prompt: SamplePrompt, latents_BChw: Tensor, adapter_hash: str = "") -> None:
        """Keeps a picture of the adapter with this hash, or of the base alone."""
        key = self._key(prompt, adapter_hash)
        if self.store.folder is not None and not self.store.has(key):
            words = prompt.parameters(self.defaults, self.architecture, more=adapter_words(adapter_hash, 1.0))
            keep_latents(self.store.file(key), latents_BChw, prompt=prompt.prompt, parameters=words)

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
                self.keep(prompt, latents_BChw, adapter_hash)
            self._drawn = []

    def _key(self, prompt: SamplePrompt, adapter_hash: str) -> str:
        made = made_from(prompt, prompt.settings(self.defaults), self.architecture, self.base, self.precision)
        return picture_key(adapter_hash=adapter_hash, multiplier=1.0, seed=prompt.own_seed, made_from=made)


class StepSamples:
    """Draws every prompt with the model as it stands and keeps the pictures in RUN/samples.

    RUN/samples/step-00000250/000.png is prompt 000 after 250 steps; RUN/samples/000.png shows all its steps side by
    side. Without a VAE the latents are kept as 000.safetensors instead, to be decoded elsewhere. Pictures that exist
    are not drawn again, so a resumed run continues its grids. Random numbers come from the prompts' seeds alone. With
    `shared` nothing is drawn that `sample` or `judge` has drawn already, nor the other way round.
    """

    def __init__(
        self,
        run: RunFolder,
        prompts: Sequence[SamplePrompt],
        *,
        mmdit: MMDiT,
        vae: VAE | None,
        defaults: SamplingSettings,
        device: torch.device,
        dtype: torch.dtype,
        network: AdapterNetwork | None = None,
        shared: SharedSamples | None = None,
    ) -> None:
        """`network` is the adapter that is trained; with it, what step 0 shows is the base alone."""
        self._run, self._network, self.shared = run, network, shared
        self.prompts, self.mmdit, self.vae = prompts, mmdit, vae
        self.defaults, self.device, self.dtype = defaults, device, dtype

    @property
    def folder(self) -> Path:
        return self._run.path / "samples"

    def draw(self, step: int) -> list[Path]:
        """Draws what is not there yet for a step, in eval mode, and returns the step's files. Raises Stopped."""
        folder = make_folder(self.folder / step_name(step))
        suffix = ".safetensors" if self.vae is None else ".png"
        files = [folder / f"{prompt.name}{suffix}" for prompt in self.prompts]
        missing = [pair for pair in zip(self.prompts, files, strict=True) if not pair[1].is_file()]
        steps = sum(prompt.settings(self.defaults).steps for prompt, _ in missing)
        training = self.mmdit.training
        self.mmdit.eval()
        try:
            with progress(f"samples at step {step}", steps, "steps") as bar:
                for prompt, file in missing:
                    self._draw(prompt, file, step, bar)
        finally:
            self.mmdit.train(training)
        if self.vae is not None:
            self._update_grids()
        return files

    def _draw(self, prompt: SamplePrompt, file: Path, step: int, bar: Progress) -> None:
        """Draws a picture, unless it is the base's and drawn already, and keeps it decoded or not."""
        shared, base = self.shared, self._network if step == 0 else None
        latents = shared.of_base(prompt) if shared is not None and base is not None else None
        if latents is None:
            with base.detached() if base is not None else contextlib.nullcontext():
                latents = prompt.drawn(self.mmdit, self.defaults, self.device, self.dtype, on_step=bar.advance)
            if shared is not None and base is not None:
                shared.keep(prompt, latents)
            elif shared is not None:
                shared.remember(step, prompt, latents)
        parameters = prompt.parameters(self.defaults, self.mmdit.architecture, more={"Training step": step})
        if self.vae is None:
            keep_latents(file, latents, prompt=prompt.prompt, parameters=parameters)
            return
        from sd3pipe.diffusion.picture_grid import save_picture  # imports PIL, which a run without samples never needs

        picture = decode_pictures(self.vae, latents)[0].numpy()
        save_picture(file, picture, title=prompt.prompt, parameters=parameters)

    def _update_grids(self) -> None:
        from sd3pipe.diffusion.picture_grid import Grid, read_picture_file, save_grid

        steps = sorted((step, folder) for folder in self.folder.iterdir() if (step := named_step(folder)) >= 0)
        for prompt in self.prompts:
            files = [folder / f"{prompt.name}.png" for _, folder in steps]
            pictures = [read_picture_file(file) if file.is_file() else None for file in files]
            grid = Grid(
                title=prompt.prompt, columns=[f"step {step}" for step, _ in steps], rows=[""], pictures=[pictures]
            )
            save_grid(self.folder / f"{prompt.name}.png", grid)


def check_prompts(params: TrainParams, architecture: MMDiTArchitecture) -> None:
    """Raises InputError for sample prompts that cannot be read or drawn; that there are none is fine."""
    if params.prompts is None or not params.prompts.exists():
        return
    for prompt in read_prompts(params.prompts):
        prompt.size(architecture)
        for text in (prompt.text, prompt.negative):
            check_widths(params.prompts, text.context.shape[-1], text.pooled.shape[-1], architecture)


class Sampler:
    """Draws what is due with the weights as they would be saved; the VAE visits the device for it."""

    def __init__(self, samples: StepSamples, model: TrainedModel) -> None:
        self._samples, self._model = samples, model

    def __call__(self, progressed: Progressed) -> None:
        samples, network = self._samples, self._model.objective.network
        network.eval()
        if samples.vae is not None:
            samples.vae.to(samples.device)
        with self._model.weights.delivered(self._model.optimizer):
            samples.draw(progressed.step)
        if samples.vae is not None:
            samples.vae.to("cpu")  # its memory belongs to training in between
        network.train()

    def saved(self, step: int, adapter: Path) -> None:
        """Shares what was drawn at a step, once its adapter is saved."""
        if self._samples.shared is not None:
            self._samples.shared.saved(step, adapter)


def make_sampler(run: Run, model: TrainedModel) -> Sampler | None:
    """Returns what draws samples, or None without prompts or where it is never due."""
    params, inputs, mmdit = run.params, run.inputs, model.objective.mmdit
    if params.prompts is None or not params.samples.every:
        return None
    if not params.prompts.exists():
        log.warning(
            "%s: there are no encoded prompts, so no samples are drawn: encode-text --sample-prompts makes them",
            params.prompts,
        )
        return None
    defaults = DEFAULTS[params.samples.variant or mmdit.architecture.variant]
    shared = SharedSamples(
        store=PictureStore.beside(params.prompts),
        base=inputs.base,
        architecture=mmdit.architecture,
        defaults=defaults,
        precision=inputs.precision,
    )
    samples = StepSamples(
        run.folder,
        read_prompts(params.prompts)[: params.samples.max_sample_prompts],
        mmdit=mmdit,
        vae=_find_vae(params),
        defaults=defaults,
        device=run.processes.device,
        dtype=BASE_DTYPES[inputs.precision],
        network=None if params.network_weights else model.objective.network,
        shared=shared if _draws_as_sample(params) else None,
    )
    return Sampler(samples, model)


def _draws_as_sample(params: TrainParams) -> bool:
    """Whether the run draws with the very weights that its adapter files and its base hold.

    Packed or merged bases, eight-bit products, scaled positions and adapters that are saved in fewer bits than they
    have, or trained in bf16, draw other pictures than `sample` does with the files. Streaming changes no bit.
    """
    other_base = params.memory.base_dtype or params.memory.matmul_dtype or params.base_weights
    other_adapter = params.full_bf16 or params.saving.save_precision not in (None, "float")
    return not (other_base or other_adapter or params.positions.enable_scaled_pos_embed)


def _find_vae(params: TrainParams) -> VAE | None:
    try:
        return load_vae(find_component("vae", model=params.model, file=params.vae))
    except InputError as error:
        if params.vae is not None and params.vae.exists():
            raise
        log.warning("no VAE at hand, samples are kept as latents: `sd3pipe sample` decodes them elsewhere (%s)", error)
        return None
