"""TensorBoard and Weights & Biases, through accelerate."""

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, get_args

from sd3pipe.errors import ParameterError
from sd3pipe.files import make_folder
from sd3pipe.params.train import TrainParams
from sd3pipe.training.processes import Processes
from sd3pipe.words import Tracker

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_trackers(params: TrainParams) -> None:
    """Raises ParameterError for a tracker that is not installed."""
    missing = [name for name in _wanted(params) if importlib.util.find_spec(name) is None]
    if missing:
        raise ParameterError(
            f"log_with = {params.log_with}: {missing[0]} is not installed: pip install 'sd3pipe[{missing[0]}]'"
        )


def start_trackers(params: TrainParams, config: Mapping[str, object], processes: Processes) -> "Accelerator":
    """Returns an accelerate Accelerator whose trackers are running; W&B is offline where WANDB_MODE=offline says so."""
    from accelerate import Accelerator  # takes its time, and a run without trackers needs none of it

    folder = make_folder(params.logging_dir or params.out / "logs")
    on_cpu = processes.count == 1 or processes.device.type == "cpu"  # several processes have their state already
    accelerator = Accelerator(cpu=on_cpu, log_with=[*_wanted(params)], project_dir=folder)
    accelerator.init_trackers(
        params.log_tracker_name or params.output_name or params.out.name,
        config={name: value for name, value in config.items() if isinstance(value, bool | int | float | str)},
        init_kwargs={"wandb": {"name": params.wandb_run_name, "dir": str(folder)}},
    )
    return accelerator


def _wanted(params: TrainParams) -> list[Tracker]:
    return list(get_args(Tracker)) if params.log_with == "all" else [params.log_with] if params.log_with else []
