"""A cache is read in place from s3://, here from a local server that speaks S3."""

import pytest
from support import forked
from support.buckets import local_s3, put
from support.fake_cache import captions, fake_row, fill, wanted_texts

from sd3pipe.cache.reader import CacheReader

COUNT = 12


@pytest.fixture
def url(tmp_path, monkeypatch):
    """The address of a cache in a bucket; where the bucket is, the environment says, as for any S3 program."""
    fill(tmp_path / "text", wanted_texts(captions(COUNT)))
    with local_s3(monkeypatch) as files:
        yield put(files, tmp_path / "text", "caches/text")


def assert_reads_everything(reader):
    wanted = wanted_texts(captions(COUNT))
    for key, row in zip(wanted.keys, wanted.rows, strict=True):
        assert bytes(reader.row(key)["hidden"].data) == bytes(fake_row(row.source)["hidden"].data)


@pytest.mark.long
def test_a_cache_in_a_bucket_is_read_here_and_in_forked_workers(url):
    reader = CacheReader(url, verify_reads="always")
    assert_reads_everything(reader)
    workers = [forked.start(lambda: assert_reads_everything(reader)) for _ in range(2)]
    assert [forked.exit_code(worker) for worker in workers] == [0, 0]
    assert_reads_everything(reader)
