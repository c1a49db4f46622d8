"""torch.compile for the joint blocks: how, and where it pays."""

import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._triton import has_triton

from sd3pipe.models.mmdit import MMDiT
from sd3pipe.rules.memory import NumericsRules

log = logging.getLogger(__name__)

PAYS_FROM_STEPS = 500  # compiling takes one to two minutes, a step half or three quarters of its time
_GRAPHS = 64  # of a block's code; torch's 8 are fewer than kinds of blocks x training or not x one size or any


def compile_blocks(
    mmdit: MMDiT, backend: str | Callable[..., object] = "inductor", *, may_fail: bool = False, sizes: int = 1
) -> None:
    """Lets torch compile each joint block when it first runs; blocks of one shape share their graphs.

    Weights are inputs of the graphs, so that streamed blocks may change the memory behind them. Beyond its limit of
    graphs torch would go on without compiling, in silence. With `may_fail`, torch warns of what it cannot compile and
    goes on; else it raises. Where pictures come in several `sizes`, the graphs are general from the first one on.
    """
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS)
    dynamo.suppress_errors = may_fail
    for block in mmdit.joint_blocks:
        block.compile(backend=backend, dynamic=True if sizes > 1 else None)


def compile_as_wanted(mmdit: MMDiT, rules: NumericsRules, device: torch.device, steps: int, sizes: int) -> None:
    """Compiles the blocks where that was asked for or, left open, where it pays."""
    if rules.torch_compile:
        compile_blocks(mmdit, sizes=sizes)
    elif rules.torch_compile is None and not rules.deterministic and compiling_pays(device, steps):
        log.info("compiling the blocks; the first steps take a minute or two longer (--no-torch-compile: not)")
        compile_blocks(mmdit, may_fail=True, sizes=sizes)


def compilations() -> int:
    """Returns how many graphs torch has compiled in this process."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and to ask it would import it
        return 0
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiling_pays(device: torch.device, steps: int) -> bool:
    """Returns whether a run of so many steps ends sooner with compiled blocks: a long one, on a card, with the tools.

    Inductor writes its kernels in triton, which builds a launcher in C for each.
    """
    if device.type != "cuda" or steps < PAYS_FROM_STEPS or not has_triton():
        return False
    compilers = (os.environ.get("CC"), "gcc", "clang", "cl")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return any(name and shutil.which(name) for name in compilers) and headers.exists()
