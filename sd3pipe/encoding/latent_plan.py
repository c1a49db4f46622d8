"""What a latents cache is to hold for a dataset: rows and the samples table, before anything is encoded."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from sd3pipe.cache.keys import latents_source
from sd3pipe.cache.plan import WantedRow
from sd3pipe.cache.wanted import Wanted
from sd3pipe.data.cut import Cut
from sd3pipe.data.dataset_file import Dataset
from sd3pipe.data.geometry import RECIPE_VERSION, View, views_of_all
from sd3pipe.data.scan import UnreadableFile
from sd3pipe.encoding.stage import DatasetRead, none_usable
from sd3pipe.models.vae_architecture import VAEArchitecture
from sd3pipe.params.encode_latents import EncodeLatentsParams
from sd3pipe.words import FORMAT_BYTES


def usable_views(read: DatasetRead, params: EncodeLatentsParams) -> tuple[list[View], list[UnreadableFile]]:
    """Returns every row of a dataset's pictures, and the files that give none. Raises InputError if none gives any."""
    views, unreadable = views_of_all(read.found, crop_variants=params.crop_variants, seed=params.seed)
    if not views:
        raise none_usable(read.dataset, unreadable)
    return [view for of_picture in views for view in of_picture], unreadable


def latent_recipe(params: EncodeLatentsParams) -> dict[str, str]:
    """Returns what the options say about the rows' numbers."""
    return {"latent_mode": params.latent_mode, "latent_dtype": params.latent_dtype, "vae_dtype": params.vae_dtype}


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
        rows=_rows(views, recipe, architecture),
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


def _rows(views: Sequence[View], recipe: Mapping[str, str], architecture: VAEArchitecture) -> list[WantedRow]:
    """Returns a row for each view; equal cuts share one recipe."""
    moments, value_bytes = recipe["latent_mode"] == "moments", FORMAT_BYTES[recipe["latent_dtype"]]

    @functools.cache
    def of_cut(cut: Cut) -> dict[str, Any]:
        width, height = cut.size
        mask_bytes = 2 * (width // architecture.downscale) * (height // architecture.downscale) if cut.mask else 0
        return {
            "recipe": {**recipe, "cut": cut.recipe()},
            "group": f"{height}x{width}" + ("+mask" if cut.mask else ""),
            "nbytes": architecture.row_bytes(cut.size, moments=moments, value_bytes=value_bytes) + mask_bytes,
        }

    return [
        WantedRow(source=latents_source(view.picture.image_hash, view.picture.mask_hash), **of_cut(view.cut))
        for view in views
    ]
