"""The commands that would make an adapter again, from the provenance in its metadata."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from sd3pipe.adapters.metadata import Provenance
from sd3pipe.documents import DocumentError, parse_json
from sd3pipe.params.encode_latents import EncodeLatentsParams
from sd3pipe.params.encode_text import EncodeTextParams
from sd3pipe.params.fields import Params
from sd3pipe.params.train import TrainParams
from sd3pipe.shell import shell_line, shell_word
from sd3pipe.stages import REQUIRED_KEYS, STAGES_BY_NAME, command_words

OPTION_SETS: dict[str, type[Params]] = {
    "encode-text": EncodeTextParams,
    "encode-latents": EncodeLatentsParams,
    "train": TrainParams,
}

# A project with nothing but what it must have; whoever runs the commands puts in their own.
_PLACES = {**{key: key.upper() for key in REQUIRED_KEYS}, "caches": "caches", "run": "runs/NAME"}

LATER_STEPS_KEY = "sd3pipe_later_steps"


def reproduction(provenance: Provenance, later: Sequence[str] = ()) -> list[str]:
    """Returns lines of shell commands, with the hashes of everything that goes into them as comments."""
    made = f"the state after step {provenance.step}, seed {provenance.seed}, sd3pipe {provenance.version}"
    comments = [made, *(f"{name} {version}" for name, version in sorted(provenance.versions.items()))]
    comments.append("made from, by content:")
    comments += [f"  {name:<14} {value}" for name, value in sorted(provenance.fingerprints.items())]
    lines = [f"# {comment}" for comment in comments]
    for command in OPTION_SETS:
        options = provenance.parameters.get(command, {})
        known = OPTION_SETS[command].model_fields
        given = {name: value for name, value in options.items() if name in known and not isinstance(value, Mapping)}
        # what cannot stand on a command line: tables, and parts of a recipe that follow from the inputs
        others = {
            name: value for name, value in sorted(options.items()) if name not in given and value not in (None, {})
        }
        lines += [f"# {command}: {name} = {json.dumps(value)}" for name, value in others.items()]
        words = shell_line(["sd3pipe", *command_words(STAGES_BY_NAME[command], _PLACES)])
        lines.append(f"{words} {_options(given)}".rstrip())
    return [*lines, *later]


def with_step(metadata: Mapping[str, str], command: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Returns the metadata of a trained adapter that a command has changed since."""
    step = f"sd3pipe {command} ADAPTER {_options(options)} --out OUT"
    return {**metadata, LATER_STEPS_KEY: json.dumps([*later_steps(metadata), step])}


def later_steps(metadata: Mapping[str, str]) -> list[str]:
    """Returns the commands that changed an adapter after its training; whatever else stands there is none.

    The words of a file from anybody come back quoted, so that a shell runs `sd3pipe adapter` and nothing else.
    """
    try:
        steps = parse_json(metadata.get(LATER_STEPS_KEY, "[]"), TypeAdapter(list[str]), LATER_STEPS_KEY)
        words = [shlex.split(step) for step in steps]
    except (DocumentError, ValueError):
        return []
    return [shell_line(step) for step in words if step[:2] == ["sd3pipe", "adapter"]]


def _options(options: Mapping[str, Any]) -> str:
    words: list[str] = []
    for name, value in sorted(options.items()):
        option = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            words += [f"--{option} {shell_word(str(item))}" for item in value]
        else:
            words.append(f"--{option} {shell_word(str(value))}")
    return " ".join(words)
