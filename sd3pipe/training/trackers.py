"""TensorBoard, Weights & Biases and Trackio, through accelerate."""

import importlib.util
import os
from typing import TYPE_CHECKING

from sd3pipe.errors import ParameterError
from sd3pipe.files import make_folder
from sd3pipe.params.train import TrainParams
from sd3pipe.training.run import Run
from sd3pipe.words import Tracker

if TYPE_CHECKING:
    from accelerate import Accelerator

_ALL: tuple[Tracker, ...] = ("tensorboard", "wandb")  # what sd-scripts means by it


def check_trackers(params: TrainParams) -> None:
    """Raises ParameterError for a tracker that is not installed."""
    missing = [name for name in _wanted(params) if importlib.util.find_spec(name) is None]
    if missing:
        raise ParameterError(
            f"log_with = {params.log_with}: {missing[0]} is not installed: pip install 'sd3pipe[{missing[0]}]'"
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
