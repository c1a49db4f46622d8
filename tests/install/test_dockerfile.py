"""The Dockerfile's steps, run one by one outside of Docker: below a folder instead of /, in an environment of its own.

What is not run is what only an image can have: its base, its compiler and its user.
"""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from support.documented import ROOT
from support.environments import make_environment, run_here, tracked_files

ONLY_IN_AN_IMAGE = ("apt-get ", "useradd ")


def instructions() -> list[tuple[str, str]]:
    """Returns each instruction of the Dockerfile with what follows it."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def settings(word: str) -> list[str]:
    return [rest for found, rest in instructions() if found == word]


class Image:
    """What the steps make, below `root`. An absolute path in a step is one below that folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root
        self.variables = make_environment(root / "venv")

    def inside(self, text: str) -> str:
        return re.sub(r"(?<![^\s\"'=])/(?=\w)", f"{self.root}/", text)

    def run(self, *command: str) -> None:
        run_here(list(command), self.folder, self.variables)

    def take(self, word: str, rest: str) -> None:
        if word in ("ARG", "ENV"):
            self.variables.update(item.split("=", 1) for item in shlex.split(self.inside(rest)))
        elif word == "WORKDIR":
            self.folder = Path(self.inside(rest))
            self.folder.mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                copy = self.folder / target / ("" if (ROOT / source).is_dir() else source)
                for file in tracked_files(source):
                    (copy / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(ROOT / file, copy / file.relative_to(source))
        elif word == "RUN" and not rest.startswith(ONLY_IN_AN_IMAGE):
            self.run("sh", "-ec", self.inside(rest))


def test_whoever_runs_it_is_not_root_and_what_lasts_is_in_volumes():
    (user,) = settings("USER")
    assert user == "sd3pipe" and any(run == f"useradd --uid 1000 {user}" for run in settings("RUN"))
    (volumes,) = settings("VOLUME")
    assert json.loads(volumes) == ["/caches", "/models", "/work"] and settings("WORKDIR")[-1] == "/work"
    for variable in settings("ENV")[0].split():
        assert variable.partition("=")[2].startswith("/caches/")


def test_what_is_copied_is_sent_to_the_builder():
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[0] == "!"}
    assert sent == {source for copied in settings("COPY") for source in copied.split()[:-1]}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the steps are for a Linux shell")
def test_steps_run_and_the_demo_runs_as_the_entry_point(tmp_path):
    image = Image(tmp_path)
    for word, rest in instructions():
        image.take(word, rest)
    assert image.folder == tmp_path / "work" and image.folder.stat().st_mode & 0o777 == 0o777
    (entry_point,) = settings("ENTRYPOINT")
    image.run(*json.loads(entry_point), "demo", "demo", "--steps", "2", "--seeds", "1")
    assert (image.folder / "demo" / "before-and-after.png").is_file()
    assert any((tmp_path / "venv").rglob("site-packages/sd3pipe/cli.py"))
