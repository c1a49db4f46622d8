"""`--engine ray`: an encode stage's parts on the workers of a Ray cluster, which all see the same folders.

Each worker is one process, with its encoders loaded once. It fills whole parts of the cache as `--shard` does, segment
by segment; so a part that is given to another worker, because its own was lost, goes on where it was.
"""

import contextlib
import json
import logging
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sd3pipe import errors, stopping
from sd3pipe.console import count, progress, setup_logging
from sd3pipe.errors import InputError, ParameterError, Sd3pipeError

log = logging.getLogger(__name__)

FillPart = Callable[[tuple[int, int]], object]  # fills part i of n, as store.fill_cache's `shard`

_ANSWER_SECONDS = 10.0
_RESTARTS = 10  # of one worker; Ray's own default is without end, and some pictures are too large for any machine


def fill_parts(
    stage: str, make_fill: Callable[[], FillPart], *, parts_per_worker: int, workers: int | None, on_cpu: bool
) -> None:
    """Fills all parts of a cache. `make_fill` is called once in every worker, and has to survive pickling.

    `workers` = None takes one for each GPU, or for each machine where there is none or `on_cpu`. Uses the cluster that
    RAY_ADDRESS names, else one that is started on this machine. Raises ParameterError where Ray or its cluster is
    missing, the error of a part that failed, and InputError where workers are lost again and again.
    """
    ray = _start()
    try:
        there = ray.cluster_resources()
        gpus, cpus = (0.0 if on_cpu else there.get("GPU", 0.0)), there.get("CPU", 1.0)
        workers = workers or int(gpus) or sum(node["Alive"] for node in ray.nodes())
        most = int(max(cpus, 1.0))
        if workers > most:
            raise ParameterError(f"--ray-workers {workers}: the cluster has {most} CPUs: use at most as many workers")
        cpus, gpus = max(1.0, cpus // workers), min(1.0, gpus / workers)  # of each
        log.info("ray: %s with %g CPUs, %g GPUs each", count(workers, "worker"), cpus, gpus)
        parts = workers * parts_per_worker
        with progress(stage, parts, "parts") as bar, stopping.breaking_off():
            mapped = _mapped(ray, parts, make_fill, workers=workers, cpus=cpus, gpus=gpus)
            for batch in mapped.iter_batches(batch_size=1):
                _raise_again(*json.loads(batch["error"][0]))
                bar.advance()
    except ray.exceptions.RayError as error:
        raise InputError(
            "--engine ray: workers were lost again and again; segments that are complete are kept: look for what ended "
            "the workers (memory, most often), and run the command again with fewer --ray-workers"
        ) from error
    finally:
        ray.shutdown()


def _mapped(ray: Any, parts: int, make_fill: Callable[[], FillPart], *, workers: int, cpus: float, gpus: float) -> Any:
    """Returns the Ray dataset of all parts, each filled when it is read."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ray_remote_args")  # nothing else sets the restarts yet
        return ray.data.from_items([{"part": part} for part in range(parts)], override_num_blocks=parts).map_batches(
            _Worker,
            fn_constructor_args=(make_fill, str(Path.cwd()), parts),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=cpus,
            num_gpus=gpus or None,
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
        )


class _Worker:
    """One process of the cluster. It prepares with its first part, since Ray restarts workers whose start fails."""

    def __init__(self, make_fill: Callable[[], FillPart], folder: str, parts: int) -> None:
        os.chdir(folder)
        setup_logging()
        self._make_fill, self._parts = make_fill, parts
        self._fill: FillPart | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"part": batch["part"], "error": [json.dumps(self._attempt(int(part))) for part in batch["part"]]}

    def _attempt(self, part: int) -> tuple[str, str]:
        """Returns name and text of the error that a part fails with: Ray would wrap it, or try again."""
        try:
            self._fill = self._fill or self._make_fill()
            self._fill((part, self._parts))
        except Sd3pipeError as error:
            return type(error).__name__, str(error)
        except Exception:
            return "", traceback.format_exc()
        return "", ""


def _start() -> Any:
    """Returns the module `ray`, connected to a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it tells of every lost worker, at length
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ParameterError('--engine ray needs Ray: pip install "sd3pipe[ray]"') from error
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _check_address(os.environ.get("RAY_ADDRESS", ""))
    with contextlib.chdir(sys.prefix):  # where Ray is started, its workers look for modules first
        ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, ignore_reinit_error=True)
    stopping.listen_again()  # Ray answers SIGTERM by leaving at once
    return ray


def _check_address(address: str) -> None:
    """Raises ParameterError where nobody listens: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return  # none, auto, local
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ParameterError(f"RAY_ADDRESS={address}: no cluster answers there: start one, or unset it") from error


def _raise_again(name: str, text: str) -> None:
    """Raises what a part failed with, if it did."""
    kind = getattr(errors, name, None) if name else None
    if kind is not None:
        raise kind(text)
    if text:
        raise RuntimeError(f"a worker failed:\n{text}")
