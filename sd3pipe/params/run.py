"""Options of `sd3pipe run`."""

from typing import Literal

from sd3pipe.params.fields import OptionPath, Params, option

StageName = Literal[
    "caption", "encode-text", "encode-prompts", "encode-latents", "check-captions", "train", "judge", "export"
]  # fmt: skip


class RunParams(Params):
    stages: tuple[StageName, ...] = option(
        (),
        "Stages to run (caption, encode-text, encode-prompts, encode-latents, train, export); default: all.",
        positional=True,
    )
    dry_run: bool = option(False, "Check every stage, tell what lies ahead, and run nothing.")
    allow_code: bool = option(
        False,
        "Let train import and run an optimizer that stages/train.toml names by a dotted class path.",
        trust="typed",
    )
    project: OptionPath | None = option(
        None, "Folder of the project; default: the current one or the nearest above it.", role="path"
    )
