"""What an encode stage read is compared with what is there now, by stat first and by bytes where that differs."""

import json
import os
import shutil
import time

import pytest
from support.fake_cache import captions, fill, wanted_texts

from sd3pipe.cache.folder import machine_folder
from sd3pipe.cache.staleness import Sources, check_sources, remember_sources, sources_seen
from sd3pipe.fingerprint import hash_file, hash_json


@pytest.fixture
def project(tmp_path):
    """A dataset file, a folder of pictures and captions, and a cache that remembers them."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b"):
        (photos / f"{name}.png").write_bytes(f"pixels of {name}".encode())
        (photos / f"{name}.txt").write_text(f"a photo of {name}")
    (tmp_path / "dataset.toml").write_text("[[datasets]]")
    time.sleep(0.05)
    fill(tmp_path / "caches" / "text", wanted_texts(captions(3)))
    remember(tmp_path)
    return tmp_path


def remember(project, endings=(".png", ".txt"), masks=(), recursive=False):
    photos = project / "photos"
    files = (path for path in (*sorted(photos.rglob("*")), *masks) if path.is_file())
    remember_sources(
        project / "caches" / "text",
        sources_seen(
            dataset_file=project / "dataset.toml",
            files={path: hash_file(path) for path in files},
            folders={photos: endings},
            trees={mask.parent: (".png",) for mask in masks} | ({photos: endings} if recursive else {}),
            scan_started=time.time(),
        ),
    )


def check(project):
    return check_sources(project / "caches" / "text")


def test_nothing_changed_is_fresh(project):
    assert check(project).state == "fresh"


@pytest.mark.parametrize("name", ["photos/a.png", "photos/b.txt", "dataset.toml"])
def test_an_edited_file_is_named(project, name):
    (project / name).write_bytes((project / name).read_bytes()[::-1])
    result = check(project)
    assert result.state == "changed" and result.changes == (f"{project / name} was changed",)


def test_a_touched_or_copied_file_of_equal_bytes_is_fresh(project):
    os.utime(project / "photos" / "a.png", (1, 1))
    shutil.copy(project / "photos" / "b.png", project / "copy.png")
    (project / "copy.png").replace(project / "photos" / "b.png")
    assert check(project).state == "fresh"


def test_new_and_removed_files_are_noticed_if_they_matter(project):
    (project / "photos" / "notes.md").write_text("not read by any stage")
    (project / "photos" / ".hidden.sd3pipe").write_text("")
    assert check(project).state == "fresh"
    (project / "photos" / "c.PNG").write_bytes(b"new")
    assert check(project).changes == (f"{project / 'photos'} has other files than before",)
    (project / "photos" / "c.PNG").unlink()
    (project / "photos" / "a.txt").unlink()
    assert any("a.txt is gone" in change for change in check(project).changes)


@pytest.mark.parametrize("gone", ["photos", "dataset.toml"])
def test_without_the_sources_there_is_nothing_to_check(project, gone):
    (project / gone).rename(project / "away")
    result = check(project)
    assert result.state == "unknown" and gone in result.reason


def test_a_cache_that_came_from_elsewhere_is_unknown(project, tmp_path):
    shutil.copytree(project / "caches" / "text", tmp_path / "other" / "text")
    assert check_sources(tmp_path / "other" / "text").state == "unknown"


def test_a_cache_that_was_replaced_since_is_unknown(project):
    shutil.rmtree(project / "caches" / "text")
    fill(project / "other" / "text", wanted_texts(captions(4)))
    shutil.copytree(project / "other" / "text", project / "caches" / "text")
    result = check(project)
    assert result.state == "unknown" and "was replaced" in result.reason


def test_a_file_that_changed_during_the_scan_is_not_taken_for_fresh(project):
    picture = project / "photos" / "a.png"
    started, digest = time.time(), hash_file(picture)
    picture.write_bytes(b"PIXELS of a")
    remember_sources(
        project / "caches" / "text",
        sources_seen(dataset_file=project / "dataset.toml", files={picture: digest}, folders={}, scan_started=started),
    )
    assert check(project).changes == (f"{picture} was changed",)


def test_the_note_is_machine_local_and_damage_to_it_only_skips_the_check(project):
    note = machine_folder(project / "caches" / "text") / "sources.json"
    assert str(project).encode() in note.read_bytes()
    note.write_bytes(b"{")
    assert check(project).state == "unknown"


def about(project, name):
    picture = project / "photos" / f"{name}.png"
    return Sources(project / "caches" / "text").check_picture(picture.name, hash_file(picture))


def test_of_one_picture_only_its_own_files_and_those_of_the_dataset_count(project):
    assert about(project, "a").state == about(project, "b").state == "fresh"
    (project / "photos" / "a.txt").write_text("another text")
    assert about(project, "a").changes == (f"{project / 'photos' / 'a.txt'} was changed",)
    assert about(project, "b").state == "fresh" and check(project).state == "changed"
    (project / "photos" / "a.txt").unlink()
    assert about(project, "a").changes == (f"{project / 'photos' / 'a.txt'} is gone",)
    (project / "dataset.toml").write_text("[[datasets]]  # other")
    assert about(project, "b").changes == (f"{project / 'dataset.toml'} was changed",)


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
def test_a_metadata_file_counts_for_every_picture(project, ending):
    listed = project / f"listed{ending}"
    listed.write_text("captions")
    time.sleep(0.05)
    remember(project, masks=(listed,))  # one more file that was read
    assert about(project, "a").state == "fresh"
    listed.write_text("other captions")
    assert about(project, "a").changes == (f"{listed} was changed",)


def test_a_caption_that_came_to_a_picture_counts(project):
    (project / "photos" / "b.txt").unlink()
    remember(project)
    assert about(project, "b").state == "fresh"
    (project / "photos" / "b.txt").write_text("its first caption")
    (project / "photos" / "c.txt").write_text("of nobody")
    assert about(project, "b").changes == (f"{project / 'photos' / 'b.txt'} is new",)
    assert about(project, "a").state == "fresh"


def test_a_mask_in_a_folder_of_its_own_counts(project):
    mask = project / "masks" / "a.png"
    mask.parent.mkdir()
    mask.write_bytes(b"mask")
    remember(project, masks=[mask])
    mask.write_bytes(b"another mask")
    assert about(project, "a").state == "changed" and about(project, "b").state == "fresh"


def test_pictures_in_a_new_folder_count_where_folders_below_are_read(project):
    photos = project / "photos"
    (photos / "empty").mkdir()
    (photos / "round").symlink_to(photos, target_is_directory=True)
    remember(project, recursive=True)
    (photos / "notes").mkdir()
    (photos / "notes" / "readme.md").write_text("not read by any stage")
    (photos / ".thumbnails").mkdir()
    (photos / ".thumbnails" / "a.png").write_bytes(b"small")
    assert check(project).state == "fresh"
    for name in ("empty", "new/deep"):
        (photos / name).mkdir(parents=True, exist_ok=True)
        (photos / name / "c.png").write_bytes(b"new")
        assert check(project).changes == (f"{photos} or a folder below it has other files than before",)
        remember(project, recursive=True)
        assert check(project).state == "fresh"
    remember(project)
    (photos / "new" / "d.png").write_bytes(b"not read")
    assert check(project).state == "fresh"


def test_of_one_picture_in_a_folder_below_its_own_files_count(project):
    below = project / "photos" / "new"
    below.mkdir()
    (below / "c.png").write_bytes(b"pixels of c")
    remember(project, recursive=True)
    sources = Sources(project / "caches" / "text")
    digest = hash_file(below / "c.png")
    (below / "c.txt").write_text("its first caption")
    assert sources.check_picture("new/c.png", digest).changes == (f"{below / 'c.txt'} is new",)
    shutil.rmtree(below)
    assert sources.check_picture("new/c.png", digest).changes == (f"{below / 'c.png'} is gone",)


def test_a_new_mask_counts(project):
    (project / "masks").mkdir()
    (project / "masks" / "a.png").write_bytes(b"mask")
    remember(project, masks=[project / "masks" / "a.png"])
    assert check(project).state == "fresh"
    (project / "masks" / "b.png").write_bytes(b"mask")
    assert check(project).changes == (f"{project / 'masks'} or a folder below it has other files than before",)
    shutil.rmtree(project / "masks")
    assert check(project).state == "changed"


@pytest.mark.parametrize("ending", [".wd.txt", "_wd.txt"])
def test_a_new_caption_counts_whatever_it_ends_in(project, ending):
    remember(project, (".png", ending))
    (project / "photos" / f"a{ending}").write_text("tags")
    assert check(project).changes == (f"{project / 'photos'} has other files than before",)
    assert about(project, "a").changes == (f"{project / 'photos' / f'a{ending}'} is new",)
    remember(project, (".png", ending))
    assert check(project).state == about(project, "a").state == "fresh"
    (project / "photos" / f"a{ending}").write_text("other tags")
    assert about(project, "a").changes == (f"{project / 'photos' / f'a{ending}'} was changed",)
    assert about(project, "b").state == "fresh"


def test_a_note_of_an_earlier_version_is_compared_as_that_did(project):
    photos, note = project / "photos", machine_folder(project / "caches" / "text") / "sources.json"
    (photos / "a.wd.txt").write_text("tags")
    (photos / ".hidden.png").write_bytes(b"")
    remember(project, (".png", ".wd.txt"))
    written = json.loads(note.read_bytes())
    names = hash_json([".hidden.png", "a.png", "b.png"])  # by what stands behind the last dot
    folders = {str(photos): [[".png", ".wd.txt"], names]}
    note.write_text(json.dumps({**{k: v for k, v in written.items() if k != "trees"}, "format": 1, "folders": folders}))
    assert check(project).state == "fresh"
    (photos / "new.png").write_bytes(b"new")
    assert check(project).changes == (f"{photos} has other files than before",)


def test_nothing_can_be_said_of_a_picture_without_a_note(project):
    (machine_folder(project / "caches" / "text") / "sources.json").unlink()
    assert about(project, "a").state == "unknown"
