"""Cuts: crops and flips are rows of their own, and only what changes numbers enters a key."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.decoding import DecodeJob, decode_row
from sd3pipe.data.geometry import RECIPE_VERSION, face_in_name, views
from sd3pipe.data.places import Place
from sd3pipe.data.scan import Picture
from sd3pipe.data.weighting import sample_repeats
from sd3pipe.errors import UnreadablePicture
from sd3pipe.fingerprint import hash_bytes, hash_file


def picture(tmp_path, width, height, extra="", dataset="enable_bucket = true", resolution=512, name="a.png", **more):
    file = tmp_path / "d.toml"
    file.write_text(
        f"[[datasets]]\nresolution = {resolution}\n{dataset}\n[[datasets.subsets]]\nimage_dir = 'x'\n{extra}",
        encoding="utf-8",
    )
    fields = {
        "place": Place(tmp_path / name), "name": name, "subset": load_dataset(file).subsets[0], "occurrence": 0,
        "image_hash": "5" * 64, "mask_place": None, "mask_hash": None, "width": width, "height": height,
        "has_alpha": False, "animated": False, "caption": "", "caption_path": None,
        "caption_hash": None, "split": "train",
    }  # fmt: skip
    return Picture(**(fields | more))


def cuts(found, crop_variants=4, seed=42):
    return [view.cut for view in views(found, crop_variants=crop_variants, seed=seed)]


def test_a_plain_picture_gives_one_row_cut_from_the_middle(tmp_path):
    (cut,) = cuts(picture(tmp_path, 1000, 640))
    assert (cut.size, cut.resized, cut.left, cut.top) == ((640, 384), (640, 410), 0, 13)
    assert not cut.flip and cut.resize_filter == "area" and cut.mask is None


def test_flips_and_random_crops_are_rows_of_their_own(tmp_path):
    found = picture(tmp_path, 1000, 640, "flip_aug = true\nrandom_crop = true")
    rows = views(found, crop_variants=5, seed=1)
    assert [(view.crop, view.flip) for view in rows] == [(crop, flip) for crop in range(5) for flip in (0, 1)]
    assert len({view.cut.top for view in rows}) > 1
    assert all(rows[2 * n].cut.top == rows[2 * n + 1].cut.top for n in range(5))
    assert cuts(found, 3, 1) == [view.cut for view in rows][:6]
    assert cuts(found, 5, 2) != cuts(found, 5, 1)


def test_random_crops_without_buckets_cut_from_the_full_size(tmp_path):
    (cut,) = cuts(picture(tmp_path, 900, 800, "random_crop = true", dataset=""), crop_variants=1)
    assert cut.resized == (900, 800) and cut.resize_filter is None
    (small,) = cuts(picture(tmp_path, 300, 800, "random_crop = true", dataset=""), crop_variants=1)
    assert small.resized[0] >= 512


def test_the_recipe_of_a_cut_holds_nothing_else(tmp_path):
    """Limits, seeds and steps that lead to the same cut lead to the same key."""
    wide = picture(tmp_path, 512, 512, dataset="enable_bucket = true\nmax_bucket_reso = 2048")
    narrow = picture(tmp_path, 512, 512, dataset="enable_bucket = true\nbucket_reso_steps = 32")
    assert [cut.recipe() for cut in cuts(wide)] == [cut.recipe() for cut in cuts(narrow)]
    assert cuts(wide)[0].recipe() == {
        "resized": [512, 512],
        "crop": [0, 0, 512, 512],
        "flip": False,
        "filter": None,
        "mask": None,
        "background": None,
    }


def test_faces_are_told_by_file_names():
    assert face_in_name("portrait_300_200_80_90") == (300, 200, 80, 90)
    assert face_in_name("portrait_300_200_80") is None
    assert face_in_name("a_b_c_d_e") is None


def test_a_face_crop_keeps_the_face_in_the_cut(tmp_path):
    found = picture(tmp_path, 2000, 1500, "face_crop_aug_range = [1.5, 4.0]", dataset="", name="p_1500_400_200_250.png")
    for cut in cuts(found, crop_variants=20):
        scale = cut.resized[0] / 2000
        x, y = 1500 * scale - cut.left, 400 * scale - cut.top
        assert 0 <= x <= 512 and 0 <= y <= 512
        assert cut.size == (512, 512)
        assert 512 / 4.0 - 1 <= 250 * scale <= 512 / 1.5 + 1  # the face's share of the cut
        assert cut.left + 512 <= cut.resized[0] and cut.top + 512 <= cut.resized[1]


def test_a_face_is_told_by_the_file_where_a_list_leaves_out_the_ending(tmp_path):
    stem, extra = "p.2_1500_400_200_250", "face_crop_aug_range = [1.5, 4.0]"
    place = Place(tmp_path / f"{stem}.png")
    found = picture(tmp_path, 2000, 1500, extra, dataset="", name=stem, place=place)
    assert cuts(found) == cuts(picture(tmp_path, 2000, 1500, extra, dataset="", name=f"{stem}.png"))
    assert len(set(cuts(found))) > 1  # drawn around the face


def decoded(tmp_path, rgba, extra="", resolution=64, mask=None, **more):
    path = tmp_path / "a.png"
    Image.fromarray(rgba).save(path)
    mask_place = None
    if mask is not None:
        mask_path = tmp_path / "mask.png"
        Image.fromarray(mask).save(mask_path)
        mask_place = Place(mask_path)
        more |= {"mask_place": mask_place, "mask_hash": hash_file(mask_path)}
    found = picture(
        tmp_path, rgba.shape[1], rgba.shape[0], extra, dataset="", resolution=resolution,
        image_hash=hash_file(path), has_alpha=rgba.shape[2] == 4, **more,
    )  # fmt: skip
    jobs = [
        DecodeJob(
            place=Place(path), image_hash=found.image_hash, mask_place=mask_place, mask_hash=found.mask_hash, cut=cut
        )
        for cut in cuts(found)
    ]
    return [decode_row(job) for job in jobs]


def rgba_picture(height=64, width=64):
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (height, width, 4), dtype=np.uint8)


def test_an_alpha_mask_is_averaged_over_latents(tmp_path):
    rgba = rgba_picture()
    rgba[..., 3] = 0
    rgba[:8, :4, 3] = 255
    (row,) = decoded(tmp_path, rgba, "alpha_mask = true")
    assert row.mask.shape == (8, 8) and row.mask.dtype == np.float16
    assert row.mask[0, 0] == 0.5 and row.mask.sum() == 0.5
    assert np.array_equal(row.rgb, rgba[..., :3])  # not composited, as in sd-scripts


def test_a_picture_without_alpha_has_a_mask_of_ones(tmp_path):
    (row,) = decoded(tmp_path, rgba_picture()[..., :3].copy(), "alpha_mask = true")
    assert (row.mask == 1).all()


def test_a_mask_picture_beats_alpha_and_its_red_channel_counts(tmp_path):
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[:, 32:, 0], mask[..., 1] = 255, 255
    (row,) = decoded(tmp_path, rgba_picture(), "alpha_mask = true\nconditioning_data_dir = 'm'", mask=mask)
    assert row.mask[:, 4:].min() == 1 and row.mask[:, :4].max() == 0


def test_flips_mirror_picture_and_mask(tmp_path):
    rgba = rgba_picture()
    rgba[..., 3] = 0
    rgba[:, :16, 3] = 255
    plain, flipped = decoded(tmp_path, rgba, "alpha_mask = true\nflip_aug = true")
    assert np.array_equal(flipped.rgb, plain.rgb[:, ::-1])
    assert np.array_equal(flipped.mask, plain.mask[:, ::-1])


def test_a_background_is_laid_below_transparent_pictures(tmp_path):
    rgba = rgba_picture()
    rgba[..., 3] = 0
    (row,) = decoded(tmp_path, rgba, "alpha_background = 'white'")
    assert (row.rgb == 255).all() and row.mask is None


def test_a_file_that_changed_since_the_scan_is_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(rgba_picture()).save(path)
    cut = cuts(picture(tmp_path, 64, 64, dataset="", resolution=64))[0]
    with pytest.raises(UnreadablePicture, match="changed while"):
        decode_row(DecodeJob(place=Place(path), image_hash="0" * 64, mask_place=None, mask_hash=None, cut=cut))


def test_numbers_move_only_with_the_recipe_version(tmp_path):
    """The pixels that go to the VAE are part of cached rows: whoever changes them raises RECIPE_VERSION."""
    y, x, c = np.mgrid[0:96, 0:144, 0:3]
    pixels = ((x * 7 + y * 11 + c * 50 + (x // 8 + y // 8) % 2 * 90) % 256).astype(np.uint8)
    found = {}
    for name in ("area", "lanczos", "bicubic"):
        folder = tmp_path / name
        folder.mkdir()
        resolution = 64 if name != "lanczos" else 160
        (row,) = decoded(folder, pixels, f"resize_interpolation = '{name}'", resolution=resolution)
        found[name] = hash_bytes(row.rgb.tobytes())[:16]
    assert (RECIPE_VERSION, found) == GOLDEN


GOLDEN = (1, {"area": "e9e93375ebf04053", "lanczos": "97b048d467dbf624", "bicubic": "d2c0e48c8b1ebd8c"})


SUBSETS = {
    "train": {"dataset": 0, "num_repeats": 3, "is_reg": False},
    "reg": {"dataset": 0, "num_repeats": 2, "is_reg": True},
    "alone": {"dataset": 1, "num_repeats": 5, "is_reg": False},
}


def sd_scripts_regularisation(wanted, repeats, pictures):
    """Goes round and round, as sd-scripts does, until there are enough."""
    times, total, first = [0] * pictures, 0, True
    while total < wanted:
        for number in range(pictures):
            times[number] += repeats if first else 1
            total += repeats if first else 1
            if total >= wanted:
                break
        first = False
    return times


@pytest.mark.parametrize("train, reg", [(4, 3), (4, 7), (1, 9), (10, 1), (3, 4), (5, 2)])
def test_regularisation_pictures_are_cycled_until_there_are_enough(train, reg):
    names = ["train"] * train + ["reg"] * reg + ["alone"]
    repeats = sample_repeats(SUBSETS, names)
    assert repeats[:train] == [3] * train and repeats[-1] == 5
    assert repeats[train:-1] == sd_scripts_regularisation(3 * train, 2, reg)


def test_no_regularisation_without_other_pictures():
    assert sample_repeats(SUBSETS, ["reg", "reg"]) == [0, 0]


def test_pictures_keep_their_place_whatever_the_path(tmp_path):
    found = picture(tmp_path, 1000, 640, "random_crop = true")
    assert cuts(found) == cuts(replace(found, place=Place(Path("/elsewhere/b.png")), name="b.png"))
