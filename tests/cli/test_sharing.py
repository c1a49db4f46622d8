"""--shard says which part a process does; under torchrun its rank does, unless --shard is given."""

import pytest

from sd3pipe.errors import ParameterError
from sd3pipe.params.encode_latents import EncodeLatentsParams
from sd3pipe.params.resolve import resolve
from sd3pipe.params.stage import shard_of_process

GIVEN = {"model": "m", "dataset": "d.toml", "out": "o"}


def test_a_process_alone_does_everything(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert shard_of_process(None) == (0, 1)


def test_a_rank_does_its_part_and_the_option_beats_it(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert shard_of_process(resolve(EncodeLatentsParams, "encode-latents", GIVEN).shard) == (2, 5)
    assert shard_of_process(resolve(EncodeLatentsParams, "encode-latents", {**GIVEN, "shard": "1/3"}).shard) == (1, 3)


@pytest.mark.parametrize("text", ["3/3", "x/2", "1/0"])
def test_a_part_that_is_not_there_is_refused(text):
    with pytest.raises(ParameterError, match="--shard"):
        resolve(EncodeLatentsParams, "encode-latents", {**GIVEN, "shard": text})
