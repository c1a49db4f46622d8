"""Options of `sd3pipe plan`; those that are train's, too, are in a project as its training has them."""

import re

from sd3pipe.params.fields import OptionPath, Params, option
from sd3pipe.params.stage import BlocksToRecompute, BlocksToSwap, Size
from sd3pipe.rules.memory import size_bytes
from sd3pipe.words import Algorithm, MatmulFormat, ModulationMode, PackedFormat, Precision

_PATHS, _MACHINE, _STEP, _MEMORY = "Paths", "Machine", "One step", "Memory and speed"


class PlanParams(Params):
    # fmt: off
    model: str | None = option(
        None, "Base model: a .safetensors file, a diffusers folder or a hub id. Only its header is read.",
        role="path", panel=_PATHS, paths_key="model", aliases=("pretrained_model_name_or_path",),
    )
    mmdit: OptionPath | None = option(
        None, "MMDiT file; beats the one in the model.", role="path", panel=_PATHS, advanced=True
    )
    dataset: OptionPath | None = option(
        None, "Dataset file: adds the disk space of its caches.", role="path", panel=_PATHS, paths_key="dataset",
        aliases=("dataset_config",),
    )
    vram: Size | None = option(
        None, "Memory of the card, such as 12GB or 24GiB: shows which settings fit.", panel=_MACHINE
    )
    ram: Size | None = option(None, "Memory of the host, such as 32GB.", panel=_MACHINE)
    tflops: float | None = option(
        None, "Matrix products that the card achieves, in TFLOP/s: predicts seconds; train reports it.",
        panel=_MACHINE, gt=0,
    )
    copy_gb_per_second: float = option(
        20.0, "Copies from host to card in GB/s; PCIe 4.0 x16 reaches about 25; train reports it.",
        panel=_MACHINE, gt=0,
    )
    read_gb_per_second: float = option(
        2.0, "Reads from the disk with the base model in GB/s, where --ram does not hold the swapped blocks.",
        panel=_MACHINE, advanced=True, gt=0,
    )
    resolution: str | None = option(
        None, "Pixels of a picture, such as 1024 or 768,512. Default: the dataset's largest, else 1024.",
        panel=_STEP, pattern=r"^[1-9]\d{0,5}([,x][1-9]\d{0,5})?$",
    )
    train_batch_size: int = option(1, "Pictures per forward pass.", panel=_STEP, ge=1)
    gradient_accumulation_steps: int = option(1, "Forward passes per step.", panel=_STEP, ge=1)
    t5xxl_max_token_length: int | None = option(
        None, "Text tokens of T5; CLIP adds 77. Default: as encode-text has it here.", panel=_STEP, ge=1
    )
    network_dim: int = option(16, "Rank of the adapter.", panel=_STEP, ge=1)
    adapter_type: Algorithm = option("lora", "Kind of adapter.", panel=_STEP)
    optimizer_type: str = option("AdamW", "AdamW, or a name with 8bit in it for moments of one byte.", panel=_STEP)
    mixed_precision: Precision = option("bf16", "Number format of the base.", panel=_MEMORY)
    gradient_checkpointing: BlocksToRecompute = option(
        "auto", "Blocks that are recomputed in the backward pass: on (all), off, or so many; auto: as few as fit.",
        panel=_MEMORY, switch=True,
    )
    blocks_to_swap: BlocksToSwap = option(
        "auto", "Joint blocks that are streamed; auto: as few as fit into --vram.", panel=_MEMORY
    )
    modulation: ModulationMode | None = option(
        None, "Where the adaLN weights of streamed blocks are.", panel=_MEMORY, advanced=True
    )
    base_dtype: PackedFormat | None = option(
        None, "Keep the base's blocks packed; default: as mixed_precision says.", panel=_MEMORY
    )
    matmul_dtype: MatmulFormat | None = option(
        None, "Take the base's own products in 8 bits; seconds are those of --tflops, so give what they achieve.",
        panel=_MEMORY,
    )
    matmul_rotation: bool | None = option(
        None, "Rotate what is multiplied in 8 bits; default: with int8.", panel=_MEMORY, advanced=True
    )
    activation_offload: bool = option(
        False, "Let the inputs of recomputed blocks wait in host memory.", panel=_MEMORY
    )
    layer_major: bool = option(False, "Accumulate block by block.", panel=_MEMORY)
    json_output: bool = option(False, "Print one JSON object instead of text.", aliases=("json",))
    # fmt: on

    @property
    def size_px(self) -> tuple[int, int] | None:
        """Width and height of a picture, None where they are the dataset's."""
        if self.resolution is None:
            return None
        numbers = [int(number) for number in re.split("[,x]", self.resolution)]
        return numbers[0], numbers[-1]

    @property
    def host_memory(self) -> str:
        """What is train's bound of host memory."""
        return self.ram or "auto"

    @property
    def vram_bytes(self) -> int | None:
        """Memory of the card; a bare number counts gigabytes."""
        return None if self.vram is None else size_bytes(self.vram)

    @property
    def ram_bytes(self) -> int | None:
        """Memory of the host; a bare number counts gigabytes."""
        return None if self.ram is None else size_bytes(self.ram)
