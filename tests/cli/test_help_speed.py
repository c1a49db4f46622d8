"""`sd3pipe --help` answers at once."""

import os
import subprocess
import sys

import pytest


def cpu_seconds(*arguments: str) -> float:
    before = os.times()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.long
def test_help_takes_little_more_than_the_library_that_draws_it():
    """Processor time in turns, the best of three: neither a busy machine nor a slow one nor a cold disk counts."""
    taken = [(cpu_seconds("-m", "sd3pipe", "--help"), cpu_seconds("-c", "import typer")) for _ in range(3)]
    of_help, of_library = map(min, zip(*taken, strict=True))
    assert of_help < 4 * of_library  # 2.8 as measured: half a second where all is quick


@pytest.mark.long
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
