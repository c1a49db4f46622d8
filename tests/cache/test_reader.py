"""Readers work in any process, and behind a URL as in a folder."""

import pickle

import fsspec
import pytest
import torch
from support import forked
from support.fake_cache import captions, fake_row, fill, wanted_texts

from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.rows import Tensor, from_numpy
from sd3pipe.cache.tensors import from_torch, to_torch
from sd3pipe.errors import InputError


@pytest.fixture
def out(tmp_path):
    fill(tmp_path / "caches" / "text", wanted_texts(captions(30)))
    return tmp_path / "caches" / "text"


@pytest.fixture
def url(out):
    """The same cache in fsspec's memory, as it would lie in a bucket."""
    files = fsspec.filesystem("memory")
    files.put(str(out), "/bucket/text", recursive=True)
    yield "memory://bucket/text"
    files.rm("/bucket", recursive=True)


def assert_reads_everything(reader):
    for caption in captions(30).values():
        (wanted,) = wanted_texts({"x": caption}).rows
        (key,) = wanted_texts({"x": caption}).keys
        expected = fake_row(wanted.source)
        assert {name: bytes(tensor.data) for name, tensor in reader.row(key).items()} == {
            name: bytes(tensor.data) for name, tensor in expected.items()
        }


def test_a_pickled_reader_reads_on(out):
    reader = CacheReader(out)
    reader.row(0)
    assert_reads_everything(pickle.loads(pickle.dumps(reader)))


def test_a_forked_reader_opens_its_own_files(out):
    reader = CacheReader(out)
    assert_reads_everything(reader)
    processes = [forked.start(lambda: assert_reads_everything(reader)) for _ in range(3)]
    assert [forked.exit_code(process) for process in processes] == [0, 0, 0]
    assert_reads_everything(reader)


def test_a_pickled_reader_refuses_another_cache(out):
    data = pickle.dumps(CacheReader(out))
    fill(out, wanted_texts(captions(31)))
    with pytest.raises(InputError, match="encoded again while it was being read"):
        pickle.loads(data)


def test_more_segments_than_a_process_may_open_are_read(out, monkeypatch):
    monkeypatch.setattr("sd3pipe.cache.cache_files._MOST_OPEN", 2)
    assert_reads_everything(CacheReader(out))


def test_a_cache_behind_a_url_reads_like_the_folder(out, url):
    here, there = CacheReader(out), CacheReader(url, verify_reads="always")
    assert_reads_everything(there)
    assert there.manifest == here.manifest and (there.keys == here.keys).all()
    assert there.samples.strings("name").to_list() == here.samples.strings("name").to_list()
    assert_reads_everything(pickle.loads(pickle.dumps(there)))


@pytest.mark.parametrize("where", ["memory://bucket/nothing", "nonsense://bucket/text"])
def test_a_url_without_a_cache_is_an_input_error(where):
    with pytest.raises(InputError, match=r"holds no finished cache|cannot be opened"):
        CacheReader(where)


def test_missing_rows_and_keys_are_input_errors(out):
    reader = CacheReader(out)
    with pytest.raises(InputError, match="has no row"):
        reader.number("0" * 64)
    for path in (out / "segments").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="neither in the cache nor among its unused rows"):
        reader.row(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8])
@pytest.mark.parametrize("shape", [(3, 5), (1,), (0, 4), ()])
def test_tensors_survive_the_way_there_and_back(dtype, shape):
    tensor = (torch.arange(20)[: torch.Size(shape).numel()] * 1.5).to(dtype).reshape(shape)
    stored = from_torch(tensor)
    assert torch.equal(to_torch(stored), tensor)
    assert torch.equal(to_torch(Tensor(stored.dtype, stored.shape, bytes(stored.data))), tensor)
    assert torch.equal(torch.from_numpy(stored.numpy().astype("float32")), tensor.float())


def test_types_that_rows_do_not_hold_are_refused():
    with pytest.raises(ValueError, match=r"not torch\.int64"):
        from_torch(torch.arange(3))
    with pytest.raises(ValueError, match="not float64"):
        from_numpy(torch.zeros(3, dtype=torch.float64).numpy())
