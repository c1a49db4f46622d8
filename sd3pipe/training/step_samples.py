"""Sample pictures while a run trains: one per prompt now and then, and a grid over the steps for each prompt."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from sd3pipe.console import Progress, progress
from sd3pipe.diffusion.kept_latents import keep_latents
from sd3pipe.diffusion.prompts import SamplePrompt
from sd3pipe.diffusion.sampler import SamplingSettings, decode_pictures
from sd3pipe.files import make_folder
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.models.vae import VAE
from sd3pipe.training.run_folder import RunFolder

log = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d+)")


class StepSamples:
    """Draws every prompt with the model as it stands and keeps the pictures in RUN/samples.

    RUN/samples/step-00000250/000.png is prompt 000 after 250 steps; RUN/samples/000.png shows all its steps side by
    side. Without a VAE the latents are kept as 000.safetensors instead, to be decoded elsewhere. Pictures that exist
    are not drawn again, so a resumed run continues its grids. Random numbers come from the prompts' seeds alone.
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
    ) -> None:
        self._run = run
        self.prompts, self.mmdit, self.vae = prompts, mmdit, vae
        self.defaults, self.device, self.dtype = defaults, device, dtype

    @property
    def folder(self) -> Path:
        return self._run.path / "samples"

    def draw(self, step: int) -> list[Path]:
        """Draws what is not there yet for a step, in eval mode, and returns the step's files. Raises Stopped."""
        folder = make_folder(self.folder / f"step-{step:08d}")
        suffix = ".safetensors" if self.vae is None else ".png"
        files = [folder / f"{prompt.name}{suffix}" for prompt in self.prompts]
        missing = [pair for pair in zip(self.prompts, files, strict=True) if not pair[1].is_file()]
        steps = sum(prompt.settings(self.defaults).steps for prompt, _ in missing)
        training = self.mmdit.training
        self.mmdit.eval()
        try:
            with progress(f"samples at step {step}", steps, "steps") as bar:
                for prompt, file in missing:
                    self._draw(prompt, file, bar)
        finally:
            self.mmdit.train(training)
        if self.vae is not None:
            self._update_grids()
        return files

    def _draw(self, prompt: SamplePrompt, file: Path, bar: Progress) -> None:
        latents = prompt.drawn(self.mmdit, self.defaults, self.device, self.dtype, on_step=bar.advance)
        if self.vae is None:
            keep_latents(file, latents, prompt=prompt.prompt)
            return
        from sd3pipe.diffusion.picture_grid import save_picture  # imports PIL, which a run without samples never needs

        save_picture(file, decode_pictures(self.vae, latents)[0].numpy(), title=prompt.prompt)

    def _update_grids(self) -> None:
        from sd3pipe.diffusion.picture_grid import Grid, read_picture_file, save_grid

        steps = sorted(
            (int(match[1]), folder) for folder in self.folder.iterdir() if (match := _STEP.fullmatch(folder.name))
        )
        for prompt in self.prompts:
            files = [folder / f"{prompt.name}.png" for _, folder in steps]
            pictures = [read_picture_file(file) if file.is_file() else None for file in files]
            grid = Grid(
                title=prompt.prompt, columns=[f"step {step}" for step, _ in steps], rows=[""], pictures=[pictures]
            )
            save_grid(self.folder / f"{prompt.name}.png", grid)
