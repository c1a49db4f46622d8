"""How many cores this process may use, and how its threads wait for each other. Imports no torch."""

import os
from collections.abc import MutableMapping
from pathlib import Path

# Rounds of waiting before a thread of libgomp, which runs torch's kernels on the CPU, gives up its core. By itself it
# waits some ten milliseconds: where others want the cores, every kernel then waits for a thread that waits for a core.
_SPINS = "10000"


def usable_cores(system: Path = Path("/")) -> int:
    """Returns the cores that affinity (taskset) and a container's quota leave to this process: one at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(system / "sys/fs/cgroup")
    return cores if quota is None else max(1, min(cores, int(quota)))


def thread_count(threads: int | None, environment: MutableMapping[str, str] = os.environ) -> int:
    """Returns the threads of `--threads`, else of OMP_NUM_THREADS, else one for each usable core.

    torchrun sets OMP_NUM_THREADS to 1 where nobody has set it; that is no user's word.
    """
    if threads is not None:
        return threads
    wanted = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list is for nested regions
    set_by_torchrun = wanted == "1" and "TORCHELASTIC_RUN_ID" in environment
    if wanted.isdecimal() and int(wanted) > 0 and not set_by_torchrun:
        return int(wanted)
    return usable_cores()


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets threads that wait give up their core soon, unless the user has set how OpenMP's threads wait.

    Acts on libraries that are loaded later, here and in processes below.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY", "OMP_PROC_BIND"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = _SPINS


def _quota(folder: Path) -> float | None:
    """Returns the cores that a control group (version 2, or 1) allows, None where it sets no bound."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = [word for name in names for word in (folder / name).read_text(encoding="ascii").split()]
            quota, period = map(int, words)
        except (OSError, ValueError):  # none, or "max"
            continue
        return quota / period if quota > 0 and period > 0 else None
    return None
