"""The pictures that are compared: drawn where they are missing, decoded, shown small, and turned into embeddings.

Latents of drawn pictures lie in the store that `sample` shares, embeddings in rows beside it: each is made once.
"""

# C latent channels, h w latent pixels, D embedding width

import functools
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image

from sd3pipe import stopping
from sd3pipe.cache.folder import machine_folder
from sd3pipe.cache.keys import Ingredients
from sd3pipe.cache.reader import CacheReader
from sd3pipe.console import progress
from sd3pipe.device_memory import decode_way_out, memory_errors
from sd3pipe.diffusion.drawing import Cell
from sd3pipe.diffusion.kept_latents import read_latents, read_parameters
from sd3pipe.diffusion.picture_store import PictureStore, shared_folder
from sd3pipe.diffusion.sampler import decode_pictures
from sd3pipe.files import write_bytes
from sd3pipe.fingerprint import hash_bytes
from sd3pipe.judging.judge_model import JudgeModel
from sd3pipe.judging.references import Reference, mean_latents
from sd3pipe.judging.rows import ResultKey, ResultRows, in_batches, result_key
from sd3pipe.models.checkpoint import load_vae
from sd3pipe.models.sources import ComponentSource
from sd3pipe.models.vae import VAE

RECIPE_VERSION = 1  # raised when our own code makes other embeddings of the same picture
_BATCH = 32  # embeddings that a process that is killed may lose
_THUMBNAIL_PX = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeStore:
    """Where judged pictures and embeddings lie, and what makes them; `vae` and `judge` are fingerprints."""

    store: PictureStore
    rows: ResultRows
    thumbnails: Path
    vae: str
    judge: str

    def picture_key(self, cell: Cell) -> ResultKey:
        return self._key({"drawn": cell.key, "vae": self.vae})

    def reference_key(self, reference: Reference) -> ResultKey:
        return self._key({"latents": reference.key, "vae": self.vae})

    def text_key(self, text: str) -> ResultKey:
        return self._key({"text": hash_bytes(text.encode("utf-8", "surrogatepass"))})

    def thumbnail(self, cell: Cell) -> Path:
        return self.thumbnails / f"{cell.name}.jpg"

    def _key(self, source: dict[str, str]) -> ResultKey:
        return result_key(
            "embeddings",
            source,
            Ingredients(recipe={}, recipe_version=RECIPE_VERSION, fingerprints={"judge": self.judge}),
        )


def open_judge_store(prompts: Path, out: Path, *, vae: str, judge: str) -> JudgeStore:
    """Returns the places beside the prompts' cache; where nothing can be written there, beside `out`."""
    store = PictureStore.beside(prompts)
    return JudgeStore(
        store=store if store.folder else PictureStore(machine_folder(out) / "pictures"),
        rows=ResultRows(shared_folder(prompts, "embeddings") or machine_folder(out) / "embeddings", "embeddings"),
        thumbnails=out / "pictures",
        vae=vae,
        judge=judge,
    )


def to_draw(seen: JudgeStore, cells: Sequence[Cell], shown: Sequence[Cell]) -> list[Cell]:
    """Returns the pictures whose latents are needed, for an embedding or a thumbnail, and not there."""
    return [cell for cell in _to_decode(seen, cells, shown) if not seen.store.has(cell.key)]


def embed(
    seen: JudgeStore,
    cells: Sequence[Cell],
    shown: Sequence[Cell],
    references: Sequence[Reference],
    texts: Sequence[str],
    *,
    latents: CacheReader,
    vae_source: ComponentSource,
    judge_folder: Path,
    device: torch.device,
) -> int:
    """Makes the embeddings and thumbnails that are missing, and returns how many embeddings. Loads nothing for none.

    `texts` is empty for a judge model that reads none. Raises DeviceMemoryError, InputError, Stopped.
    """
    decoded = _to_decode(seen, cells, shown)
    missing = {item.key for item in seen.rows.missing([seen.reference_key(reference) for reference in references])}
    waiting = [reference for reference in references if seen.reference_key(reference).key in missing]
    unread = [text for text in texts if seen.rows.missing([seen.text_key(text)])]
    if not (decoded or waiting or unread):
        return 0
    total = len(decoded) + len(waiting) + len(unread)
    with (
        memory_errors(functools.partial(decode_way_out, device)),
        progress("judge: look", total, "pictures and texts") as bar,
    ):
        model = JudgeModel(judge_folder, device)

        def rows() -> Iterator[tuple[ResultKey, NDArray[np.float32]]]:
            for text in dict.fromkeys(unread):
                yield seen.text_key(text), model.text(text)
                bar.advance()
            if not (decoded or waiting):
                return
            vae = load_vae(vae_source, device=device)
            channels = vae.architecture.latent_channels
            for reference in waiting:
                stopping.check()
                yield seen.reference_key(reference), model.picture(_decoded(vae, mean_latents(latents, reference.row)))
                bar.advance()
            for cell in decoded:
                stopping.check()
                picture = _decoded(vae, read_latents(seen.store.file(cell.key), channels)[0])
                if cell in shown:
                    parameters = read_parameters(seen.store.file(cell.key))
                    write_bytes(seen.thumbnail(cell), _small(picture, parameters))
                key = seen.picture_key(cell)
                if seen.rows.missing([key]):
                    yield key, model.picture(picture)
                bar.advance()

        return seen.rows.add(in_batches(rows(), _BATCH))


def _to_decode(seen: JudgeStore, cells: Sequence[Cell], shown: Sequence[Cell]) -> list[Cell]:
    lacking = {item.key for item in seen.rows.missing([seen.picture_key(cell) for cell in cells])}
    unseen = {cell.key for cell in shown if not seen.thumbnail(cell).is_file()}
    return [cell for cell in cells if seen.picture_key(cell).key in lacking or cell.key in unseen]


def _decoded(vae: VAE, latents_Chw: torch.Tensor) -> NDArray[np.uint8]:
    device = next(vae.parameters()).device
    return decode_pictures(vae, latents_Chw[None].to(device))[0].numpy()


def _small(picture: NDArray[np.uint8], parameters: str) -> bytes:
    """Returns a thumbnail that says what it was drawn with, where the web's tools look in a JPEG: in its comment."""
    image = Image.fromarray(picture)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + parameters.encode("utf-16-be")
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=85, exif=exif)
    return data.getvalue()
