"""`sd3pipe encode-latents`: pictures to VAE latents, one row per picture, crop and flip, in a cache."""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sd3pipe.cache.folder import MANIFEST, machine_folder, weight_stamps
from sd3pipe.cache.manifest import read_manifest
from sd3pipe.cache.rows import Row
from sd3pipe.cache.store import FillCounts
from sd3pipe.console import count, listed, one_line, progress
from sd3pipe.data.buckets import cut_by_limit
from sd3pipe.data.geometry import RECIPE_VERSION, View
from sd3pipe.data.scan import UnreadableFile, tell_about_pictures
from sd3pipe.encoding.latent_plan import latent_recipe, latents_wanted, usable_views
from sd3pipe.encoding.repetition import Repetition
from sd3pipe.encoding.stage import DatasetRead, Encoding, Outlook, read_dataset, run
from sd3pipe.errors import QuarantineError, UnreadablePicture
from sd3pipe.file_stamps import FileStamps
from sd3pipe.models.sources import ComponentSource, find_component
from sd3pipe.models.vae_architecture import VAEArchitecture, detect_vae
from sd3pipe.params.encode_latents import EncodeLatentsParams

if TYPE_CHECKING:
    from sd3pipe.models.latent_encoding import LatentEncoder


def main(params: EncodeLatentsParams) -> None:
    """Fills the latents cache of a dataset. Raises QuarantineError after publishing if too much is unreadable."""
    run(
        params,
        _prepare,
        stage=_Latents.stage,
        out=params.out,
        inputs=params.as_inputs("dataset", "model", "vae"),
        repetition=lambda: Repetition(
            params.out, params.dataset, lambda: _goes_by(params), captions=False, trust=not params.rehash
        ),
    )


def _goes_by(params: EncodeLatentsParams) -> dict[str, Any]:
    """Returns what makes the rows, beside the pictures."""
    stamps = weight_stamps(params.out, trust=not params.rehash)
    vae = find_component("vae", model=params.model, file=params.vae).fingerprint(stamps)
    stamps.save()
    return {"vae": vae, "recipe_version": RECIPE_VERSION, "options": params.model_dump(mode="json")}


@dataclass(frozen=True, kw_only=True)
class _Latents(Encoding):
    """The rows of a dataset's pictures, made by a VAE."""

    stage = "encode-latents"
    parts_per_worker = 4  # small enough that none waits long for the last

    params: EncodeLatentsParams
    read: DatasetRead
    views: list[View]  # one for each of the wanted rows
    unreadable: list[UnreadableFile]
    vae: ComponentSource
    architecture: VAEArchitecture

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("torch",)

    @property
    def pictures(self) -> int:
        """How many files there are, the unreadable ones among them."""
        return len(self.read.found.pictures) + len(self.read.found.unreadable)

    def remark(self) -> str:
        return f", {len(self.unreadable)} of {count(self.pictures, 'picture')} left out"

    def facts(self) -> dict[str, Any]:
        sizes = Counter(view.cut.size for view in self.views)
        splits = Counter(view.picture.split for view in self.views)
        return {
            "pictures": self.pictures,
            "buckets": {f"{width}x{height}": rows for (width, height), rows in sorted(sizes.items())},
            "train_rows": splits["train"],
            "validation_rows": splits["validation"],
        }

    def ending(self, counts: FillCounts) -> tuple[dict[str, Any], str]:
        return {}, _below_resolution(self.views)

    def check(self, counts: FillCounts) -> None:
        params = self.params
        limit = params.quarantine_limit(self.pictures)
        if counts.quarantined <= limit:
            return
        manifest = read_manifest(params.out / MANIFEST)
        names = [one_line(entry["name"]) for entry in manifest.quarantined] if manifest else []
        allowed = "--strict allows none" if params.strict else f"--max-quarantined allows {limit}"
        raise QuarantineError(
            f"{params.out}: {counts.quarantined} of {count(self.pictures, 'picture')} unreadable, {allowed}: "
            f"{listed(names)}: repair or remove them (their reasons stand in "
            f"{params.out / MANIFEST}); the others are encoded"
        )

    @functools.cached_property
    def view_by_key(self) -> dict[str, View]:
        return dict(zip(self.wanted.keys, self.views, strict=True))

    @functools.cached_property
    def encoder(self) -> "LatentEncoder":
        from sd3pipe.encoding.latent_rows import load_encoder  # imports torch, which a run without work never needs

        return load_encoder(self.vae, self.params)

    def encode(self, keys: Sequence[str]) -> Iterator[tuple[str, Row | UnreadablePicture]]:
        from sd3pipe.encoding.latent_rows import encoded_rows  # imports torch

        views = [self.view_by_key[key] for key in keys]
        with progress(self.stage, len(keys), "rows") as bar:
            for item in encoded_rows(keys, views, self.encoder, self.architecture, self.params):
                bar.advance()
                yield item

    def outlook(self, keys: Sequence[str]) -> Outlook:
        from sd3pipe.encoding.latent_rows import device_speed  # imports torch, only to tell the time

        sizes = (self.view_by_key[key].cut.size for key in keys)
        device, pixels_per_second = device_speed(self.architecture, self.params)
        pixels = sum(width * height for width, height in sizes)
        return Outlook(device=device, seconds=pixels / pixels_per_second)


def _prepare(params: EncodeLatentsParams) -> _Latents:
    """Reads the headers of VAE and pictures, and the dataset. Raises InputError if no picture can be used."""
    vae = find_component("vae", model=params.model, file=params.vae)  # before all pictures are read in vain
    architecture = detect_vae(vae.shapes(), vae.where)
    stamps = FileStamps(machine_folder(params.out) / "stat.json", trust=not params.rehash)
    read = read_dataset(params.dataset, stamps, captions=False)
    tell_about_pictures(read.found)
    views, unreadable = usable_views(read, params)
    weights = weight_stamps(params.out, trust=not params.rehash)
    fingerprint = vae.fingerprint(weights)
    wanted = latents_wanted(views, unreadable, read.dataset, architecture, fingerprint, latent_recipe(params))
    if not params.dry_run:
        stamps.save()
        weights.save()
    return _Latents(
        params=params,
        out=params.out,
        wanted=wanted,
        read=read,
        views=views,
        unreadable=unreadable,
        vae=vae,
        architecture=architecture,
    )


def _below_resolution(views: Sequence[View]) -> str:
    """Returns words about rows that max_bucket_reso makes much smaller than the resolution, if there are any."""
    small = [view for view in views if cut_by_limit(view.cut.size, view.picture.subset.bucketing)]
    if not small:
        return ""
    width, height = Counter(view.cut.size for view in small).most_common(1)[0][0]
    bucketing = small[0].picture.subset.bucketing
    return (
        f", {count(len(small), 'row')} smaller than the resolution ({width} x {height} instead of the area of "
        f"{bucketing.width} x {bucketing.height}: max_bucket_reso = {bucketing.max_bucket_reso} cuts the longer side)"
    )
