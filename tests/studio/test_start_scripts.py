"""The scripts that a double click runs."""

import os
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the studio's extra is not installed")

REPOSITORY = Path(__file__).parents[2]
PYTHON = REPOSITORY / ".venv" / "bin" / "python"


@pytest.mark.long
@pytest.mark.skipif(not PYTHON.exists(), reason="without the environment of `make setup` they would make it")
@pytest.mark.parametrize("name", ["studio.sh", "studio.command"])
def test_a_script_opens_the_studio_from_wherever_it_is_called(tmp_path, name):
    process = subprocess.Popen(
        [REPOSITORY / "scripts" / name, "--port", "0", "--no-open"],
        cwd=tmp_path,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert re.match(r"studio: http://127\.0\.0\.1:\d+/\?token=", process.stdout.readline())
    finally:
        process.terminate()
    assert process.wait(20) == 0


def test_windows_gets_its_own_line_ends():
    """cmd.exe loses its way to labels in files with bare line feeds."""
    asked = subprocess.run(
        ["git", "check-attr", "eol", "scripts/studio.bat"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if asked.returncode:
        pytest.skip("this is no git checkout")
    assert asked.stdout == "scripts/studio.bat: eol: crlf\n"
