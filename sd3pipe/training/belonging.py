"""What a run is given that does not belong together, in the user's words: no error, for some mean it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sd3pipe.cache.reader import CacheReader
from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.models.layouts import TITLES
from sd3pipe.models.sources import find_component
from sd3pipe.params.train import TrainParams
from sd3pipe.training.training_data import TrainingData

_HASH_DIGITS = 12


def misfits(params: TrainParams, data: TrainingData, stamps: FileStamps) -> Iterator[str]:
    """Yields a sentence for each pair that does not fit, with both sides named."""
    vae, latents = None, data.latents.manifest.fingerprints.get("vae")
    if params.vae is not None or Path(params.model).expanduser().exists():  # nothing is fetched to find one
        with contextlib.suppress(InputError):
            vae = find_component("vae", model=params.model, file=params.vae)
    if vae is not None and latents is not None:
        own = vae.fingerprint(stamps)
        if own != latents:
            yield (
                f"{params.latents} was encoded with VAE {_short(latents)}, and {vae.where} holds VAE {_short(own)}: "
                "the adapter learns other latents than it is used with; encode them again, or name the right --vae"
            )
    if params.prompts is None or not params.prompts.exists():
        return
    text, prompts = data.text.manifest, CacheReader(params.prompts).manifest
    titles: dict[str, str] = {**TITLES}
    encoders = {
        titles.get(name, name): (text.fingerprints[name], prompts.fingerprints[name])
        for name in text.fingerprints.keys() & prompts.fingerprints.keys()
    }
    settings = {name: (text.recipe.get(name), prompts.recipe.get(name)) for name in {**text.recipe, **prompts.recipe}}
    for what, pairs in (("encoders", encoders), ("options", settings)):
        odd = {name: pair for name, pair in sorted(pairs.items()) if pair[0] != pair[1]}
        if odd:
            ours, theirs = (", ".join(f"{name} {_short(pair[side])}" for name, pair in odd.items()) for side in (0, 1))
            yield (
                f"{params.text} was encoded with {ours}, and {params.prompts} with {theirs}: samples are drawn of "
                f"other texts than are trained on; run encode-text for both with the same {what}"
            )


def _short(value: object) -> str:
    """Returns a setting, or the start of a fingerprint."""
    text = "unset" if value is None else str(value)
    return f"{text[:_HASH_DIGITS]}..." if len(text) > _HASH_DIGITS else text
