"""What a latents cache is to hold for a dataset: rows, their keys and the samples table, before anything is encoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sd3pipe.cache.keys import latents_source
from sd3pipe.cache.plan import WantedRow
from sd3pipe.cache.wanted import Wanted
from sd3pipe.data.buckets import NoBucket
from sd3pipe.data.dataset_file import Dataset
from sd3pipe.data.geometry import RECIPE_VERSION, View, views
from sd3pipe.data.scan import Picture, Scan, UnreadablePicture
from sd3pipe.models.vae_architecture import VAEArchitecture

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row that the dataset wants, with the picture it comes from."""

    picture: Picture
    view: View


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Every row of a dataset in the order of the scan, and the pictures that give none."""

    samples: list[Sample]
    left_out: list[UnreadablePicture]
    pictures: int  # files, those left out included


def find_sources(found: Scan, *, crop_variants: int, seed: int) -> Sources:
    """Returns the rows that the scanned pictures give: every crop and flip."""
    samples: list[Sample] = []
    left_out = list(found.unreadable)
    for picture in found.pictures:
        try:
            cuts = views(picture, crop_variants=crop_variants, seed=seed)
        except NoBucket as error:
            left_out.append(_without_bucket(picture, str(error)))
            continue
        samples += [Sample(picture=picture, view=view) for view in cuts]
    return Sources(samples=samples, left_out=left_out, pictures=len(found.pictures) + len(found.unreadable))


def latents_wanted(
    sources: Sources, dataset: Dataset, architecture: VAEArchitecture, fingerprint: str, recipe: Mapping[str, str]
) -> Wanted:
    """Returns the whole content of the cache. `recipe` has latent_mode, latent_dtype and vae_dtype."""
    columns = _columns(sources.samples)
    wanted = Wanted(
        kind="latents",
        recipe_version=RECIPE_VERSION,
        fingerprints={"vae": fingerprint},
        recipe=recipe,
        rows=[_row(sample, recipe, architecture) for sample in sources.samples],
        samples=columns,
        subsets={subset.name: subset.weighting() for subset in dataset.subsets},
        quarantined=[
            {"name": item.name, "subset": item.subset, "image_hash": item.image_hash or "", "reason": item.reason}
            for item in sources.left_out
        ],
    )
    columns["key"] = list(wanted.keys)  # keys are computed from the rows, once
    return wanted


def _row(sample: Sample, recipe: Mapping[str, str], architecture: VAEArchitecture) -> WantedRow:
    cut = sample.view.cut
    width, height = cut.size
    latents = (width // architecture.downscale) * (height // architecture.downscale)
    channels = architecture.latent_channels * (2 if recipe["latent_mode"] == "moments" else 1)
    mask_bytes = 2 * latents if cut.mask else 0
    return WantedRow(
        source=latents_source(sample.picture.image_hash, sample.picture.mask_hash),
        recipe={**recipe, "cut": cut.recipe()},
        group=f"{height}x{width}" + ("+mask" if cut.mask else ""),
        nbytes=latents * channels * _ITEM_BYTES[recipe["latent_dtype"]] + mask_bytes,
    )


def _columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Returns the samples table but for its keys."""
    pictures, cuts = [sample.picture for sample in samples], [sample.view.cut for sample in samples]
    return {
        "name": [picture.name for picture in pictures],
        "subset": [picture.subset.name for picture in pictures],
        "image_hash": [picture.image_hash for picture in pictures],
        "bucket_h": [cut.size[1] for cut in cuts],
        "bucket_w": [cut.size[0] for cut in cuts],
        "crop": [sample.view.crop for sample in samples],
        "flip": [sample.view.flip for sample in samples],
        "original_h": [picture.height for picture in pictures],
        "original_w": [picture.width for picture in pictures],
        "split": [picture.split for picture in pictures],
    }


def _without_bucket(picture: Picture, reason: str) -> UnreadablePicture:
    return UnreadablePicture(
        path=picture.path,
        name=picture.name,
        subset=picture.subset.name,
        image_hash=picture.image_hash,
        reason=reason,
    )
