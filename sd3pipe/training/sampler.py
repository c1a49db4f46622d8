"""Draws sample pictures with the adapter as it would be saved."""

import logging

from sd3pipe.diffusion.precision import BASE_DTYPES
from sd3pipe.diffusion.prompts import read_prompts
from sd3pipe.diffusion.sampler import DEFAULTS
from sd3pipe.errors import InputError
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.checkpoint import load_vae
from sd3pipe.models.sources import find_component
from sd3pipe.models.vae import VAE
from sd3pipe.params.train import TrainParams
from sd3pipe.training.processes import Processes
from sd3pipe.training.progressed import Progressed
from sd3pipe.training.run_folder import RunFolder
from sd3pipe.training.step_samples import StepSamples
from sd3pipe.training.trained_model import TrainedModel
from sd3pipe.training.training_data import check_widths
from sd3pipe.words import Precision

log = logging.getLogger(__name__)


class Sampler:
    """Draws the sample prompts with the weights as they would be saved."""

    def __init__(self, samples: StepSamples, model: TrainedModel) -> None:
        self._samples, self._model = samples, model

    def __call__(self, progressed: Progressed) -> None:
        network, samples = self._model.objective.network, self._samples
        network.eval()
        if samples.vae is not None:
            samples.vae.to(samples.device)
        with self._model.weights.delivered(self._model.optimizer):
            samples.draw(progressed.step)
        if samples.vae is not None:
            samples.vae.to("cpu")  # its memory belongs to training in between
        network.train()


def check_prompts(params: TrainParams, architecture: MMDiTArchitecture) -> None:
    """Raises InputError for sample prompts that cannot be read or drawn; that there are none is fine."""
    if params.prompts is None or not params.prompts.exists():
        return
    for prompt in read_prompts(params.prompts):
        for text in (prompt.text, prompt.negative):
            check_widths(params.prompts, text.context.shape[-1], text.pooled.shape[-1], architecture)


def make_sampler(
    params: TrainParams,
    run: RunFolder,
    model: TrainedModel,
    processes: Processes,
    precision: Precision,
) -> Sampler | None:
    """Returns what draws samples, or None without prompts or where they are never due."""
    if params.prompts is None or not params.samples.every:
        return None
    if not params.prompts.exists():
        log.warning(
            "%s: there are no encoded prompts, so no samples are drawn: encode-text --sample-prompts makes them",
            params.prompts,
        )
        return None
    mmdit = model.objective.mmdit
    samples = StepSamples(
        run,
        read_prompts(params.prompts),
        mmdit=mmdit,
        vae=_find_vae(params),
        defaults=DEFAULTS[params.samples.variant or mmdit.architecture.variant],
        device=processes.device,
        dtype=BASE_DTYPES[precision],
    )
    return Sampler(samples, model)


def _find_vae(params: TrainParams) -> VAE | None:
    try:
        return load_vae(find_component("vae", model=params.model, file=params.vae))
    except InputError as error:
        if params.vae is not None and params.vae.exists():
            raise
        log.warning("no VAE at hand, samples are kept as latents: `sd3pipe sample` decodes them elsewhere (%s)", error)
        return None
