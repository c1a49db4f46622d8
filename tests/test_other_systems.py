"""What Windows and Macs do another way, one door at a time; in tests/pipeline all of it is taken away at once."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from sd3pipe import child, files, living, stopping
from sd3pipe.config import read_toml
from sd3pipe.device import choose_device
from sd3pipe.errors import ParameterError, Stopped
from sd3pipe.files import lock_file, nearest_path, open_handle, publish_once, read_at
from sd3pipe.living import is_alive, living_pid, process_mark
from sd3pipe.models.hub import is_hub_id


@pytest.fixture
def bytes_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    return path


@pytest.mark.parametrize("piece_bytes", [1000, 1 << 20])
def test_threads_that_share_a_handle_read_what_they_ask_for_without_preadv(bytes_file, monkeypatch, piece_bytes):
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.setattr(files, "_PIECE_BYTES", piece_bytes)
    handle, wrong = open_handle(bytes_file), []

    def read_many(value: int) -> None:
        for turn in range(200):
            buffer = memoryview(bytearray(8))
            if read_at(handle, buffer, 256 * (turn % 64) + value) != 8 or buffer[0] != value:
                wrong.append(value)

    threads = [threading.Thread(target=read_many, args=(value,)) for value in (10, 13, 26, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    whole = memoryview(bytearray(1 << 15))
    assert read_at(handle, whole, 0) == min(piece_bytes, 1 << 14) and read_at(handle, whole, 1 << 14) == 0
    os.close(handle)


def test_a_file_gets_its_name_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EINVAL, "Incorrect function")  # Windows, of a stick with FAT

    monkeypatch.setattr(os, "link", link)
    (tmp_path / "temporary").write_text("whole")
    assert publish_once(tmp_path / "temporary", tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_lock_lets_in_and_says_who_holds_it_without_fcntl(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    with lock_file(tmp_path / "lock") as free:
        assert free and living_pid(files.lock_holder(tmp_path / "lock")) == os.getpid()


def test_the_living_are_told_from_the_dead_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(living, "_PROC", tmp_path / "proc")
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mark = process_mark(other.pid)
    number, started, *rest = mark.split("-")
    assert int(started) > 0 and is_alive(mark) and living_pid(mark) == other.pid
    assert is_alive("-".join([number, str(int(started) - 5000), *rest])) is False  # another one had its number before
    other.kill()
    while is_alive(mark) is not False:  # a killed one counts as dead also before it is waited for
        time.sleep(0.01)
    other.communicate()
    assert is_alive(mark) is False and living_pid(mark) is None


@pytest.fixture
def on_windows(monkeypatch):
    monkeypatch.setattr(child, "_ON_A_CONSOLE", True)
    monkeypatch.setattr(child, "_WISH", 1)
    monkeypatch.delattr(signal, "pthread_sigmask", raising=False)


def test_windows_asks_a_job_to_stop_by_ctrl_break(on_windows, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "kill", lambda *told: asked.append(told))
    assert child.ask_to_stop(process_mark()) and asked == [(os.getpid(), 1)]


def test_windows_hands_no_signal_on_to_a_child_that_its_console_tells(on_windows, monkeypatch):
    offered = []

    def send_signal(self, number):
        raise ValueError(f"Unsupported signal: {number}")  # as Windows answers

    @contextlib.contextmanager
    def handing_on(hand_on):
        hand_on(signal.SIGINT)
        offered.append(signal.SIGINT)
        yield

    monkeypatch.setattr(subprocess.Popen, "send_signal", send_signal)
    monkeypatch.setattr(stopping, "handing_on", handing_on)
    child.run_child("version", ["--version"], same_command="again")
    assert offered == [signal.SIGINT]  # and nothing was sent, which would have raised


def test_a_signal_is_heard_without_masks_of_signals(on_windows):
    with stopping.listening():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            stopping.check()


@pytest.mark.parametrize("name", ["tpu", "meta", "xla:0", "", "cuda:x"])
def test_an_unknown_device_is_refused_with_what_there_is(name):
    with pytest.raises(ParameterError, match="use auto, cpu, cuda, cuda:N or mps"):
        choose_device(name)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this is a Mac")
def test_the_gpu_of_a_mac_is_refused_elsewhere():
    with pytest.raises(ParameterError, match="no GPU of a Mac here: use auto or cpu"):
        choose_device("mps")


@pytest.mark.parametrize(
    "path", ["C:/models/a", r"C:\models\a", r"models\a", "D:a", r"\\server\share\a", "//server/share/a"]
)
def test_a_path_of_windows_is_no_repository_of_the_hub(path):
    assert not is_hub_id(path)


def test_a_path_that_another_system_finds_in_any_case_is_proposed_as_it_is_written(tmp_path):
    (tmp_path / "Photos").mkdir()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert nearest_path(tmp_path / "gone") == f" (it is a link to {tmp_path / 'nowhere'})"
    assert nearest_path(tmp_path / "PHOTOS") == f" (did you mean {tmp_path / 'Photos'}?)"


def test_a_path_of_windows_stays_as_it_is_between_single_quotes_and_is_explained_between_double_ones(tmp_path):
    file = tmp_path / "project.toml"
    file.write_bytes(b"[paths]\r\nmodel = 'C:\\models\\new.safetensors'\r\n")
    assert read_toml(file)["paths"]["model"] == r"C:\models\new.safetensors"
    file.write_bytes(b'[paths]\r\nmodel = "C:\\models\\new.safetensors"\r\n')
    with pytest.raises(ParameterError, match="single quotes"):
        read_toml(file)
