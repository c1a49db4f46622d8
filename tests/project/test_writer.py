"""A new project is written whole or not at all, over nothing else."""

import errno
import os
import tomllib

import pytest

from sd3pipe.errors import ParameterError, StorageError
from sd3pipe.files import sync_file
from sd3pipe.project import writer
from sd3pipe.project.writer import project_toml, write_project

TEXTS = {"project.toml": "a", "stages/train.toml": "b", "stages/export.toml": "c", "dvc.yaml": "d"}


def everything(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, number):
    synced = []

    def full_at_last(handle):
        synced.append(handle)
        if len(synced) > number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync_file(handle)

    monkeypatch.setattr(writer, "sync_file", full_at_last)
    with pytest.raises(StorageError, match="the disk is full"):
        write_project(tmp_path / "new" / "project", TEXTS)
    assert everything(tmp_path) == []


def test_what_was_there_before_a_full_disk_stays(tmp_path, monkeypatch):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "mine").write_text("x")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "sync_file", full)
    with pytest.raises(StorageError):
        write_project(tmp_path, TEXTS)
    assert everything(tmp_path) == ["stages", "stages/mine"]


@pytest.mark.parametrize("there", [("project.toml",), ("stages/train.toml", "dvc.yaml"), tuple(TEXTS)])
def test_a_second_run_completes_what_is_half_there(tmp_path, there):
    write_project(tmp_path, {name: TEXTS[name] for name in there})
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in there}
    assert write_project(tmp_path, TEXTS) == [name for name in TEXTS if name not in there]
    assert {name: (tmp_path / name).read_text() for name in TEXTS} == TEXTS
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in there} == times


def test_other_files_are_named_and_left(tmp_path):
    (tmp_path / "dvc.yaml").write_text("mine")
    (tmp_path / "project.toml").mkdir()
    with pytest.raises(ParameterError, match=r"project\.toml, dvc\.yaml exist already"):
        write_project(tmp_path, TEXTS)
    assert everything(tmp_path) == ["dvc.yaml", "project.toml"] and (tmp_path / "dvc.yaml").read_text() == "mine"


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(ParameterError, match="not UTF-8"):
        project_toml({"model": "a\udcff"})


@pytest.mark.parametrize("name", ["a\nb", "\U000e0001", "\u200b", '"\\'])
def test_a_name_of_odd_letters_is_read_back(name):
    assert tomllib.loads(project_toml({"model": name}))["paths"]["model"] == name
