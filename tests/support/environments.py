"""Fresh environments that see the libraries of the one that the tests run in, and nothing of this repository."""

import os
import subprocess
import sys
import venv
from pathlib import Path

from support.documented import ROOT

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def tracked_files(*places: str) -> list[Path]:
    """Returns the files that git has below these places of the repository, relative to it."""
    listed = subprocess.run(["git", "ls-files", "-z", *places], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in listed.stdout.split("\0") if name]


def build_wheel(source: Path, folder: Path) -> Path:
    """Builds the wheel of a copy of the repository, with the setuptools at hand."""
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, stderr=subprocess.PIPE)
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path) -> Path:
    """Makes an environment without pip and returns its folder of programs. An editable install is not seen from it.

    The libraries are borrowed by a .pth file: of the folders that such a file names, no .pth file is read.
    """
    venv.create(folder)
    (site,) = folder.glob("[Ll]ib/**/site-packages")
    borrowed = [entry for entry in sys.path if Path(entry).name == "site-packages"]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    return folder / ("Scripts" if os.name == "nt" else "bin")
