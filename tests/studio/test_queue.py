"""The queue: order, outcomes, what a killed worker leaves, and what a damaged file costs."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sd3pipe.errors import InputError
from sd3pipe.living import is_alive, process_mark
from sd3pipe.studio import queue as queue_module
from sd3pipe.studio.queue import Queue
from sd3pipe.studio.worker import work_off

FINE, WRONG = ["tokenizers", "--help"], ["no-such-command"]


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.setattr(queue_module.Queue, "work", lambda self: None)  # the tests work themselves
    return Queue(tmp_path / "state")


def add(queue, tmp_path, title, *commands):
    return queue.add(tmp_path, title, commands or [FINE], tmp_path / "logs")


def titles(queue):
    return [job.title for job in queue.jobs()]


def test_jobs_wait_in_their_order_and_are_moved_and_removed(queue, tmp_path):
    for title in "abc":
        add(queue, tmp_path, title)
    by_title = {job.title: job.id for job in queue.jobs()}
    queue.move(by_title["c"], "up")
    assert titles(queue) == ["a", "c", "b"]
    queue.move(by_title["a"], "down")
    assert titles(queue) == ["c", "a", "b"]
    queue.move(by_title["c"], "up")
    queue.move(by_title["b"], "down")
    assert titles(queue) == ["c", "a", "b"]
    queue.move(by_title["a"], "remove")
    assert titles(queue) == ["c", "b"]


def test_a_job_at_work_is_neither_moved_nor_removed(queue, tmp_path):
    job = add(queue, tmp_path, "a")
    queue.update(job.id, lambda job: replace(job, state="running"))
    queue.move(job.id, "remove")
    assert titles(queue) == ["a"]


@pytest.mark.long
def test_a_failed_job_is_passed_over_and_told(queue, tmp_path):
    add(queue, tmp_path, "bad", WRONG, FINE)
    add(queue, tmp_path, "good")
    work_off(queue)
    states = {job.title: (job.state, job.exit_code, job.at) for job in queue.jobs()}
    assert states == {"bad": ("failed", 2, 0), "good": ("done", 0, 0)}
    assert "error: " in Path(queue.jobs()[0].log).read_text()


def test_a_job_in_a_folder_that_is_gone_fails(queue, tmp_path):
    job = queue.add(tmp_path / "gone", "a", [FINE], tmp_path / "logs")
    work_off(queue)
    assert [(other.id, other.state) for other in queue.jobs()] == [(job.id, "failed")]


@pytest.mark.long
def test_a_job_that_a_dead_worker_had_begun_is_taken_up_where_it_was(queue, tmp_path):
    job = add(queue, tmp_path, "a", WRONG, FINE)
    queue.update(job.id, lambda job: replace(job, state="running", at=1, mark=dead_mark()))
    work_off(queue)
    assert queue.jobs()[0].state == "done"  # its first command would have failed


def test_what_began_afresh_does_not_begin_afresh_again(queue, tmp_path):
    job = add(queue, tmp_path, "a", ["train", "--resume", "never"])
    queue.update(job.id, lambda job: replace(job, state="running", mark=dead_mark()))
    work_off(queue)
    assert "--resume never" not in Path(job.log).read_text()
    assert queue.jobs()[0].exit_code == 2  # train without a project


@pytest.mark.long
def test_a_worker_waits_for_the_process_that_another_had_started(queue, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"])
    job = add(queue, tmp_path, "a")
    queue.update(job.id, lambda job: replace(job, state="running", mark=process_mark(child.pid)))
    began = time.monotonic()
    reaper = subprocess.Popen([sys.executable, "-c", "pass"])  # reaps nothing: the child stays a zombie until waited
    work_off(queue)
    assert time.monotonic() - began > 1 and queue.jobs()[0].state == "done"
    child.wait()
    reaper.wait()


def test_only_one_worker_works(queue, tmp_path):
    add(queue, tmp_path, "a")
    script = (
        "import sys; from pathlib import Path; from sd3pipe.studio.queue import Queue\n"
        "with Queue(Path(sys.argv[1])).only_worker() as free: print(free, flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, queue.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "True\n"
    work_off(queue)
    assert queue.jobs()[0].state == "waiting"
    other.communicate("")


def test_a_waiting_job_that_is_stopped_is_over_at_once(queue, tmp_path):
    job = add(queue, tmp_path, "a", WRONG)
    queue.stop(job.id)
    assert [other.state for other in queue.jobs()] == ["stopped"] and queue.current(tmp_path) is None
    work_off(queue)
    assert not Path(job.log).exists()


def test_a_stopped_job_does_not_go_on_with_its_next_command(queue, tmp_path):
    job = add(queue, tmp_path, "a", FINE)
    queue.stop(job.id)
    work_off(queue)
    assert queue.jobs()[0].state == "stopped"


def test_a_damaged_queue_is_told_and_never_replaced(queue, tmp_path):
    file = queue.folder / "queue.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text("{")
    with pytest.raises(InputError, match=r"queue\.json"):
        add(queue, tmp_path, "a")
    assert file.read_text() == "{"


@pytest.mark.long
def test_many_writers_lose_no_job(queue, tmp_path):
    script = (
        "import sys; from pathlib import Path; from sd3pipe.studio.queue import Queue\n"
        "Queue.work = lambda self: None\n"
        "for n in range(5): Queue(Path(sys.argv[1])).add(Path('.'), sys.argv[2], [['x']], Path(sys.argv[1]) / 'logs')"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, queue.folder, str(n)]) for n in range(3)]
    assert all(writer.wait() == 0 for writer in writers)
    assert len(queue.jobs()) == 15


@pytest.mark.long
def test_a_job_outlives_its_worker_and_the_next_one_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(queue_module.Queue, "work", lambda self: None)
    queue = Queue(tmp_path / "sd3pipe")
    first = add(
        queue, tmp_path, "first", ["studio", "--port", "0", "--no-open", "--read-only"]
    )  # goes on until it is stopped
    add(queue, tmp_path, "second")
    command = [sys.executable, "-m", "sd3pipe", "studio", "--queue-only"]
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    worker = subprocess.Popen(command, env=env)
    while "studio: http" not in Path(first.log).read_text() if Path(first.log).exists() else True:
        time.sleep(0.05)
    worker.kill()
    worker.wait()
    mark = queue.jobs()[0].mark
    following = subprocess.Popen(command, env=env)
    time.sleep(1.5)
    assert is_alive(mark) and [job.state for job in queue.jobs()] == ["running", "waiting"]
    queue.stop(first.id)
    assert following.wait(60) == 0
    assert [job.state for job in queue.jobs()] == ["stopped", "done"] and not is_alive(mark)


@pytest.mark.slow
def test_the_queue_goes_on_after_everything_was_killed(tmp_path):
    """Worker and job die at once, as with a machine; the next worker takes up the job, then does the second."""
    queue = Queue(tmp_path / "state")
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    (tmp_path / "sd3pipe").symlink_to(tmp_path / "state")
    queue.work = lambda: None
    add(queue, tmp_path, "first", ["demo", "demo", "--steps", "2", "--seeds", "1"])
    add(queue, tmp_path, "second")
    worker = subprocess.Popen([sys.executable, "-m", "sd3pipe", "studio", "--queue-only"], env=env)
    while not (mark := queue.jobs()[0].mark):
        time.sleep(0.05)
    worker.kill()
    worker.wait()
    os.kill(int(mark.partition("-")[0]), signal.SIGKILL)
    subprocess.run([sys.executable, "-m", "sd3pipe", "studio", "--queue-only"], env=env, check=True, timeout=600)
    assert [job.state for job in queue.jobs()] == ["done", "done"]


def dead_mark() -> str:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    mark = process_mark(child.pid)
    child.wait()
    return mark
