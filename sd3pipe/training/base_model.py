"""The frozen base in its final places: on the device, in flat host buffers, packed or not, each byte read once."""

from collections.abc import Callable

import torch

from sd3pipe.memory.quantise import QuantisedFormat, quantise
from sd3pipe.memory.schedule import ModulationMode
from sd3pipe.memory.streaming import BlockStreamer
from sd3pipe.models.checkpoint import mmdit_architecture
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.models.sources import ComponentSource
from sd3pipe.models.weights import read_tensors

_TABLE = "pos_embed"  # stays on the host; each step takes a window of it


def load_base(
    source: ComponentSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    base_format: QuantisedFormat | None = None,
    blocks_to_swap: int = 0,
    modulation: ModulationMode = "stream",
    offload_activations: bool = False,
) -> tuple[MMDiT, BlockStreamer]:
    """Returns the frozen model and what runs its blocks, read block by block.

    Host memory holds the streamed blocks and one more, never a second copy of the model; without streamed blocks it
    holds one block at a time. Use the model as ever, and close the streamer (or use it in a `with`) when done. Raises
    InputError for an unusable file, ParameterError for more blocks than there are.
    """
    architecture = mmdit_architecture(source)
    mmdit = MMDiT(architecture, device="meta").eval()
    outside = [key for key in source.tensors if not key.startswith("joint_blocks.")]
    outside.remove(_TABLE)
    tensors = read_tensors(source, dtype=dtype, device=device, keys=outside)
    table = read_tensors(source, dtype=dtype, device="cpu", keys=[_TABLE])
    mmdit.load_state_dict(tensors | table, strict=False, assign=True)
    streamer = BlockStreamer(
        mmdit,
        blocks_to_swap=blocks_to_swap,
        device=device,
        modulation=modulation,
        offload_activations=offload_activations,
        fill=_filler(mmdit, source, dtype, device, base_format),
    )
    return mmdit.requires_grad_(False), streamer


def _filler(
    mmdit: MMDiT,
    source: ComponentSource,
    dtype: torch.dtype,
    device: torch.device,
    base_format: QuantisedFormat | None,
) -> Callable[[int], None]:
    """Returns the function that reads one block, and packs it, where that is quickest: on the device."""

    def fill(index: int) -> None:
        prefix = f"joint_blocks.{index}."
        block = mmdit.joint_blocks[index]
        keys = [key for key in source.tensors if key.startswith(prefix)]
        tensors = read_tensors(source, dtype=dtype, device="cpu", keys=keys)
        block.load_state_dict({key.removeprefix(prefix): tensors.pop(key) for key in keys}, strict=True, assign=True)
        if base_format is not None:
            quantise(block.to(device), base_format)

    return fill
