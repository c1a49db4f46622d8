"""Validation holds out pictures by their content, never all of a subset, at least one where there are two."""

from dataclasses import replace

import pytest

from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.holding_out import held_out
from sd3pipe.fingerprint import hash_bytes


@pytest.fixture(scope="module")
def subset(tmp_path_factory):
    file = tmp_path_factory.mktemp("set") / "d.toml"
    file.write_text("[[datasets]]\nresolution = 64\nvalidation_split = 0.1\n[[datasets.subsets]]\nimage_dir = 'a'\n")
    return load_dataset(file).subsets[0]


def hashes(number, of="picture"):
    return [hash_bytes(f"{of} {n}".encode()) for n in range(number)]


def out(subset, pictures):
    return held_out((subset, image_hash) for image_hash in pictures)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("number", [2, 3, 5, 9])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_at_least_one_is_held_out_and_at_least_one_is_not(subset, number, share, seed):
    asked = replace(subset, validation_split=share, validation_seed=seed)
    assert 1 <= len(out(asked, hashes(number))) < number


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999, 1.0])
def test_the_only_picture_is_never_held_out(subset, share):
    assert out(replace(subset, validation_split=share), hashes(1)) == set()
    assert out(replace(subset, validation_split=share), hashes(1) * 3) == set()  # three copies of it


def test_a_share_is_about_what_was_asked_and_the_same_in_any_order(subset):
    pictures = hashes(2000)
    assert 150 <= len(out(subset, pictures)) <= 250  # 200 expected; 3.7 standard deviations either way
    assert out(subset, pictures) == out(subset, pictures[::-1])


def test_added_pictures_move_none_of_the_others(subset):
    before, after = out(subset, hashes(100)), out(subset, [*hashes(100), *hashes(50, "other")])
    assert len(before) > 1
    assert before == {item for item in after if item[1] in hashes(100)}


def test_a_subset_with_the_whole_share_is_for_validation_alone(subset):
    judge = replace(subset, name="judge", validation_split=1.0)
    trained = replace(subset, validation_split=0.0)
    pictures = [(trained, image_hash) for image_hash in hashes(3)] + [(judge, hashes(1, "other")[0])]
    assert held_out(pictures) == {("judge", hashes(1, "other")[0])}


def test_the_one_that_is_held_out_at_least_is_held_out_in_every_subset_that_has_it(subset):
    tiny, other = replace(subset, validation_split=1e-9), replace(subset, name="b", validation_split=1e-9)
    chosen = held_out((of, image_hash) for of in (tiny, other) for image_hash in hashes(4))
    assert len(chosen) == 2 and len({image_hash for _, image_hash in chosen}) == 1


def test_small_subsets_do_not_each_give_one_away(subset):
    subsets = [replace(subset, name=str(number), validation_split=1e-9) for number in range(10)]
    assert len(held_out((of, one) for of in subsets for one in hashes(2, of.name))) == 1


def test_nobody_asked_or_regularisation_holds_out_nothing(subset):
    assert out(replace(subset, validation_split=0.0), hashes(9)) == set()
    assert out(replace(subset, is_reg=True), hashes(9)) == set()
