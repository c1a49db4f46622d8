"""The format is what docs/cache-format.md says, for a reader written from that page, for safetensors and for zarr."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from blake3 import blake3
from safetensors import safe_open
from support.comparing import folder_bytes
from support.fake_cache import captions, fake_row, fill, wanted_texts

from sd3pipe.cache.keys import Ingredients, latents_source, text_source
from sd3pipe.cache.plan import plan_leaves, rows_per_segment
from sd3pipe.cache.reader import CacheReader

ITEMS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}


class IndependentReader:
    """Reads a cache by docs/cache-format.md, with nothing of sd3pipe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["format"] == 1
        self.index = folder / "index" / f"{manifest['index']}.zarr"
        self.layouts = json.loads(self.array("layouts").tobytes())
        ends = self.array("sample_name_ends").tolist()
        text = self.array("sample_name_bytes").tobytes()
        self.names = [text[start:end].decode() for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def array(self, name: str) -> np.ndarray:
        about = json.loads((self.index / name / "zarr.json").read_text())
        chunk = self.index / name / ".".join(["c"] + ["0"] * len(about["shape"]))
        data = chunk.read_bytes() if chunk.exists() else b""
        return np.frombuffer(data, np.dtype(about["data_type"]).newbyteorder("<")).reshape(about["shape"])

    def row(self, sample: int) -> dict[str, np.ndarray]:
        number = self.array("sample_row")[sample]
        segment = self.array("segment_id")[self.array("row_segment")[number]].tobytes().hex()
        start, size = self.array("row_offset")[number], self.array("row_bytes")[number]
        with open(self.folder / "segments" / f"{segment}.safetensors", "rb") as file:
            file.seek(int(start))
            data = file.read(int(size))
        assert blake3(data).digest() == self.array("row_digest")[number].tobytes()
        row = {}
        for name, dtype, shape in self.layouts[self.array("row_layout")[number]]:
            count = int(np.prod(shape))
            row[name] = np.frombuffer(data, ITEMS[dtype], count).reshape(shape)
            data = data[row[name].nbytes :]
        return row


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    out = tmp_path_factory.mktemp("format") / "caches" / "text"
    fill(out, wanted_texts(captions(30)))
    return out


def test_a_reader_written_from_the_documentation_reads_every_row(cache):
    reader = IndependentReader(cache)
    assert reader.names == sorted(captions(30))
    for sample, name in enumerate(reader.names):
        expected = fake_row(text_source(captions(30)[name]))
        got = reader.row(sample)
        assert {key: value.tobytes() for key, value in got.items()} == {
            key: bytes(tensor.data) for key, tensor in expected.items()
        }


def test_the_index_hash_is_the_documented_one(cache):
    reader, hasher = IndependentReader(cache), blake3()
    for folder in sorted(path for path in reader.index.iterdir() if path.is_dir()):
        about = json.loads((folder / "zarr.json").read_text())
        hasher.update(json.dumps([folder.name, about["data_type"], about["shape"]], separators=(",", ":")).encode())
        hasher.update(reader.array(folder.name).tobytes())
    assert reader.index.name == f"{hasher.hexdigest()}.zarr"


def test_safetensors_reads_the_segments(cache):
    rows = 0
    for path in (cache / "segments").iterdir():
        with safe_open(path, "numpy") as file:
            keys = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118 - it is no dict
            facts = json.loads(file.metadata()["sd3pipe"])
            for key, _, _, source, _, version in facts["rows"]:
                assert key in keys and facts["versions"][version] == "fake 1"
                assert np.array_equal(file.get_tensor(f"{key}.hidden"), fake_row(source)["hidden"].numpy())
                rows += 1
    assert rows == 30


def test_zarr_reads_the_index(cache):
    reader, ours = IndependentReader(cache), CacheReader(cache).index
    group = zarr.open_group(reader.index, mode="r")
    assert set(group.array_keys()) == set(ours.arrays)
    for name, array in ours.arrays.items():
        assert np.array_equal(group[name][:], array) and group[name].dtype == array.dtype


def test_keys_follow_the_documentation():
    ingredients = {"fingerprints": {"vae": "ab"}, "format": 1, "kind": "latents", "recipe": {"flip": True, "a": "ü"}}
    ingredients |= {"recipe_version": 3, "source": "cd"}
    text = json.dumps(ingredients, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    given = {name: ingredients[name] for name in ("recipe", "recipe_version", "fingerprints")}
    assert Ingredients(**given).key("latents", "cd") == blake3(text.encode()).hexdigest()
    assert latents_source("ab", "cd") == blake3(b'{"image":"ab","mask":"cd"}').hexdigest()
    assert text_source("\ufeffa\r\nb\rc") == text_source("a\nb\nc") == blake3(b"a\nb\nc").hexdigest()
    assert len({text_source(text) for text in ("a b", "a  b", "a\nb", "A b", "a b ")}) == 5


@pytest.mark.long
def test_leaves_hold_at_most_n_rows_and_one_row_more_touches_one_leaf():
    keys = [blake3(str(number).encode()).hexdigest() for number in range(500)]
    nbytes = (96 << 20) // 8
    assert rows_per_segment(nbytes) == 8 and rows_per_segment(nbytes + 1) == 4 and rows_per_segment(1 << 40) == 1
    before = {leaf.plan_id for leaf in plan_leaves("text", [(key, "text", nbytes) for key in keys])}
    for extra in range(500, 800):
        more = [*keys, blake3(str(extra).encode()).hexdigest()]
        leaves = plan_leaves("text", [(key, "text", nbytes) for key in reversed(more)])
        assert all(1 <= len(leaf.keys) <= 8 for leaf in leaves)
        assert len(before - {leaf.plan_id for leaf in leaves}) == 1


@pytest.mark.long
@pytest.mark.parametrize("name", ["00123.png", pytest.param("10500.png", marks=pytest.mark.slow)])
def test_one_row_more_or_less_in_ten_thousand_moves_one_segment(tmp_path, name):
    out = tmp_path / "text"
    dataset = captions(10_000)
    fill(out, wanted_texts(dataset, rows_per_segment=64))
    before = folder_bytes(out)
    if name in dataset:
        del dataset[name]
    else:
        dataset[name] = "one more"
    fill(out, wanted_texts(dataset, rows_per_segment=64))
    after = folder_bytes(out)
    gone = {path for path in before if path.startswith("segments") and path not in after}
    new = {path for path in after if path.startswith("segments") and path not in before}
    assert len(gone) in (1, 2) and len(new) in (1, 2)
    assert all(after[path] == before[path] for path in set(before) & set(after) - {"manifest.json"})
    assert sum(len(after[path]) for path in new) < 0.02 * sum(map(len, after.values()))


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_have_the_permissions_that_the_user_asked_for(tmp_path, mask):
    old = os.umask(mask)
    try:
        fill(tmp_path / "text", wanted_texts(captions(5)))
    finally:
        os.umask(old)
    for path in (tmp_path / "text").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask


@pytest.mark.long
def test_filling_and_reading_import_neither_torch_nor_zarr(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import support.fake_cache as f;"
        "from sd3pipe.cache.reader import CacheReader; import sd3pipe.cache.join, sd3pipe.cache.staleness;"
        "out = Path(sys.argv[2]); f.fill(out, f.wanted_texts(f.captions(3))); CacheReader(out).row(0);"
        "print(sorted({'torch', 'zarr', 'transformers', 'PIL', 'fsspec'} & set(sys.modules)))"
    )
    tests = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code, tests, tmp_path / "text"], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
