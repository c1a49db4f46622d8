"""Fresh environments that see the libraries of the one that the tests run in, and nothing of this repository."""

import os
import subprocess
import sys
import venv
from pathlib import Path

from support.documented import ROOT

_PIP = (sys.executable, "-m", "pip")
# Nothing is fetched, and the setuptools at hand builds ("no isolation" is said by 0: pip negates the variable).
_OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def tracked_files(*places: str) -> list[Path]:
    """Returns the files that git has below these places of the repository, relative to it."""
    listed = subprocess.run(["git", "ls-files", "-z", *places], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in listed.stdout.split("\0") if name]


def build_wheel(source: Path, folder: Path) -> Path:
    """Builds the wheel of a copy of the repository."""
    command = [*_PIP, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, env={**os.environ, **_OFFLINE}, check=True, stderr=subprocess.PIPE)
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path) -> dict[str, str]:
    """Makes an environment with a pip that fetches nothing; returns the variables with which its programs are found.

    The libraries are borrowed by links in a folder beside it, which pip sees and never changes.
    """
    venv.create(folder)
    borrowed = folder.with_name(f"{folder.name}-borrowed")
    borrowed.mkdir()
    for site in [Path(entry) for entry in sys.path if Path(entry).name == "site-packages"]:
        for library in site.iterdir():
            link = borrowed / library.name
            if not (link.exists() or library.suffix == ".pth" or library.name.startswith(("sd3pipe", "__editable__"))):
                link.symlink_to(library)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    pip = folder / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pip --python "{folder}/bin/python" "$@"\n', encoding="utf-8")
    pip.chmod(0o755)
    here = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**here, **_OFFLINE, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def run_here(command: list[str], folder: Path, variables: dict[str, str]) -> str:
    """Runs a command in a folder and returns what it printed; a failure shows it."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return done.stdout
