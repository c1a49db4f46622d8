"""What a run writes down about itself: metrics.jsonl as it goes, metrics.json and plots/*.csv for DVC.

TensorBoard, Weights & Biases and Trackio hear of it through accelerate.
"""

import csv
import importlib.util
import io
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sd3pipe.errors import ParameterError
from sd3pipe.files import append_text, make_folder, write_json, write_text
from sd3pipe.metrics import BAND_NAMES, METRICS_FILE, read_records
from sd3pipe.params.train import TrainParams
from sd3pipe.training.picture_losses import summarise_pictures
from sd3pipe.training.run import Run
from sd3pipe.words import Tracker

if TYPE_CHECKING:
    from accelerate import Accelerator

_ALL: tuple[Tracker, ...] = ("tensorboard", "wandb")  # what sd-scripts means by it


class Records:
    """The lines of metrics.jsonl, and what trackers hear of them.

    Trackers keep open what they write into, so they start when the run has its final place, and are told then what was
    recorded before.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._trackers: Accelerator | None = None
        self._untold: list[tuple[int, dict[str, int | float]]] = []
        self._tell_trackers()

    def write(self, kind: Literal["step", "validation", "event"], step: int, **values: object) -> None:
        """Adds a line: one training step, one validation, or what happens seldom, such as a rollback."""
        line = json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False) + "\n"
        append_text(make_folder(self._run.folder.path) / METRICS_FILE, line)
        if self._run.params.log_with and kind != "event":
            self._untold.append((step, dict(_flat(f"{kind}/", values))))
            self._tell_trackers()

    def close(self) -> None:
        """Writes the summaries for DVC, what the losses say of each picture, and ends the trackers."""
        write_summaries(self._run.folder.path)
        summarise_pictures(self._run.folder.path, self._run.data.train)
        self._tell_trackers()
        if self._trackers is not None:
            for tracker in self._trackers.trackers:  # its own end_training would end the group of processes, too
                tracker.finish()

    def _tell_trackers(self) -> None:
        if not self._run.params.log_with or not self._run.folder.is_in_place:
            return
        trackers = self._trackers = self._trackers or start_trackers(self._run)

        for step, numbers in self._untold:
            trackers.log(numbers, step=step)
        self._untold.clear()


def forget_after(run: Path, step: int, kinds: Sequence[str] = ()) -> None:
    """Drops the lines of steps after `step`, and those of `kinds` at it, which a resumed run writes again."""
    kept = [
        record
        for record in read_records(run)
        if record["step"] < step or (record["step"] == step and record["kind"] not in kinds)
    ]
    if kept or (run / METRICS_FILE).exists():
        write_text(run / METRICS_FILE, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def write_summaries(run: Path) -> None:
    """Writes metrics.json (one number per name) and plots/loss.csv, plots/validation.csv from metrics.jsonl."""
    records = list(read_records(run))
    steps = [record for record in records if record["kind"] == "step"]
    validations = [record for record in records if record["kind"] == "validation"]
    if not steps:
        return
    metrics = {"steps": steps[-1]["step"], "loss_first": steps[0]["loss"], "loss_last": steps[-1]["loss"]}
    metrics["loss_mean"] = steps[-1]["loss_mean"]
    if validations:
        metrics["validation_loss"] = validations[-1]["loss"]
        losses = [record["loss"] for record in validations]
        metrics["validation_loss_best"] = min(filter(math.isfinite, losses), default=losses[-1])
    write_json(run / "metrics.json", metrics)
    _write_table(run / "plots" / "loss.csv", steps)
    _write_table(run / "plots" / "validation.csv", validations, ("step", "loss", *map("bands/{}".format, BAND_NAMES)))


def subset_figures(run: Path) -> dict[str, dict[str, float]]:
    """Returns per subset how many samples were seen, and their mean loss before any weighting, over the whole run."""
    seen: Counter[str] = Counter()
    losses: defaultdict[str, float] = defaultdict(float)
    for record in read_records(run):
        if record["kind"] != "step":
            continue
        for name, count in record.get("subset_samples", {}).items():
            seen[name] += count
            losses[name] += count * record.get("subset_loss", {}).get(name, 0.0)
    return {name: {"samples_seen": n, "loss_mean": losses[name] / n} for name, n in sorted(seen.items()) if n}


def _write_table(path: Path, records: Sequence[Mapping[str, object]], names: Sequence[str] = ()) -> None:
    """Writes a table with the columns `names`, which are there in a table without rows, too, and all others."""
    rows = [dict(_flat("", {key: value for key, value in record.items() if key != "seconds"})) for record in records]
    names = list(dict.fromkeys([*names, *(name for row in rows for name in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _flat(prefix: str, values: Mapping[str, object]) -> Iterator[tuple[str, int | float]]:
    """Yields the numbers of nested mappings with names such as "subset_loss/cats"."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}/", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def check_trackers(params: TrainParams) -> None:
    """Raises ParameterError for a tracker that is not installed."""
    missing = [name for name in _wanted(params) if importlib.util.find_spec(name) is None]
    if missing:
        raise ParameterError(
            f'log_with = {params.log_with}: {missing[0]} is not installed: pip install "sd3pipe[{missing[0]}]"'
        )


def start_trackers(run: Run) -> "Accelerator":
    """Returns an accelerate Accelerator whose trackers are running.

    W&B is offline where WANDB_MODE=offline says so; Trackio keeps its files with the run unless TRACKIO_DIR says where.
    """
    from accelerate import Accelerator  # takes its time, and a run without trackers needs none of it

    params, processes = run.params, run.processes
    folder = make_folder(params.logging_dir or params.out / "logs")
    os.environ.setdefault("TRACKIO_DIR", str((folder / "trackio").absolute()))  # read when trackio is imported
    on_cpu = processes.count == 1 or processes.device.type == "cpu"  # several processes have their state already
    accelerator = Accelerator(cpu=on_cpu, log_with=[*_wanted(params)], project_dir=folder)
    accelerator.init_trackers(
        params.log_tracker_name or run.output_name,
        config={name: value for name, value in run.identity.items() if isinstance(value, bool | int | float | str)},
        init_kwargs={"wandb": {"name": params.wandb_run_name, "dir": str(folder)}},
    )
    return accelerator


def _wanted(params: TrainParams) -> list[Tracker]:
    return list(_ALL) if params.log_with == "all" else [params.log_with] if params.log_with else []
