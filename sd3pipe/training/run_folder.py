"""Where a run begins: afresh, or from which checkpoint; and what becomes of an older run in the same folder."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue, TypeAdapter

from sd3pipe.documents import DocumentError, read_json
from sd3pipe.errors import InputError, ParameterError, StaleError
from sd3pipe.files import storage_errors
from sd3pipe.fingerprint import hash_file
from sd3pipe.training.checkpoints import (
    ADAPTER_FILE,
    STATE_FILE,
    Checkpoint,
    checkpoint_paths,
    newest_checkpoint,
    read_checkpoint,
    set_aside_later,
)

log = logging.getLogger(__name__)

Identity = Mapping[str, Any]
_FINAL, _INPUTS = "final", "inputs.json"
_METRICS = "metrics.jsonl"


# Runs that were begun before a run's identity named these had them
_UNSAID = {"latents_recipe_version": 1, "text_recipe_version": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Final:
    """What final/inputs.json says: what the adapter beside it was made from."""

    identity: dict[str, JsonValue]
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The checkpoint to go on from, or None, and the differences that the user allowed."""

    checkpoint: Checkpoint | None
    changes: Mapping[str, Sequence[Any]]


def choose_start(
    run: Path, resume: str, identity: Identity, *, allow_changes: Sequence[str] = (), total_steps: int
) -> Start:
    """Returns where the run begins, after setting an older run aside where need be.

    `auto` goes on from the newest whole checkpoint of an equal run, and sets any other run aside as NAME.1;
    `never` always sets it aside; a path goes on from that checkpoint or raises StaleError with what differs.
    """
    _check_allowed(allow_changes, identity)
    if resume == "never":
        set_aside(run, "--resume never")
        return Start(checkpoint=None, changes={})
    if resume != "auto":
        return _start_from(Path(resume), run, identity, allow_changes, total_steps)
    checkpoint = newest_checkpoint(run, up_to=total_steps)
    if checkpoint is None:
        if checkpoint_paths(run):
            set_aside(run, "none of its checkpoints can be resumed at this number of steps")
        return Start(checkpoint=None, changes={})
    changes = differences(checkpoint.state["identity"], identity)
    if set(changes) - set(allow_changes):
        set_aside(run, f"its {describe(changes)}")
        return Start(checkpoint=None, changes={})
    return Start(checkpoint=checkpoint, changes=changes)


def is_finished(run: Path, start: Start, identity: Identity, total_steps: int) -> bool:
    """Returns whether the run has done all its steps and final/ holds their result, byte for byte."""
    if start.checkpoint is None or start.checkpoint.step != total_steps or start.changes:
        return False
    try:
        made_from = read_json(run / _FINAL / _INPUTS, TypeAdapter(_Final))
        saved = start.checkpoint.state["files"][ADAPTER_FILE]["blake3"]
        same = made_from.steps == total_steps and not differences(made_from.identity, identity)
        return same and hash_file(run / _FINAL / ADAPTER_FILE) == saved
    except (OSError, DocumentError):
        return False


def differences(old: Identity, new: Identity) -> dict[str, list[Any]]:
    """Returns [old value, new value] of every key of the identities that differs."""
    old = {**{key: value for key, value in _UNSAID.items() if key in new}, **old}
    return {
        key: [old.get(key), new.get(key)] for key in sorted({*old, *new}) if key not in old or old[key] != new.get(key)
    }


def describe(changes: Mapping[str, Sequence[Any]]) -> str:
    """Returns the differences in one line."""
    return ", ".join(f"{key} was {_short(old)}, is {_short(new)}" for key, (old, new) in changes.items())


def set_aside(run: Path, reason: str) -> None:
    """Renames a run folder with content to NAME.1, or the next free number, and says why."""
    if not run.is_dir() or not any((run / name).exists() for name in ("checkpoints", _FINAL, _METRICS)):
        return
    number = 1
    while (target := run.with_name(f"{run.name}.{number}")).exists():
        number += 1
    with storage_errors(run):
        run.rename(target)
    log.warning("%s is set aside as %s and a new run starts: %s", run, target, reason)


def _start_from(place: Path, run: Path, identity: Identity, allow_changes: Sequence[str], total_steps: int) -> Start:
    checkpoint = read_checkpoint(place) if (place / STATE_FILE).is_file() else newest_checkpoint(place)
    if checkpoint is None:
        raise InputError(f"--resume {place}: there is no checkpoint that can be resumed")
    if not checkpoint.can_resume:
        raise InputError(f"--resume {place}: its optimizer state was deleted to save space: take a newer checkpoint")
    changes = differences(checkpoint.state["identity"], identity)
    refused = {key: values for key, values in changes.items() if key not in allow_changes}
    if refused:
        raise StaleError(
            f"--resume {place}: this is another run: {describe(refused)}: "
            f"restore what differs, or go on all the same with --allow-changes {','.join(refused)}"
        )
    if checkpoint.step > total_steps:
        raise ParameterError(f"--resume {place} is at step {checkpoint.step}, beyond max_train_steps = {total_steps}")
    if run.resolve() in checkpoint.path.resolve().parents:
        set_aside_later(run, checkpoint.step)
    else:
        set_aside(run, f"--resume {place} comes from another folder")
    return Start(checkpoint=checkpoint, changes=changes)


def _check_allowed(allow_changes: Sequence[str], identity: Identity) -> None:
    unknown = [key for key in allow_changes if key not in identity]
    if unknown:
        raise ParameterError(
            f"--allow-changes {','.join(unknown)}: no part of a run's identity; its parts are {', '.join(identity)}"
        )


def _short(value: Any) -> str:
    text = str(value)
    is_hash = isinstance(value, str) and len(value) == 64
    return f"{text[:12]}..." if is_hash else text
