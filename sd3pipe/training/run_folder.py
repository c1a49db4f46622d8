"""Where a run begins: afresh, or from which checkpoint; and what becomes of an older run in the same folder.

A new run in the place of an older one writes into a folder apart. Only its first whole checkpoint makes it take the
place, and the older run gets the name NAME.1; so whatever ends it before that leaves the older run as it was.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue, TypeAdapter

from sd3pipe.cache.folder import apart_folder
from sd3pipe.documents import DocumentError, read_json
from sd3pipe.errors import InputError, ParameterError, StaleError
from sd3pipe.files import storage_errors, sync_folder
from sd3pipe.fingerprint import hash_file
from sd3pipe.metrics import METRICS_FILE
from sd3pipe.training.checkpoints import (
    ADAPTER_FILE,
    CHECKPOINTS_FOLDER,
    FINAL_FOLDER,
    INPUTS_FILE,
    STATE_FILE,
    Checkpoint,
    checkpoint_paths,
    newest_checkpoint,
    read_checkpoint,
)

log = logging.getLogger(__name__)

Identity = Mapping[str, object]

# Runs that were begun before a run's identity named these had them
_UNSAID = {"latents_recipe_version": 1, "text_recipe_version": 1, "train_layers": "all"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Final:
    """What final/inputs.json says: what the adapter beside it was made from."""

    identity: dict[str, JsonValue]
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The checkpoint to go on from, or None, and the differences that the user allowed.

    `aside` is why the run in the folder is not this one and gives way to it, "" where it does not have to.
    """

    checkpoint: Checkpoint | None
    changes: Mapping[str, Sequence[object]]
    aside: str = ""

    def state(self, identity: Identity, warmup_steps: int) -> dict[str, object]:
        """Returns what every checkpoint of the run says, wherever it stands."""
        changes: list[Mapping[str, object]] = [*self.checkpoint.state.get("changes", [])] if self.checkpoint else []
        if self.checkpoint and self.changes:
            changes.append({"step": self.checkpoint.step, **self.changes})
        return {"identity": dict(identity), "warmup_steps": warmup_steps, "changes": changes}


class RunFolder:
    """Where a run writes: `place`, or a folder apart as long as an older run lies there and nothing is saved."""

    def __init__(self, place: Path) -> None:
        self.place = self.path = place
        self._reason = ""

    @property
    def is_in_place(self) -> bool:
        return self.path == self.place

    def keep_apart(self, reason: str) -> None:
        """Leaves the place to the older run until `settle`."""
        self.path, self._reason = apart_folder(self.place), reason
        log.warning(
            "%s holds another run (%s): it stays until the first checkpoint of the new one, which writes into %s",
            self.place,
            reason,
            self.path,
        )

    def settle(self) -> None:
        """Takes the place, after renaming the older run to NAME.1 or the next free number. Raises StorageError."""
        if self.is_in_place:
            return
        place = self.place.resolve()
        number = 1
        while (target := place.with_name(f"{place.name}.{number}")).exists():
            number += 1
        with storage_errors(place):
            place.rename(target)
            self.path.rename(place)
        sync_folder(place.parent)
        self.path = self.place
        log.warning("%s is set aside as %s: %s", self.place, target, self._reason)

    def recover(self) -> None:
        """Ends what a killed process had begun: the new run takes the place, or what it never saved is deleted."""
        apart, place = apart_folder(self.place), self.place.resolve()
        if checkpoint_paths(apart) and not place.exists():
            with storage_errors(place):
                apart.rename(place)
        self.forget()

    def forget(self) -> None:
        """Deletes what a new run wrote, and its process or an earlier one did not save."""
        shutil.rmtree(apart_folder(self.place), ignore_errors=True)


def choose_start(
    run: Path, resume: str, identity: Identity, *, allow_changes: Sequence[str] = (), total_steps: int
) -> Start:
    """Returns where the run begins, and why an older run in its folder gives way, if it does. Changes nothing.

    `auto` goes on from the newest whole checkpoint of an equal run, any other run gives way; with `never` each does;
    a path goes on from that checkpoint or raises StaleError with what differs.
    """
    unknown = [key for key in allow_changes if key not in identity]
    if unknown:
        raise ParameterError(
            f"--allow-changes {','.join(unknown)}: no part of a run's identity; its parts are {', '.join(identity)}"
        )
    if resume == "never":
        return _afresh(run, "--resume never")
    if resume != "auto":
        return _start_from(Path(resume), run, identity, allow_changes, total_steps)
    checkpoint = newest_checkpoint(run, up_to=total_steps)
    if checkpoint is None:
        is_old = bool(checkpoint_paths(run)) or (run / FINAL_FOLDER).exists()
        return _afresh(run, "it has no checkpoint that can be resumed at this number of steps" if is_old else "")
    changes = differences(checkpoint.state["identity"], identity)
    if set(changes) - set(allow_changes):
        return _afresh(run, f"its {describe(changes)}")
    return Start(checkpoint=checkpoint, changes=changes)


def is_finished(run: Path, start: Start, identity: Identity, total_steps: int) -> bool:
    """Returns whether the run has done all its steps and final/ holds their result, byte for byte."""
    if start.checkpoint is None or start.checkpoint.step != total_steps or start.changes:
        return False
    try:
        made_from = read_json(run / FINAL_FOLDER / INPUTS_FILE, TypeAdapter(_Final))
        saved = start.checkpoint.state["files"][ADAPTER_FILE]["blake3"]
        same = made_from.steps == total_steps and not differences(made_from.identity, identity)
        return same and hash_file(run / FINAL_FOLDER / ADAPTER_FILE) == saved
    except (OSError, DocumentError):
        return False


def differences(old: Identity, new: Identity) -> dict[str, list[object]]:
    """Returns [old value, new value] of every key of the identities that differs."""
    old = {**{key: value for key, value in _UNSAID.items() if key in new}, **old}
    return {
        key: [old.get(key), new.get(key)] for key in sorted({*old, *new}) if key not in old or old[key] != new.get(key)
    }


def describe(changes: Mapping[str, Sequence[object]]) -> str:
    """Returns the differences in one line."""
    return ", ".join(f"{key} was {_short(old)}, is {_short(new)}" for key, (old, new) in changes.items())


def _afresh(run: Path, reason: str) -> Start:
    return Start(checkpoint=None, changes={}, aside=reason if _has_content(run) else "")


def _has_content(run: Path) -> bool:
    return any((run / name).exists() for name in (CHECKPOINTS_FOLDER, FINAL_FOLDER, METRICS_FILE))


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
    is_foreign = run.resolve() not in checkpoint.path.resolve().parents
    aside = f"--resume {place} comes from another folder" if is_foreign and _has_content(run) else ""
    return Start(checkpoint=checkpoint, changes=changes, aside=aside)


def _short(value: object) -> str:
    text = str(value)
    is_hash = isinstance(value, str) and len(value) == 64
    return f"{text[:12]}..." if is_hash else text
