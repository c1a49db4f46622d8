"""A hundred pictures as folder, tar, Parquet, datasets folder and in a bucket: one cache, byte for byte."""

import shutil

import numpy as np
import pytest
from PIL import Image
from support.buckets import local_s3, put
from support.command_line import in_process, report_of
from support.comparing import folder_bytes
from support.containers import folder_content, write_datasets_folder, write_parquet, write_tar
from support.photographs import write_dataset_file

from sd3pipe.cache.staleness import check_sources
from sd3pipe.cli import run

COUNT = 100
SUBSET = 'name = "all"\nflip_aug = true'


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(COUNT):
        size = [(64, 64), (96, 64), (64, 96)][number % 3]
        ending = "jpg" if number % 2 else "png"
        Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{number:03d}.{ending}")
        if number % 7:
            (folder / f"{number:03d}.txt").write_text(f"picture {number % 20}")
    return folder


def encode(base, folder, image_dir):
    """Encodes into caches below `folder`; returns the bytes of both."""
    folder.mkdir(exist_ok=True)
    dataset = write_dataset_file(folder / "d.toml", image_dir, resolution=64, extra=SUBSET)
    given = ("--model", base.model, "--dataset", dataset, "--threads", 1)
    in_process("encode-latents", *given, "--out", folder / "latents", "--max-data-loader-n-workers", 0)
    in_process("encode-text", *given, "--out", folder / "text", *base.encoder_options(), "--t5xxl-max-token-length", 16)
    for name in ("latents", "text"):
        assert report_of(folder / name)["quarantined"] == 0
    return {name: folder_bytes(folder / name) for name in ("latents", "text")}


@pytest.mark.slow
def test_one_cache_whichever_way_the_pictures_came(base, pictures, tmp_path, monkeypatch):
    content = folder_content(pictures)
    forms = {
        "tar": write_tar(tmp_path / "one.tar", content),
        "parquet": write_parquet(tmp_path / "one.parquet", content, rows_in_a_group=30),
        "datasets": write_datasets_folder(tmp_path / "saved", content) / "data-00000-of-00001.arrow",
    }
    expected = encode(base, tmp_path / "folder", pictures)
    assert len(expected["latents"]) > 10
    for form, image_dir in forms.items():
        assert encode(base, tmp_path / form, image_dir) == expected, form
        for cache in ("latents", "text"):
            assert check_sources(tmp_path / form / cache).state == "fresh"
    with local_s3(monkeypatch) as files:
        for form, place in {"folder": pictures, "tar": forms["tar"]}.items():
            assert encode(base, tmp_path / f"s3-{form}", put(files, place, place.name)) == expected
        reason = check_sources(tmp_path / "s3-tar" / "latents").reason
        assert reason == f"s3://bucket/one.tar, which {tmp_path}/s3-tar/latents was encoded from, is not here"


@pytest.mark.slow
def test_names_alone_differ_where_several_files_hold_them(base, pictures, tmp_path):
    content = folder_content(pictures)
    for shard in range(4):
        mine = {name: data for name, data in content.items() if int(name[:3]) // 25 == shard}
        write_tar(tmp_path / "shards" / f"{shard}.tar", mine)
    saved = write_datasets_folder(tmp_path / "saved", content)
    expected = encode(base, tmp_path / "folder", pictures)
    for image_dir in (tmp_path / "shards", saved):
        found = encode(base, tmp_path / f"of-{image_dir.name}", image_dir)
        for cache in ("latents", "text"):
            names = {name for name in expected[cache] if found[cache].get(name) != expected[cache][name]}
            changed = {name.partition("/")[2].partition("/")[2] for name in names if name != "manifest.json"}
            ours = {name.partition("/")[2].partition("/")[2]: data for name, data in found[cache].items()}
            theirs = {name.partition("/")[2].partition("/")[2]: data for name, data in expected[cache].items()}
            different = {name for name in changed if name and ours[name] != theirs[name]}
            assert {name.partition("/")[0] for name in different} == {"sample_name_bytes", "sample_name_ends"}
            assert not any(name.startswith("segments") for name in names)


@pytest.mark.long
def test_a_run_with_nothing_to_do_looks_at_the_tar_and_not_into_it(base, pictures, tmp_path, monkeypatch, capsys):
    tar = write_tar(tmp_path / "one.tar", folder_content(pictures))
    first = encode(base, tmp_path / "made", tar)
    capsys.readouterr()
    monkeypatch.setattr("sd3pipe.data.image_dirs._read", None)
    assert encode(base, tmp_path / "made", tar) == first
    assert capsys.readouterr().out.count("nothing to do") == 2
    shutil.copy2(tar, tmp_path / "copy.tar")
    tar.unlink()
    shutil.copy2(tmp_path / "copy.tar", tar)
    assert check_sources(tmp_path / "made" / "latents").changes == (f"{tar} was changed",)


def test_captions_are_not_written_into_a_tar(pictures, tmp_path, monkeypatch, capsys):
    from support.tiny_captioners import blip

    write_tar(tmp_path / "one.tar", {"a.png": (pictures / "000.png").read_bytes()})
    monkeypatch.chdir(tmp_path)
    words = ["caption", "--images", "one.tar", "--captioner", str(blip(tmp_path / "blip")), "--out", "captions"]
    words += ["--device", "cpu", "--captioner-dtype", "float32", "--max-new-tokens", "8", "--threads", "1"]
    assert run(words) == 3
    told = capsys.readouterr().err.replace("\n", " ")
    assert "one.tar: a.png: captions are written beside pictures in a folder, not into one.tar" in told
    assert run([*words, "--write", "none"]) == 0
    assert report_of(tmp_path / "captions")["captioned"] == 1
