"""The processes that train together: one, or those that torchrun or accelerate started."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import Tensor, distributed

from sd3pipe.device import choose_device
from sd3pipe.errors import ParameterError

log = logging.getLogger(__name__)

T = TypeVar("T")

# the main process draws samples and writes while the others wait; a launcher ends them all at once where one has died
_LONGEST_WAIT = timedelta(hours=12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """This process among all; sums over them are sums of one where there is one."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds a tensor up over all processes, in place, and returns it."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def mean_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replaces each gradient by its mean over all processes, in one message."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.sum(flat).div_(self.count)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def same(self, value: T) -> T:
        """Returns the main process's value on every process."""
        if self.count == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, device=self.device if self.device.type == "cuda" else None)
        return values[0]

    def all(self, value: T) -> list[T]:
        """Returns the values of all processes, in the order of their ranks, on every process."""
        if self.count == 1:
            return [value]
        values: list[T | None] = [None] * self.count
        distributed.all_gather_object(values, value)
        return cast(list[T], values)

    def any(self, flag: bool) -> bool:
        """Returns on every process whether any of them says so."""
        return any(self.all(flag))

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def leave(self) -> None:
        """Ends the group of processes."""
        if self.count > 1:
            distributed.destroy_process_group()


def join_processes(device_name: str, threads: int | None) -> Processes:
    """Returns this process's place among those that torchrun or accelerate launch started, or alone.

    Raises ParameterError where the launcher promised more processes than found each other.
    """
    device = choose_device(device_name, threads)
    promised = int(os.environ.get("WORLD_SIZE", "1"))
    if promised == 1:
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
            log.info("one process: accelerate launch starts no more than one on a CPU; torchrun does")
        return Processes(rank=0, count=1, device=device)
    from accelerate import Accelerator  # takes its time, and one process needs none of it
    from accelerate.utils import InitProcessGroupKwargs

    # without cpu=True accelerate may start a single process on a machine without CUDA, and say nothing
    accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)])
    if accelerator.num_processes != promised:
        raise ParameterError(
            f"the launcher started {promised} processes, but {accelerator.num_processes} found each other: "
            "check MASTER_ADDR, MASTER_PORT and the accelerate configuration"
        )
    return Processes(rank=accelerator.process_index, count=promised, device=accelerator.device)
