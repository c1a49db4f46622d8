"""An index whose hash is right and whose columns contradict each other is no index, wherever they are used later."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.fake_cache import captions, fill, wanted_texts

from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.zarr_group import arrays_hash, write_group
from sd3pipe.errors import InputError

Arrays = dict[str, np.ndarray]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    fill(tmp_path / "text", wanted_texts(captions(9)))
    return tmp_path / "text"


def change_index(cache: Path, change: Callable[[Arrays], object]) -> None:
    """Publishes a changed index under its true hash, as somebody would who means harm."""
    arrays = {name: np.array(array) for name, array in CacheReader(cache).index.arrays.items()}
    change(arrays)
    digest = arrays_hash(arrays)
    shutil.rmtree(cache / "index")
    write_group(cache / "index" / f"{digest}.zarr", arrays)
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, "index": digest}))


def put(name: str, place: int, value: int) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name][place] = value

    return change


def cut(name: str) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({name: arrays[name][:-1]})


def text(name: str, value: bytes) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({name: np.frombuffer(value, np.uint8)})


DAMAGE = {
    "segment out of range": put("row_segment", 0, 99),
    "layout out of range": put("row_layout", 3, 99),
    "row beyond its segment": put("row_offset", 3, 2**63),
    "row of another size": put("row_bytes", 3, 2**64 - 1),
    "segment of no size": put("segment_bytes", 0, 0),
    "keys out of order": lambda arrays: arrays.update(row_key=arrays["row_key"][::-1].copy()),
    "fewer offsets": cut("row_offset"),
    "fewer digests": cut("row_digest"),
    "fewer segments": cut("segment_id"),
    "sample of no row": put("sample_row", 0, 99),
    "fewer samples": cut("sample_variant"),
    "negative variant": put("sample_variant", 0, -1),
    "text that ends before it begins": put("sample_name_ends", 1, 0),
    "texts that are not all there": cut("sample_name_bytes"),
    "subset out of range": put("sample_subset_code", 0, 99),
    "layouts that are no JSON": text("layouts", b"[" * 5000),
    "layouts of another shape": text("layouts", b'[[["a", "F64", [1]]]]'),
    "layouts beyond all sizes": text("layouts", b'[[["a", "F32", [' + b"1099511627775, " * 9 + b"1]]]]"),
    "another number format": lambda arrays: arrays.update(row_key=arrays["row_key"].astype(np.int32)),
    "another shape": lambda arrays: arrays.update(row_offset=arrays["row_offset"].reshape(-1, 1)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_columns_that_contradict_each_other_are_refused(cache, name):
    change_index(cache, DAMAGE[name])
    with pytest.raises(InputError, match="the index cannot be understood"):
        CacheReader(cache)


def test_an_index_that_is_rewritten_as_it_is_is_read(cache):
    rows = len(CacheReader(cache))
    change_index(cache, lambda arrays: None)
    assert len(CacheReader(cache)) == rows


@pytest.mark.parametrize(
    "metadata", ['{"data_type": "uint8", "shape": [-1, 32]}', '{"data_type": "str", "shape": [1]}', "[]", "[" * 99999]
)
def test_metadata_that_is_none_is_refused(cache, metadata):
    reader = CacheReader(cache)
    (cache / "index" / f"{reader.manifest.index}.zarr" / "row_key" / "zarr.json").write_text(metadata)
    with pytest.raises(InputError, match="array row_key of the index cannot be read"):
        CacheReader(cache)
