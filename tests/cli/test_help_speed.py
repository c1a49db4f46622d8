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
