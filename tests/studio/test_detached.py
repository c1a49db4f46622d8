"""What child.py starts apart outlives its starter, is found by its mark, and can be stopped however it was started."""

import subprocess
import sys
import time

import pytest

from sd3pipe.child import ask_to_stop, start_detached
from sd3pipe.files import lock_file, lock_holder
from sd3pipe.living import is_alive, living_pid

STARTER = """
import signal, sys
from pathlib import Path
from sd3pipe.child import start_detached
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what stands before an &
here = Path(sys.argv[1])
print(start_detached(["studio", "--port", "0", "--no-open"], folder=here, log=here / "log").mark)
"""


@pytest.mark.long
def test_a_command_outlives_its_starter_and_stops_when_asked(tmp_path):
    environment = {"XDG_STATE_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", STARTER, str(tmp_path)], capture_output=True, text=True, check=True, env=environment
    )
    mark = done.stdout.strip()
    assert is_alive(mark)
    while "studio: http" not in (tmp_path / "log").read_text():
        time.sleep(0.05)
    assert ask_to_stop(mark)
    end = time.monotonic() + 20
    while is_alive(mark) and time.monotonic() < end:
        time.sleep(0.05)
    assert living_pid(mark) is None and not ask_to_stop(mark)


def test_its_output_is_added_to_the_log(tmp_path):
    for _ in range(2):
        start_detached(["no-such-command"], folder=tmp_path, log=tmp_path / "log").process.wait()
    assert (tmp_path / "log").read_text().count("No such command") == 2


def test_a_lock_says_who_holds_it_and_only_while_he_lives(tmp_path):
    lock = tmp_path / "a.lock"
    assert lock_holder(lock) == ""
    script = (
        "import sys; from pathlib import Path; from sd3pipe.files import lock_file\n"
        "with lock_file(Path(sys.argv[1])): print('holds', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "holds\n"
    assert living_pid(lock_holder(lock)) == holder.pid
    with lock_file(lock) as free:
        assert not free
    assert living_pid(lock_holder(lock)) == holder.pid  # who came in vain did not put himself there
    holder.communicate("")
    assert lock_holder(lock) == ""
