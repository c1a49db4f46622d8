"""A peer's own offloading classes around our blocks: unchanged, from a checkout of sd-scripts or musubi-tuner."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Where the classes are, and what has to be importable for that file.
_PLACES = {
    "library/custom_offloading_utils.py": ".",
    "src/musubi_tuner/modules/custom_offloading_utils.py": "src",
}
_CLASSES = ("ModelOffloader", "LoRAStreamOffloader")  # the exchange of blocks, and musubi-tuner's one-way form
_SUBMIT = ("submit_move_blocks_forward", "submit_move_blocks")  # by version


class PeerError(Exception):
    """The checkout is none of those that are known here."""


class WholeBlock(nn.Module):
    """A block with its modulation inside, as peers have them."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, context_BLD: Tensor, x_BLD: Tensor, condition_BD: Tensor) -> tuple[Tensor, Tensor]:
        return self.block(context_BLD, x_BLD, *self.block.modulation(condition_BD))


class PeerRunner:
    """Runs a model's blocks, which a peer's class moves, in the order in which the peer's training loops do."""

    copied_bytes = 0  # the peer does not count them

    def __init__(
        self, mmdit: Any, checkout: Path, class_name: str, *, blocks_to_swap: int, device: torch.device
    ) -> None:
        self._mmdit = mmdit
        self._blocks = [WholeBlock(block) for block in mmdit.joint_blocks]
        known = {
            "block_type": "joint",
            "blocks": self._blocks,
            "num_blocks": len(self._blocks),
            "blocks_to_swap": blocks_to_swap,
            "supports_backward": True,
            "device": device,
            "use_pinned_memory": True,
        }
        kind = getattr(_offloading(checkout), class_name)
        wanted = inspect.signature(kind.__init__).parameters
        self._offloader = kind(**{name: value for name, value in known.items() if name in wanted})
        self._offloader.prepare_block_devices_before_forward(self._blocks)
        self._submit: Callable[..., None] = next(
            getattr(self._offloader, name) for name in _SUBMIT if hasattr(self._offloader, name)
        )
        mmdit.block_runner = self

    def __call__(self, index: int, context_BLD: Tensor, x_BLD: Tensor, condition_BD: Tensor) -> tuple[Tensor, Tensor]:
        self._offloader.wait_for_block(index)
        result = checkpoint(self._blocks[index], context_BLD, x_BLD, condition_BD, use_reentrant=False)
        self._submit(self._blocks, index)
        return result

    def close(self) -> None:
        """Lets the model run its blocks itself again."""
        self._mmdit.block_runner = None


def offloading_classes(checkout: Path) -> list[str]:
    """Returns the names of the classes that a checkout has. Raises PeerError for one that is not known."""
    module = _offloading(checkout)
    return [name for name in _CLASSES if hasattr(module, name)]


def _offloading(checkout: Path) -> ModuleType:
    for place, root in _PLACES.items():
        if (checkout / place).is_file():
            sys.path.insert(0, str((checkout / root).resolve()))
            spec = importlib.util.spec_from_file_location("peer_offloading", checkout / place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise PeerError(f"{checkout}: has none of {', '.join(_PLACES)}")
