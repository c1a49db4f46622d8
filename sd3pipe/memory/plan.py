"""The cost model: device and host memory, copies and seconds of a training step, before anything is loaded.

Free of torch. Bytes of weights, rings, optimizer and of what blocks keep for the backward pass are exact; the
allowance for CUDA itself is an estimate. See docs/memory.md.
"""

import itertools
from dataclasses import dataclass, replace

from sd3pipe.errors import ParameterError
from sd3pipe.memory.schedule import RING_SLOTS, STAGING_BUFFERS, kept_activations, spread_evenly, step_copies
from sd3pipe.memory.sizes import BlockSize, ModelSize, Tokens, kept_bytes
from sd3pipe.rules.memory import MemoryRules
from sd3pipe.words import BaseFormat, KeptActivations, MatmulFormat, ModulationMode

_GRADIENTS = 10  # of a block's intermediate values, alive at once; the widest are the MLP's, 4 each
_CUDA_BYTES = 600_000_000  # context, cuBLAS workspace, allocator slack: an estimate
PROCESS_BYTES = 700_000_000  # host memory of a process with torch imported
_ADAPTER_FORMAT_BYTES = 4  # float32
_STAGED_BLOCKS = 2  # blocks whose inputs are on the device while all others' are on the host


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one step trains on."""

    image_tokens: int
    text_tokens: int = 333  # 77 of CLIP, 256 of T5
    batch: int = 1
    accumulation: int = 1
    adapter_weights: int = 0
    adapter_rank: int = 0
    adapter_kept_bytes: int = 0  # of one block, beside what the layers of a LoRA of that rank keep
    adapter_bytes_per_weight: int = 16  # fp32 weight and gradient, and AdamW's two moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user may choose to make a step fit."""

    base_format: BaseFormat = "dense"
    matmul_dtype: MatmulFormat | None = None  # which then is the base's format, too
    matmul_rotation: bool | None = None  # None: with int8
    blocks_to_swap: int = 0
    modulation: ModulationMode = "stream"
    all_kept_blocks: int = 0  # which keep all their activations
    attention_kept_blocks: int = 0  # which keep attention's output, and compute the rest again
    file_blocks: int = 0  # streamed ones that the host does not hold
    activation_offload: bool = False
    layer_major: bool = False
    dtype_bytes: int = 2

    @classmethod
    def of(cls, rules: MemoryRules, dtype_bytes: int, depth: int) -> "Settings":
        """Returns the settings that options ask for; what is left open is set to what takes least of the device.

        Raises ParameterError for more blocks than there are.
        """
        check_blocks("blocks_to_swap", rules.blocks_to_swap, depth)
        check_blocks("gradient_checkpointing", rules.gradient_checkpointing, depth)
        recomputed = rules.gradient_checkpointing
        return cls(
            base_format=rules.matmul_dtype or rules.base_dtype or "dense",
            matmul_dtype=rules.matmul_dtype,
            matmul_rotation=rules.matmul_rotation,
            blocks_to_swap=0 if rules.blocks_to_swap == "auto" else rules.blocks_to_swap,
            modulation=rules.modulation,
            all_kept_blocks=depth - recomputed if isinstance(recomputed, int) else depth if recomputed == "off" else 0,
            activation_offload=rules.activation_offload,
            layer_major=rules.layer_major,
            dtype_bytes=dtype_bytes,
        )

    def kept(self, depth: int) -> tuple[KeptActivations, ...]:
        """Returns what each of so many blocks keeps for its backward pass."""
        return kept_activations(depth, all_kept=self.all_kept_blocks, attention_kept=self.attention_kept_blocks)

    def recomputed_blocks(self, depth: int) -> int:
        """Returns how many of so many blocks keep nothing but their inputs."""
        return depth - self.all_kept_blocks - self.attention_kept_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a machine achieves: matrix products in FLOP/s, host-to-device copies and reads of the file in bytes/s."""

    flop_per_second: float
    copy_bytes_per_second: float
    read_bytes_per_second: float = 2e9  # an NVMe disk; measured where it counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a step takes."""

    device_parts: dict[str, int]
    host_parts: dict[str, int]
    copied_bytes: int  # per step
    read_bytes: int  # of the file, per step
    operations: float  # of a step, the recomputation among them
    seconds: float | None = None
    compute_seconds: float | None = None

    @property
    def device_bytes(self) -> int:
        return sum(self.device_parts.values())

    @property
    def tensor_bytes(self) -> int:
        """What torch itself has to hold on the device."""
        return self.device_bytes - self.device_parts["CUDA"]

    @property
    def host_bytes(self) -> int:
        return sum(self.host_parts.values())

    @property
    def added_host_bytes(self) -> int:
        """What comes to a process that has torch imported."""
        return self.host_bytes - self.host_parts["process"]

    def on_host(self) -> "Prediction":
        """Returns the same where the device is the host itself, whose memory holds all."""
        host_parts = dict(self.host_parts)
        for name, size in self.device_parts.items():
            host_parts[name] = host_parts.get(name, 0) + (0 if name == "CUDA" else size)
        return replace(self, device_parts={"CUDA": 0}, host_parts=host_parts)


def predict(model: ModelSize, work: Workload, settings: Settings, rates: Rates | None = None) -> Prediction:
    """Returns memory, copies and, where rates are known, seconds of one training step."""
    streamed = spread_evenly(settings.blocks_to_swap, model.depth)
    copied = _copied_bytes(model, settings, streamed, streamed)
    read = _copied_bytes(model, settings, streamed, _file_numbers(settings, streamed))
    repeats = 1 if settings.layer_major else work.accumulation
    tokens = (work.batch, work.image_tokens, work.text_tokens)
    passes = (model.forward_flop(*tokens), model.backward_flop(*tokens, kept=settings.kept(model.depth)))
    compute, seconds = _seconds(work, settings, passes, (copied, read), rates) if rates else (None, None)
    return Prediction(
        device_parts=_device_parts(model, work, settings, streamed),
        host_parts=_host_parts(model, work, settings, streamed),
        copied_bytes=repeats * sum(copied),
        read_bytes=repeats * sum(read),
        operations=work.accumulation * sum(passes),
        seconds=seconds,
        compute_seconds=compute,
    )


def check_blocks(option: str, blocks: int | str, depth: int) -> None:
    """Raises ParameterError where an option asks for more blocks than the model has."""
    if isinstance(blocks, int) and blocks > depth:
        name = f"--{option.replace('_', '-')}"
        raise ParameterError(f"{name} {blocks}: the model has {depth} blocks: use at most {depth}")


def adapter_bytes_per_weight(optimizer_type: str) -> int:
    """Returns the bytes that one adapter weight takes: itself and its gradient in fp32, and the optimizer's moments."""
    return 4 + 4 + (2 if "8bit" in optimizer_type.lower() else 8)


def option_text(settings: Settings, depth: int) -> str:
    """Returns the settings as the options that a user would write for a model of so many blocks."""
    recomputed = settings.recomputed_blocks(depth)
    kept = {depth: "on", 0: "off"}.get(recomputed, str(recomputed))
    if settings.attention_kept_blocks:  # the planner's choice alone
        parts = [f"attention kept in {settings.attention_kept_blocks} blocks"]
        parts += [f"{recomputed} recomputed"] if recomputed else []
        parts += [f"{settings.all_kept_blocks} kept whole"] if settings.all_kept_blocks else []
        kept = f"auto ({', '.join(parts)})"
    words = [f"--blocks-to-swap {settings.blocks_to_swap} --gradient-checkpointing {kept}"]
    if settings.matmul_dtype is not None:
        words.append(f"--matmul-dtype {settings.matmul_dtype}")
        if settings.matmul_rotation is not None:
            words.append("--matmul-rotation" if settings.matmul_rotation else "--no-matmul-rotation")
    elif settings.base_format != "dense":
        words.append(f"--base-dtype {settings.base_format}")
    if settings.blocks_to_swap and settings.modulation != "stream":
        words.append(f"--modulation {settings.modulation}")
    if settings.activation_offload:
        words.append("--activation-offload")
    if settings.file_blocks:
        words.append(f"({settings.file_blocks} of the swapped blocks read from the file)")
    return " ".join(words)


def _device_parts(model: ModelSize, work: Workload, settings: Settings, streamed: tuple[int, ...]) -> dict[str, int]:
    resident = [block for number, block in enumerate(model.blocks) if number not in streamed]
    blocks = sum(_part_bytes(block, "whole", settings) for block in resident)
    if settings.modulation == "resident":
        blocks += sum(model.blocks[number].modulation_bytes(settings.dtype_bytes) for number in streamed)
    part = "whole" if settings.modulation == "stream" else "body"
    in_slots = [number for ring in _rings(model, streamed) for number in ring[:RING_SLOTS]]
    packed = settings.base_format != "dense" and settings.matmul_dtype is None
    return {
        "resident blocks": blocks,
        "ring": sum(_part_bytes(model.blocks[number], part, settings) for number in in_slots),
        "outside blocks": model.outside * settings.dtype_bytes,
        **_activation_parts(model, work, settings),
        "gradients of activations": _GRADIENTS * _tokens(model, work, settings).input_bytes,
        # the largest weight, unpacked for a product; the one before it may not be freed yet
        "unpacked weights": 2 * 4 * model.width**2 * settings.dtype_bytes if packed else 0,
        "products in 8 bits": _product_bytes(model, work, settings),
        "adapter and optimizer": work.adapter_weights * work.adapter_bytes_per_weight,
        "CUDA": _CUDA_BYTES,
    }


def _host_parts(model: ModelSize, work: Workload, settings: Settings, streamed: tuple[int, ...]) -> dict[str, int]:
    parts = {"process": PROCESS_BYTES, "position table": model.position_table * settings.dtype_bytes}
    with_modulation = settings.modulation != "resident"
    in_file = _file_numbers(settings, streamed)
    blocks = [model.blocks[number] for number in streamed if number not in in_file]
    parts["streamed blocks"] = sum(
        _part_bytes(block, "whole", settings) - (0 if with_modulation else block.modulation_bytes(settings.dtype_bytes))
        for block in blocks
    )
    if settings.activation_offload:
        repeats = work.accumulation if settings.layer_major else 1
        leaving = model.depth - settings.all_kept_blocks
        parts["block inputs"] = repeats * leaving * _tokens(model, work, settings).input_bytes
    if in_file:
        largest = max(_part_bytes(model.blocks[number], "whole", settings) for number in in_file)
        parts["buffers for the file"] = STAGING_BUFFERS * largest
    as_read = replace(settings, base_format="dense")
    parts["one block while loading"] = max(_part_bytes(block, "whole", as_read) for block in {*model.blocks})
    return parts


def _file_numbers(settings: Settings, streamed: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(streamed[number] for number in spread_evenly(settings.file_blocks, len(streamed)))


def _copied_bytes(
    model: ModelSize, settings: Settings, streamed: tuple[int, ...], some: tuple[int, ...]
) -> tuple[int, int]:
    """Returns the bytes of `some` blocks that the two passes of a step fetch, once all is under way."""
    both = step_copies(_rings(model, streamed), modulation=settings.modulation)
    forward = len(both) // 2  # each pass fetches what the other one left out
    if settings.modulation == "stream":
        forward = sum(copy.part != "body" for copy in both)
    sizes = [_part_bytes(model.blocks[copy.block], copy.part, settings) * (copy.block in some) for copy in both]
    return sum(sizes[:forward]), sum(sizes[forward:])


def _seconds(
    work: Workload, settings: Settings, passes: tuple[float, float], fetched: tuple[tuple[int, int], ...], rates: Rates
) -> tuple[float, float]:
    """Returns seconds of pure computing, and of a step whose copies and reads (`fetched`, by pass) run beside it."""
    repeats = work.accumulation
    forward, backward = (operations / rates.flop_per_second for operations in passes)
    speeds = (rates.copy_bytes_per_second, rates.read_bytes_per_second)
    fetches = [
        max(size / speed for size, speed in zip(of_pass, speeds, strict=True)) for of_pass in zip(*fetched, strict=True)
    ]
    if settings.layer_major:
        step = max(repeats * forward, fetches[0]) + max(repeats * backward, fetches[1])
    else:
        step = repeats * (max(forward, fetches[0]) + max(backward, fetches[1]))
    return repeats * (forward + backward), step


def _rings(model: ModelSize, streamed: tuple[int, ...]) -> list[list[int]]:
    rings: dict[BlockSize, list[int]] = {}
    for number in streamed:
        rings.setdefault(model.blocks[number], []).append(number)
    return list(rings.values())


def _part_bytes(block: BlockSize, part: str, settings: Settings) -> int:
    body = block.body_bytes(settings.dtype_bytes, settings.base_format) if part != "modulation" else 0
    return body + (block.modulation_bytes(settings.dtype_bytes) if part != "body" else 0)


def _tokens(model: ModelSize, work: Workload, settings: Settings) -> Tokens:
    return Tokens(
        width=model.width,
        image=work.batch * work.image_tokens,
        text=work.batch * work.text_tokens,
        dtype_bytes=settings.dtype_bytes,
        rank=work.adapter_rank,
        qk_norm=model.qk_norm,
    )


def _activation_parts(model: ModelSize, work: Workload, settings: Settings) -> dict[str, int]:
    """Returns what activations take at the moment of the backward pass when they take most.

    While a block is differentiated, those of the blocks before it are there, and all of its own, computed again or not.
    """
    tokens, kept = _tokens(model, work, settings), settings.kept(model.depth)
    repeats = work.accumulation if settings.layer_major else 1
    whole = {block: kept_bytes(block, tokens, "all") + work.adapter_kept_bytes for block in {*model.blocks}}
    sizes = {
        (block, of_block): whole[block] if of_block == "all" else kept_bytes(block, tokens, of_block)
        for block, of_block in {*zip(model.blocks, kept, strict=True)}
    }
    casts = work.adapter_weights * settings.dtype_bytes // model.depth  # of fp32 adapters to a 16-bit base's format
    if settings.dtype_bytes == _ADAPTER_FORMAT_BYTES:
        casts = 0
    inputs, beside = [], []
    for block, of_block in zip(model.blocks, kept, strict=True):
        leaves = settings.activation_offload and of_block != "all"
        inputs.append(0 if leaves else repeats * tokens.input_bytes)
        more = sizes[block, of_block] - tokens.input_bytes + (casts if of_block == "all" else 0)
        beside.append(repeats * more)
    staged = min(_STAGED_BLOCKS, kept.count("none") + kept.count("attention")) if settings.activation_offload else 0
    again = [
        0 if of_block == "all" else whole[block] + casts - (sizes[block, of_block] - tokens.input_bytes)
        for block, of_block in zip(model.blocks, kept, strict=True)
    ]
    sums = zip(itertools.accumulate(inputs), itertools.accumulate(beside), again, strict=True)
    of_inputs, of_others, one_block = max(sums, key=sum)
    return {
        "block inputs": of_inputs + staged * tokens.input_bytes,
        "kept activations": of_others,
        "one block computed again": one_block,
    }


def _product_bytes(model: ModelSize, work: Workload, settings: Settings) -> int:
    """What the widest product in 8 bits takes beside its operands: rounded values, 32-bit sums and their scaled form.

    In the gradient of its input, fp8 wants the weight by columns, which is a copy of it.
    """
    if settings.matmul_dtype is None:
        return 0
    widest = 4 * model.width
    transposed = widest * model.width if settings.matmul_dtype == "fp8" else 0
    return (1 + 4 + 4) * widest * _tokens(model, work, settings).all + transposed
