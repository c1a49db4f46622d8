"""A manifest is believed only as far as the rows' own ingredients bear it out."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.comparing import folder_bytes
from support.fake_cache import captions, fill, wanted_texts

from sd3pipe.cache.folder import CacheFolder
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.verify import repair, verify_cache
from sd3pipe.errors import InputError, StaleError

WANTED = wanted_texts(captions(9), subsets={"photos": {"num_repeats": 2}})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    fill(tmp_path / "text", WANTED)
    return tmp_path / "text"


def edit(cache: Path, **changes: Any) -> None:
    manifest = cache / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))


CONTRADICTIONS = [
    ({"recipe_version": 2}, "recipe_version = 2, its rows were made with 1"),
    ({"recipe": {"scale": 2.0}}, "recipe.scale = 2.0, its rows were made with 1.0"),
    ({"recipe": {"scale": 1.0, "more": 1}}, "recipe.more = 1"),
    ({"fingerprints": {"clip_l": "other"}}, "fingerprints.clip_l = other"),
    ({"fingerprints": {}}, "fingerprints.clip_l = None"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS)
def test_a_manifest_that_contradicts_the_rows_is_refused_by_readers_and_found_by_verify(cache, changes, message):
    whole = folder_bytes(cache)
    edit(cache, **changes)
    with pytest.raises(StaleError, match=message):
        CacheReader(cache)
    found = verify_cache(cache)
    assert [problem.path for problem in found.problems] == [cache / "manifest.json"]
    assert message in found.problems[0].what
    repair(cache, found)
    counts = fill(cache, WANTED)
    assert (counts.encoded, folder_bytes(cache)) == (0, whole)


def test_the_encode_stage_writes_a_contradicting_manifest_anew_and_keeps_the_rows(cache):
    whole = folder_bytes(cache)
    edit(cache, recipe_version=2)
    assert fill(cache, WANTED).encoded == 0
    assert folder_bytes(cache) == whole


def test_a_missing_first_segment_is_told_when_its_rows_are_read(cache):
    reader = CacheReader(cache)
    CacheFolder(cache).segment(reader.index.plan_ids()[0]).unlink()
    assert len(CacheReader(cache)) == len(reader)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": "9"},
        {"rows": -1},
        {"kind": "pictures"},
        {"index": "../../../etc"},
        {"index": "A" * 64},
        {"fingerprints": {"clip_l": 3}},
        {"recipe": []},
        {"subsets": {"photos": {"num_repeats": "many"}}},
        {"subsets": {"photos": {"is_reg": 1}}},
        {"subsets": {"photos": {"loss_weight": -1}}},
        {"subsets": {"photos": 1}},
        {"quarantined": [{"name": "a.png"}]},
        {"tags": {"photos": {"cat": -1}}},
        {"quarantined": [{"name": "a.png", "reason": "x", "keys": 3}]},
    ],
    ids=str,
)
def test_a_manifest_of_another_shape_is_damaged(cache, changes):
    edit(cache, **changes)
    with pytest.raises(InputError, match=r"manifest\.json: .*verify --repair"):
        CacheReader(cache)


def test_whatever_a_stage_adds_to_a_manifest_is_kept(cache):
    edit(cache, empty_caption="ab", subsets={"photos": {"num_repeats": 2, "of_later": {"a": [1]}}})
    manifest = CacheReader(cache).manifest
    assert manifest.extra == {"empty_caption": "ab"}
    assert manifest.subsets == {"photos": {"num_repeats": 2, "of_later": {"a": [1]}}}
