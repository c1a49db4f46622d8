"""The frozen base in its final places: on the device, in flat host buffers, packed or not, each byte read once."""

import torch

from sd3pipe.console import readable_bytes
from sd3pipe.device_memory import usable_device_bytes
from sd3pipe.errors import DeviceMemoryError
from sd3pipe.memory.choosing import Freedom, Limits, fitting_settings
from sd3pipe.memory.eight_bit import block_packing
from sd3pipe.memory.from_file import WeightsFile
from sd3pipe.memory.plan import Settings, Workload
from sd3pipe.memory.quantise import quantise_as
from sd3pipe.memory.sizes import model_size
from sd3pipe.memory.streaming import BlockStreamer
from sd3pipe.models.architecture import MMDiTArchitecture, mmdit_architecture
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.models.sources import ComponentSource
from sd3pipe.tensors.reader import TensorReader, read_tensors

_TABLE = "pos_embed"  # stays on the host; each step takes a window of it


def load_base(
    source: ComponentSource, *, dtype: torch.dtype, device: torch.device, settings: Settings = Settings()
) -> tuple[MMDiT, BlockStreamer]:
    """Returns the frozen model and what runs its blocks, read block by block.

    Blocks that stay in the file are read from it whenever they are streamed in, so it must not change while the base is
    in use. Host memory holds the other streamed blocks and one more, never a second copy of the model; without streamed
    blocks it holds one block at a time. Use the model as ever, and close the streamer (or use it in a `with`) when
    done. Raises InputError for an unusable file, ParameterError for more blocks than there are.
    """
    architecture = mmdit_architecture(source)
    mmdit = MMDiT(architecture, device="meta").eval()
    outside = [key for key in source.tensors if not key.startswith("joint_blocks.") and key != _TABLE]
    tensors = read_tensors(source.tensors, dtype=dtype, device=device, keys=outside)
    table = read_tensors(source.tensors, dtype=dtype, device="cpu", keys=[_TABLE])
    mmdit.load_state_dict(tensors | table, strict=False, assign=True)
    reader = TensorReader(may_stop=False)

    def read(index: int, name: str, destination: torch.Tensor) -> None:
        reader.read_into(source.tensors[f"joint_blocks.{index}.{name}"], destination)

    packing = block_packing(settings, device)

    def fill(index: int) -> None:
        """Reads one block, and packs it, where that is quickest: on the device."""
        prefix, block = f"joint_blocks.{index}.", mmdit.joint_blocks[index]
        keys = [key for key in source.tensors if key.startswith(prefix)]
        tensors = read_tensors(source.tensors, dtype=dtype, device="cpu", keys=keys)
        block.load_state_dict({key.removeprefix(prefix): tensors.pop(key) for key in keys}, strict=True, assign=True)
        if packing is not None:
            quantise_as(block.to(device), packing)

    streamer = BlockStreamer(
        mmdit,
        blocks_to_swap=settings.blocks_to_swap,
        device=device,
        modulation=settings.modulation,
        offload_activations=settings.activation_offload,
        file=WeightsFile(blocks=settings.file_blocks, dtype=dtype, read=read) if settings.file_blocks else None,
        fill=fill,
    )
    mmdit.keep_activations(settings.kept(architecture.depth))
    return mmdit.requires_grad_(False), streamer


def blocks_to_sample(architecture: MMDiTArchitecture, *, tokens: int, device: torch.device, dtype: torch.dtype) -> int:
    """Returns how many blocks to stream so that pictures of so many tokens can be drawn; none without CUDA.

    Raises DeviceMemoryError where even all of them are too few.
    """
    if device.type != "cuda":
        return 0
    return fewest_to_sample(architecture, tokens=tokens, dtype=dtype, device_bytes=usable_device_bytes(device))


def fewest_to_sample(architecture: MMDiTArchitecture, *, tokens: int, dtype: torch.dtype, device_bytes: int) -> int:
    """Returns the fewest blocks to stream with so much device memory. Raises DeviceMemoryError where all are too few.

    A step with the prompt and without it in one batch takes no more than a training step without kept block inputs.
    """
    model, work = model_size(architecture.shapes()), Workload(image_tokens=tokens, batch=2)
    wanted, limits = Settings(activation_offload=True, dtype_bytes=dtype.itemsize), Limits(device_bytes=device_bytes)
    found = fitting_settings(model, work, wanted, limits, freedom=Freedom(modes=("stream",)))
    if found is None:
        free = readable_bytes(device_bytes)
        raise DeviceMemoryError(f"{free} of free device memory are too little to draw in: draw smaller pictures")
    return found[0].blocks_to_swap
