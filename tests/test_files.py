"""Files that are never half there, and what is said where one cannot be written."""

import errno
import os
import subprocess
import sys

import pytest

from sd3pipe.errors import StorageError
from sd3pipe.files import lock_file, open_regular, write_text
from sd3pipe.fingerprint import hash_file


def test_a_folder_in_the_place_of_a_file_and_a_file_in_that_of_a_folder_are_told(tmp_path):
    with pytest.raises(StorageError, match="is a folder, and a file is to be written: name a file"):
        write_text(tmp_path, "x")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "below" / "x"):
        with pytest.raises(StorageError, match=f"{tmp_path / 'file'} is a file, not a folder"):
            write_text(path, "x")


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
