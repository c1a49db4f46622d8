"""`sd3pipe --help` answers at once."""

import os
import subprocess
import sys


def cpu_seconds_of_help() -> float:
    before = os.times()
    subprocess.run([sys.executable, "-m", "sd3pipe", "--help"], capture_output=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_help_takes_under_half_a_second():
    """Processor time, so that a busy machine does not count; the best of three, so that a cold disk does not either."""
    assert min(cpu_seconds_of_help() for _ in range(3)) < 0.5


def test_garbage_is_collected_once_the_program_is_imported():
    """Before that it would only be sought in what is imported, which stays."""
    code = (
        "import gc, sys\n"
        "sys.argv = ['sd3pipe', 'doctor']\n"
        "from sd3pipe import cli\n"
        "from sd3pipe.commands import doctor\n"
        "doctor.main = lambda params: print(gc.isenabled(), gc.get_freeze_count() > 10_000)\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
