"""The text of dvc.yaml: the commands of a project as DVC's stages, with paths from project.toml.

A path passes through YAML, DVC's ${...} and the shell. What would be changed there is quoted; what no quotes save is
written out instead of being taken from project.toml.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sd3pipe.metrics import BAND_NAMES
from sd3pipe.shell import no_option, quotation_mark, shell_word
from sd3pipe.stages import Paths, Stage, StagePath, paths_of, place, stages_of

_HEADER = """\
# `dvc repro` does what `sd3pipe run` does, and records what went in and came out. Paths stand in project.toml.
# Caches persist, so that an encode stage sees the rows it has; of a run, only final/ is an out.
vars:
  - project.toml

stages:
"""
_NO_PLAIN_SCALAR = re.compile(  # indicators, comments, keys; what YAML takes for a number, date or word of its own
    r"^$|^[\s!&*%@`'\"#|>,\[\]{}]|^[-?:](\s|$)|\s#|:(\s|$)|\s$|^[-+.]?[\d.][-+.:_\dA-Fa-fTtZzx\s]*$|^[-+.]*(inf|nan)$"
    r"|^(~|=|<<|null|true|false|yes|no|on|off|y|n)$",
    re.IGNORECASE,
)


def dvc_yaml(paths: Paths, dataset_deps: Iterable[str], *, folder: Path) -> str:
    """Returns dvc.yaml for the [paths] of a project in `folder`; `dataset_deps` are the folders with pictures."""
    data = [scalar(_no_interpolation(dep)) for dep in dataset_deps]
    groups = itertools.groupby(stages_of(paths), key=lambda stage: stage.module)
    body = "\n".join(_stage(module, tuple(stages), paths, data, folder) for module, stages in groups)
    return f"{_HEADER}{body}\n{_records(paths)}"


def scalar(text: str) -> str:
    """Returns `text` as a YAML scalar: plain if it may be, else in double quotes."""
    if text.isprintable() and not _NO_PLAIN_SCALAR.search(text):
        return text
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in quoted) + '"'


def _stage(module: str, stages: Sequence[Stage], paths: Paths, dataset_deps: Sequence[str], folder: Path) -> str:
    lines = [f"  {module}:", "    cmd:"]
    lines += [f"      - {scalar(_command(stage, paths))}" for stage in stages]
    lines += ["    deps:", *(f"      - {dep}" for dep in _deps(stages, paths, dataset_deps, folder))]
    lines += ["    params:", f"      - stages/{module}.toml:", "    outs:"]
    for stage in stages:
        out = f"      - {scalar(_interpolated(paths, stage.out.part or stage.out.key))}"
        persists = stage.out.key.startswith("caches/")
        lines += [f"{out}:", "          persist: true"] if persists else [out]
    return "\n".join(lines)


def _command(stage: Stage, paths: Paths) -> str:
    words = [f"sd3pipe {stage.command}"]
    for path in paths_of(stage, paths):
        key = path.key if path.role == "out" or path.whole else path.part or path.key
        if path.option:
            words += [f"--{path.option.replace('_', '-')}", _word(paths, key)]
    return " ".join([*words, *stage.in_dvc])


def _deps(stages: Sequence[Stage], paths: Paths, dataset_deps: Sequence[str], folder: Path) -> Iterator[str]:
    """Yields what the stages depend on: data, then weights, then what other stages made."""
    found = list(dict.fromkeys(path for stage in stages for path in paths_of(stage, paths)))
    yield from (_dep(paths, path) for path in found if path.role == "data")
    yield from dataset_deps if any(path.key == "dataset" for path in found) else ()
    # a hub id is no file, and is pinned by its cache's fingerprints instead
    weights = [path for path in found if path.role == "weights"]
    yield from (_dep(paths, path) for path in weights if (folder / place(paths, path.key)).exists())
    yield from (_dep(paths, path) for path in found if path.role == "made")


def _dep(paths: Paths, path: StagePath) -> str:
    return scalar(_interpolated(paths, path.part or path.key))


def _interpolated(paths: Paths, key: str) -> str:
    """Returns the words for which DVC puts in a path."""
    base, _, below = key.partition("/")
    if below and r"\${" in paths[base]:  # DVC takes that for its own escape, but not where the path stands alone
        return _no_interpolation(place(paths, key))
    return f"${{paths.{base}}}/{below}" if below else f"${{paths.{base}}}"


def _word(paths: Paths, key: str) -> str:
    """Returns the words for which DVC puts in a path as one word of a shell's command."""
    value = paths[key.partition("/")[0]]
    mark = quotation_mark(value)
    if mark is None or r"\${" in value:
        return _no_interpolation(shell_word(no_option(place(paths, key))))
    start = no_option(value).removesuffix(value)
    return f"{mark}{start}{_interpolated(paths, key)}{mark}"


def _no_interpolation(text: str) -> str:
    return text.replace("${", r"\${")


def _records(paths: Paths) -> str:
    metrics, loss, validation = (
        scalar(_interpolated(paths, f"run/{name}"))
        for name in ("metrics.json", "plots/loss.csv", "plots/validation.csv")
    )
    return f"""
metrics:
  - {metrics}

plots:
  - loss:
      x: step
      y:
        {loss}: [loss, loss_mean]
  - validation:
      x: step
      y:
        {validation}: [loss, {", ".join(f"bands/{name}" for name in BAND_NAMES)}]
  - learning_rate:
      x: step
      y:
        {loss}: learning_rate
"""
