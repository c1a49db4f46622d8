"""Two caches are joined picture by picture, and refused when they do not belong together."""

import numpy as np
import pytest

from sd3pipe.cache.join import join_pictures
from sd3pipe.cache.keys import text_source
from sd3pipe.cache.plan import WantedRow
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.rows import from_numpy
from sd3pipe.cache.store import fill_cache
from sd3pipe.cache.wanted import Wanted
from sd3pipe.errors import InputError, StaleError
from sd3pipe.fingerprint import hash_bytes


def image_hash(content):
    return hash_bytes(content.encode())


def make_cache(out, kind, entries, quarantined=()):
    """Fills a cache from (name, subset, content of the picture, further columns) tuples."""
    rows, columns = [], {}
    for name, subset, content, more in entries:
        source = text_source(more.pop("caption")) if kind == "text" else image_hash(content)
        recipe = {field: more[field] for field in ("crop", "flip", "variant") if field in more}
        rows.append(WantedRow(source=source, recipe=recipe, group="g", nbytes=1 << 20))
        line = {"name": name, "subset": subset, "image_hash": image_hash(content)}
        line |= {"caption_hash": source} if kind == "text" else {}
        for field, value in (line | more).items():
            columns.setdefault(field, []).append(value)
    wanted = Wanted(
        kind=kind,
        recipe_version=1,
        fingerprints={},
        recipe={},
        rows=rows,
        samples={**columns, "key": range(len(rows))},
        unreadable=list(quarantined),
    )
    row = {"moments": from_numpy(np.zeros((2, 2), np.float32))}
    fill_cache(out, wanted, lambda keys: ((key, row) for key in keys), made_with="fake 1")
    return CacheReader(out)


def latents_of(tmp_path, *pictures, crops=1, flips=(0,), quarantined=()):
    entries = [
        (
            name,
            subset,
            content,
            {"bucket_h": 64, "bucket_w": 96, "crop": crop, "flip": flip, "original_h": 70, "original_w": 99}
            | {"split": "train"},
        )
        for name, subset, content in pictures
        for crop in range(crops)
        for flip in flips
    ]
    return make_cache(tmp_path / "latents", "latents", entries, quarantined)


def text_of(tmp_path, *pictures, variants=1, quarantined=()):
    entries = [
        (name, subset, content, {"variant": variant, "caption": f"{name} {variant}"})
        for name, subset, content in pictures
        for variant in range(variants)
    ]
    return make_cache(tmp_path / "text", "text", entries, quarantined)


CAT, DOG, COPY = ("cat.png", "pets", "cat"), ("dog.png", "pets", "dog"), ("zcat.png", "pets", "cat")


def rows_of(lists, picture):
    return lists.rows[lists.starts[picture] : lists.starts[picture + 1]].tolist()


def captions_of(joined, text):
    """Returns the captions' hashes of each picture by its name."""
    rows, hashes = text.samples.numbers("row").tolist(), text.samples.hashes("caption_hash")
    by_row = {row: digest.tobytes().hex() for row, digest in zip(rows, hashes, strict=True)}
    return {name: [by_row[row] for row in rows_of(joined.captions, number)] for number, name in enumerate(joined.names)}


def test_each_picture_has_its_crops_with_their_flips_and_all_caption_variants(tmp_path):
    latents, text = latents_of(tmp_path, CAT, DOG, crops=2, flips=(0, 1)), text_of(tmp_path, CAT, DOG, variants=3)
    joined = join_pictures(latents, text)
    assert joined.names == ["cat.png", "dog.png"] and joined.splits == ["train"] * 2 and joined.sizes == ((96, 64),)
    table = {row: number for number, row in enumerate(latents.samples.numbers("row").tolist())}
    names = latents.samples.strings("name").to_list()
    crops, flips = (latents.samples.numbers(name).tolist() for name in ("crop", "flip"))
    for number, name in enumerate(joined.names):
        places = [table[row] for row in rows_of(joined.latents, number)]
        assert [(names[place], crops[place], flips[place]) for place in places] == [
            (name, crop, flip) for crop in (0, 1) for flip in (0, 1)
        ]
    assert captions_of(joined, text) == {
        name: [text_source(f"{name} {variant}") for variant in range(3)] for name in joined.names
    }


def test_a_renamed_picture_keeps_its_caption(tmp_path):
    text = text_of(tmp_path, CAT)
    joined = join_pictures(latents_of(tmp_path, ("new name.png", "pets", "cat")), text)
    assert captions_of(joined, text) == {"new name.png": [text_source("cat.png 0")]}


def test_equal_pictures_are_paired_in_the_order_of_their_names(tmp_path):
    text = text_of(tmp_path, COPY, CAT)
    joined = join_pictures(latents_of(tmp_path, CAT, COPY), text)
    assert captions_of(joined, text) == {name: [text_source(f"{name} 0")] for name in ("cat.png", "zcat.png")}
    assert joined.occurrences.tolist() == [0, 1]


def test_the_same_picture_in_two_subsets_is_two_pictures(tmp_path):
    other = ("cat.png", "cats", "cat")
    joined = join_pictures(latents_of(tmp_path, CAT, other), text_of(tmp_path, CAT, other))
    assert sorted(joined.subsets) == ["cats", "pets"] and joined.occurrences.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("of_latents", "of_text", "lacking"),
    [((CAT,), (CAT, DOG), "latents"), ((CAT, DOG), (CAT,), "text"), ((CAT, COPY), (CAT,), "text")],
)
def test_a_picture_that_only_one_side_has_is_refused(tmp_path, of_latents, of_text, lacking):
    latents, text = latents_of(tmp_path, *of_latents), text_of(tmp_path, *of_text)
    with pytest.raises(StaleError, match=rf"{lacking} lacks 1 picture \("):
        join_pictures(latents, text)


def test_an_edited_picture_is_refused(tmp_path):
    with pytest.raises(StaleError, match=r"cat\.png"):
        join_pictures(latents_of(tmp_path, ("cat.png", "pets", "edited")), text_of(tmp_path, CAT))


def test_a_quarantined_picture_is_named_and_left_out(tmp_path):
    entry = {"name": "dog.png", "subset": "pets", "image_hash": image_hash("dog"), "reason": "cut short"}
    latents, text = latents_of(tmp_path, CAT, quarantined=[entry]), text_of(tmp_path, CAT, DOG)
    joined = join_pictures(latents, text)
    assert joined.names == ["cat.png"]
    assert joined.unreadable == ("pets/dog.png: cut short",)


def test_swapped_caches_are_refused(tmp_path):
    latents, text = latents_of(tmp_path, CAT), text_of(tmp_path, CAT)
    with pytest.raises(InputError, match="is a cache of text, not of latents"):
        join_pictures(text, latents)
