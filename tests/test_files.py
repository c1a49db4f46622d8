"""Files that are never half there, and what is said where one cannot be written."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from support import forked

from sd3pipe import living, temporaries
from sd3pipe.errors import StorageError
from sd3pipe.files import (
    append_text,
    atomic_file,
    atomic_folder,
    followed,
    lock_file,
    open_regular,
    remove_folder,
    write_text,
)
from sd3pipe.fingerprint import hash_file
from sd3pipe.temporaries import temporary_name


def test_a_folder_in_the_place_of_a_file_and_a_file_in_that_of_a_folder_are_told(tmp_path):
    with pytest.raises(StorageError, match="is a folder, and a file is to be written: name a file"):
        write_text(tmp_path, "x")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "below" / "x"):
        with pytest.raises(StorageError, match=f"{tmp_path / 'file'} is a file, not a folder"):
            write_text(path, "x")
    (tmp_path / "link").symlink_to(tmp_path / "none")
    with pytest.raises(StorageError, match=f"{tmp_path / 'link'} is a link to nowhere"):
        write_text(tmp_path / "link" / "x", "x")


def test_a_lock_keeps_other_processes_out_until_its_holder_is_gone(tmp_path):
    path = tmp_path / "below" / "lock"
    other = f"""
from pathlib import Path
from sd3pipe.files import lock_file
with lock_file(Path({str(path)!r})) as free:
    print(free)
"""

    def seen_by_another() -> str:
        return subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=True).stdout.strip()

    with lock_file(path) as free:
        assert free and seen_by_another() == "False"
    assert seen_by_another() == "True"


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    from sd3pipe import files

    def none(handle, operation):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with lock_file(tmp_path / "lock") as free:
        assert free


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_does_not_keep_a_lock_that_its_parent_has_left(tmp_path):
    """As worker processes outlive a killed training by some seconds."""
    reader, writer = os.pipe()
    ready, tell = os.pipe()
    with lock_file(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.write(tell, b"1")
            os.read(reader, 1)  # until the parent closes its end
            os._exit(0)
        os.read(ready, 1)
    try:
        with lock_file(tmp_path / "lock") as free:
            assert free
    finally:
        for end in (writer, reader, ready, tell):
            os.close(end)
        os.waitpid(child, 0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_neither_opened_nor_hashed_nor_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (open_regular, hash_file):
        with pytest.raises(OSError, match="no regular file"):
            read(tmp_path / "pipe")


def test_names_that_are_no_utf8_are_written_as_the_bytes_that_they_are(tmp_path):
    write_text(tmp_path / "a", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "a").read_bytes() == b"caf\xe9"


def test_a_link_that_the_user_named_is_followed_and_stays(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    link.symlink_to(os.path.relpath(target, tmp_path))
    for text in ("made behind a dangling link", "replaced"):
        write_text(followed(link), text)
        assert link.is_symlink() and not target.is_symlink() and target.read_text() == text
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_what_is_no_regular_file_is_refused_and_stays(tmp_path, awkward):
    for write in (lambda path: write_text(followed(path), "x"), lambda path: write_text(path, "x"),
                  lambda path: append_text(path, "x")):  # fmt: skip
        with pytest.raises(StorageError, match=awkward.message):
            write(awkward.path)
    assert awkward.path.lstat().st_mode == awkward.mode
    assert [path.name for path in tmp_path.iterdir()] == ["awkward"]


@pytest.fixture(params=["pipe", "socket", "device", "circle"])
def awkward(request, tmp_path):
    path = tmp_path / "awkward"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))
    else:
        path.symlink_to("/dev/null" if request.param == "device" else path)
    message = "is a link in a circle" if request.param == "circle" else "is a pipe, device or socket"
    return SimpleNamespace(path=path, mode=path.lstat().st_mode, message=message)


def test_a_link_under_a_name_of_ours_never_leads_outside(tmp_path):
    """A run folder from a stranger may hold a link to any file of its reader."""
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run" / "report.json").symlink_to(tmp_path / "mine")
    for write in (write_text, append_text):
        with pytest.raises(StorageError, match="a link that leads outside"):
            write(tmp_path / "run" / "report.json", "x")
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / "run" / "inside").symlink_to("target")
    write_text(tmp_path / "run" / "inside", "x")
    assert (tmp_path / "run" / "inside").is_symlink() and (tmp_path / "run" / "target").read_text() == "x"


def test_a_write_protected_file_behind_a_link_is_refused(tmp_path):
    """DVC and git-annex keep what they store so; the files of a project may be links to it."""
    stored = tmp_path / "stored"
    stored.write_text("kept")
    stored.chmod(0o444)
    (tmp_path / "link").symlink_to(stored)
    with pytest.raises(StorageError, match="dvc unprotect"):
        followed(tmp_path / "link")
    assert stored.read_text() == "kept"


def leave_half(folder):
    """Is killed while it writes a file and a folder."""
    with atomic_file(folder / "file") as handle, atomic_folder(folder / "folder") as made:
        handle.write(b"half")
        handle.flush()
        (made / "inside").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_the_next_write_removes_what_a_killed_process_has_left(tmp_path):
    assert forked.exit_code(forked.start(lambda: leave_half(tmp_path))) == -signal.SIGKILL
    assert len(names_in(tmp_path)) == 2
    write_text(tmp_path / "file", "whole")
    assert names_in(tmp_path) == ["file"]


def test_nothing_is_removed_that_a_living_process_writes(tmp_path):
    with atomic_folder(tmp_path / "folder") as made:
        (made / "inside").write_text("half")
        script = "import sys, pathlib, sd3pipe.files as files; files.write_text(pathlib.Path(sys.argv[1]), '')"
        subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=True)
    assert names_in(tmp_path) == ["a", "folder"] and (tmp_path / "folder" / "inside").read_text() == "half"


def test_a_process_that_got_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(living, "_start_of", lambda pid: "1")
    left = temporary_name(tmp_path)
    left.write_text("half")
    monkeypatch.undo()
    temporaries._cleared.clear()
    write_text(tmp_path / "file", "")
    assert names_in(tmp_path) == ["file"]


def test_what_another_machine_writes_is_removed_after_a_day_without_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr(living, "_machine", lambda: "0" * 16)
    left = temporary_name(tmp_path)
    left.mkdir()
    (left / "inside").write_text("half")
    monkeypatch.undo()
    for age, is_kept in ((0, True), (temporaries.FOREIGN_SECONDS + 60, False)):
        temporaries._cleared.clear()
        for path in (left, left / "inside"):
            os.utime(path, (time.time() - age,) * 2)
        write_text(tmp_path / "file", "")
        assert left.exists() == is_kept


def test_files_of_others_are_not_touched(tmp_path):
    for name in ("tmp-1", "tmp-sd3pipe-mine", "tmp-sd3pipe-1--0-0.bak"):
        (tmp_path / name).write_text("")
    write_text(tmp_path / "file", "")
    assert len(names_in(tmp_path)) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_folder_is_removed_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("")
    monkeypatch.setattr("sd3pipe.files.remove_tree", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    assert forked.exit_code(forked.start(lambda: remove_folder(folder))) == -signal.SIGKILL
    assert not folder.exists()
    monkeypatch.undo()
    write_text(tmp_path / "file", "")
    assert names_in(tmp_path) == ["file"]
