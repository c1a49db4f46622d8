"""The stages of a project in one table: which places each reads and writes, by the keys of project.toml's [paths].

A key may go on below its folder: 'caches/text' is text/ in the folder that `caches` names.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from sd3pipe.shell import no_option

# data     a file of the user's: always there
# weights  files of a model, or a hub id, which is no file
# made     what an earlier stage wrote
# out      what the stage writes
# aside    helps, but changes nothing in what the stage makes
Role = Literal["data", "weights", "made", "out", "aside"]
Paths = Mapping[str, str]

CAPTIONS = "captions.jsonl"  # the finished captions in the cache of `caption`, which encode-text reads
HUB_KEYS = ("model", "captioner", "judge_model")  # whose value may be a hub id
REQUIRED_KEYS = ("model", "dataset", "caches", "run", "export")


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePath:
    """One option of a stage that names a place."""

    option: str  # as the option set calls it; empty where another file names the place
    key: str
    role: Role
    part: str = ""  # key of the part that matters, which is what DVC looks at, if not the whole
    whole: bool = False  # DVC's command line names the whole, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One command line of a project; `paths` in the order in which they stand on it."""

    name: str
    command: str
    paths: tuple[StagePath, ...]
    asks_for: tuple[str, ...] = ()  # keys without which a project has no such stage
    in_dvc: tuple[str, ...] = ()  # further words in dvc.yaml, where a stage must not change what it depends on

    @property
    def module(self) -> str:
        """What the command is called where a dash cannot stand: in files' names and in dvc.yaml."""
        return self.command.replace("-", "_")

    @property
    def out(self) -> StagePath:
        return next(path for path in self.paths if path.role == "out")


def _path(option: str, role: Role, key: str = "", part: str = "", whole: bool = False) -> StagePath:
    return StagePath(option=option, key=key or option, role=role, part=part, whole=whole)


def _stage(name: str, *paths: StagePath, command: str = "", **more: tuple[str, ...]) -> Stage:
    return Stage(name=name, command=command or name, paths=paths, **more)


_ENCODERS = (*(_path(name, "weights") for name in ("model", "clip_l", "clip_g", "t5xxl")), _path("tokenizers", "aside"))

STAGES = (
    _stage(
        "caption",
        _path("captioner", "weights"),
        _path("tokenizers", "aside"),
        _path("dataset", "data"),
        _path("out", "out", "caches/captions"),
        asks_for=("captioner",),
        in_dvc=("--write", "none"),
    ),
    _stage(
        "encode-text",
        *_ENCODERS,
        _path("dataset", "data"),
        _path("", "made", "caches/captions"),  # the dataset file's caption_cache
        _path("out", "out", "caches/text"),
    ),
    _stage(
        "encode-prompts",
        *_ENCODERS,
        _path("sample_prompts", "data"),
        _path("out", "out", "caches/prompts"),
        command="encode-text",
    ),
    _stage(
        "encode-latents",
        _path("model", "weights"),
        _path("vae", "weights"),
        _path("dataset", "data"),
        _path("out", "out", "caches/latents"),
    ),
    _stage(
        "check-captions",
        _path("model", "weights"),
        _path("text", "made", "caches/text"),
        _path("latents", "made", "caches/latents"),
        _path("out", "out", "caption_check"),
    ),
    _stage(
        "train",
        _path("model", "weights"),
        _path("vae", "aside"),
        _path("text", "made", "caches/text"),
        _path("latents", "made", "caches/latents"),
        _path("prompts", "aside", "caches/prompts"),
        _path("out", "out", "run", part="run/final"),
        _path("loras_dir", "aside"),
    ),
    _stage(
        "judge",
        _path("model", "weights"),
        _path("vae", "weights"),
        _path("judge_model", "weights"),
        _path("adapter", "made", "run", part="run/final", whole=True),
        _path("prompts", "made", "caches/prompts"),
        _path("latents", "made", "caches/latents"),
        _path("dataset", "aside"),
        _path("out", "out", "judge"),
    ),
    _stage(
        "export",
        _path("adapter", "made", "run", part="run/final"),
        _path("model", "weights"),
        _path("out", "out", "export"),
    ),
)
STAGES_BY_NAME = {stage.name: stage for stage in STAGES}


def stages_of(paths: Paths) -> tuple[Stage, ...]:
    """Returns the stages that a project has something for: without sample prompts, none encodes them.

    What is judged or checked has no place but the one that the project names for it.
    """
    return tuple(
        stage
        for stage in STAGES
        if all(key in paths for key in stage.asks_for)
        and all(path.key in paths for path in stage.paths if path.role == "data")
        and stage.out.key.partition("/")[0] in paths
    )


def paths_of(stage: Stage, paths: Paths) -> Iterator[StagePath]:
    """Yields the places of a stage that a project has; what another stage would make, only if it has that stage."""
    absent = {other.out.key for other in STAGES} - {other.out.key for other in stages_of(paths)}
    for path in stage.paths:
        if path.key.partition("/")[0] in paths and path.key not in absent:
            yield path


def place(paths: Paths, key: str) -> str:
    """Returns where a key lies: 'caches/text' below the folder that `caches` names."""
    base, _, below = key.partition("/")
    return f"{paths[base]}/{below}" if below else paths[base]


def command_words(stage: Stage, paths: Paths) -> list[str]:
    """Returns the command line of a stage behind `sd3pipe`."""
    words = [stage.command]
    for path in paths_of(stage, paths):
        if path.option:
            words += [f"--{path.option.replace('_', '-')}", no_option(place(paths, path.key))]
    return words
