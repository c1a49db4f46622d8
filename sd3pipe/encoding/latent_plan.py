"""What a latents cache is to hold for a dataset: rows and the samples table, before anything is encoded."""

from collections.abc import Mapping, Sequence

from sd3pipe.cache.keys import latents_source
from sd3pipe.cache.plan import WantedRow
from sd3pipe.cache.wanted import Wanted
from sd3pipe.data.dataset_file import Dataset
from sd3pipe.data.geometry import RECIPE_VERSION, View
from sd3pipe.data.scan import UnreadableFile
from sd3pipe.models.vae_architecture import VAEArchitecture

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def latents_wanted(
    views: Sequence[View],
    unreadable: Sequence[UnreadableFile],
    dataset: Dataset,
    architecture: VAEArchitecture,
    fingerprint: str,
    recipe: Mapping[str, str],
) -> Wanted:
    """Returns the whole content of the cache, a row for each view. `recipe`: latent_mode, latent_dtype, vae_dtype."""
    return Wanted(
        kind="latents",
        recipe_version=RECIPE_VERSION,
        fingerprints={"vae": fingerprint},
        recipe=recipe,
        rows=[_row(view, recipe, architecture) for view in views],
        samples={
            "name": [view.picture.name for view in views],
            "subset": [view.picture.subset.name for view in views],
            "image_hash": [view.picture.image_hash for view in views],
            "bucket_h": [view.cut.size[1] for view in views],
            "bucket_w": [view.cut.size[0] for view in views],
            "crop": [view.crop for view in views],
            "flip": [view.flip for view in views],
            "original_h": [view.picture.height for view in views],
            "original_w": [view.picture.width for view in views],
            "split": [view.picture.split for view in views],
            "key": range(len(views)),
        },
        subsets={subset.name: subset.weighting() for subset in dataset.subsets},
        unreadable=[file.to_json() for file in unreadable],
    )


def _row(view: View, recipe: Mapping[str, str], architecture: VAEArchitecture) -> WantedRow:
    width, height = view.cut.size
    latents = (width // architecture.downscale) * (height // architecture.downscale)
    channels = architecture.latent_channels * (2 if recipe["latent_mode"] == "moments" else 1)
    mask_bytes = 2 * latents if view.cut.mask else 0
    return WantedRow(
        source=latents_source(view.picture.image_hash, view.picture.mask_hash),
        recipe={**recipe, "cut": view.cut.recipe()},
        group=f"{height}x{width}" + ("+mask" if view.cut.mask else ""),
        nbytes=latents * channels * _ITEM_BYTES[recipe["latent_dtype"]] + mask_bytes,
    )
