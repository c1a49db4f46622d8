"""The cost model: device and host memory, copies and seconds of a training step, before anything is loaded.

Free of torch. Bytes of weights, rings, optimizer and block inputs are exact; what one block keeps for its backward pass
is a measured multiple of its tokens; the allowance for CUDA itself is an estimate. See docs/memory.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sd3pipe.memory.schedule import RING_SLOTS, spread_evenly, step_copies
from sd3pipe.memory.sizes import BaseFormat, BlockSize, ModelSize
from sd3pipe.rules.memory import MemoryRules
from sd3pipe.words import ModulationMode

# Saved for the backward pass per token, in units of the width: measured on tiny models with every layer adapted.
_SAVED_PLAIN, _SAVED_QK_NORM, _SAVED_DUAL = 21, 24, 34
_GRADIENTS = 10  # of a block's intermediate values, alive at once; the widest are the MLP's, 4 each
_CUDA_BYTES = 600_000_000  # context, cuBLAS workspace, allocator slack: an estimate
PROCESS_BYTES = 700_000_000  # host memory of a process with torch imported
_OFFLOAD_COST = 1.02
_STAGED_BLOCKS = 2  # blocks whose inputs are on the device while all others' are on the host


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one step trains on."""

    image_tokens: int
    text_tokens: int = 333  # 77 of CLIP, 256 of T5
    batch: int = 1
    accumulation: int = 1
    adapter_weights: int = 0
    adapter_bytes_per_weight: int = 16  # fp32 weight and gradient, and AdamW's two moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user may choose to make a step fit."""

    base_format: BaseFormat = "dense"
    blocks_to_swap: int = 0
    modulation: ModulationMode = "stream"
    gradient_checkpointing: bool = True
    activation_offload: bool = False
    layer_major: bool = False
    dtype_bytes: int = 2

    @classmethod
    def of(cls, rules: MemoryRules, dtype_bytes: int) -> "Settings":
        """Returns the settings that options ask for; where blocks_to_swap is left open, without any."""
        return cls(
            base_format=rules.base_dtype or "dense",
            blocks_to_swap=0 if rules.blocks_to_swap == "auto" else rules.blocks_to_swap,
            modulation=rules.modulation,
            gradient_checkpointing=rules.gradient_checkpointing,
            activation_offload=rules.activation_offload,
            layer_major=rules.layer_major,
            dtype_bytes=dtype_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a machine achieves: matrix products in FLOP/s, and host-to-device copies in bytes/s."""

    flop_per_second: float
    copy_bytes_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a step takes."""

    device_parts: dict[str, int]
    host_parts: dict[str, int]
    copied_bytes: int  # per step
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


def predict(model: ModelSize, work: Workload, settings: Settings, rates: Rates | None = None) -> Prediction:
    """Returns memory, copies and, where rates are known, seconds of one training step."""
    streamed = spread_evenly(settings.blocks_to_swap, model.depth)
    copied = _copied_bytes(model, settings, streamed)
    repeats = 1 if settings.layer_major else work.accumulation
    compute, seconds = _seconds(model, work, settings, copied, rates) if rates else (None, None)
    return Prediction(
        device_parts=_device_parts(model, work, settings, streamed),
        host_parts=_host_parts(model, work, settings, streamed),
        copied_bytes=repeats * sum(copied),
        seconds=seconds,
        compute_seconds=compute,
    )


def adapter_bytes_per_weight(optimizer_type: str) -> int:
    """Returns the bytes that one adapter weight takes: itself and its gradient in fp32, and the optimizer's moments."""
    return 4 + 4 + (2 if "8bit" in optimizer_type.lower() else 8)


def fitting_settings(
    model: ModelSize,
    work: Workload,
    wanted: Settings,
    *,
    device_bytes: int,
    host_bytes: int | None = None,
    rates: Rates | None = None,
    modes: Sequence[ModulationMode] = ("resident", "stream"),
) -> tuple[Settings, Prediction] | None:
    """Returns the quickest variation of blocks_to_swap, modulation (of `modes`) and offloading that fits, or None.

    Without rates, the one with the fewest copied bytes. Offloading activations counts as 2 % dearer, since its own
    copies are not in the model. The base format and all that changes numbers stay as wanted.
    """
    fitting = []
    for settings in _variations(model, wanted, modes):
        prediction = predict(model, work, settings, rates)
        if prediction.device_bytes <= device_bytes and (host_bytes is None or prediction.host_bytes <= host_bytes):
            cost = prediction.copied_bytes if prediction.seconds is None else prediction.seconds
            cost *= _OFFLOAD_COST if settings.activation_offload else 1.0
            order = (cost, settings.blocks_to_swap, settings.activation_offload, prediction.device_bytes)
            fitting.append((order, settings, prediction))
    if not fitting:
        return None
    _, settings, prediction = min(fitting, key=lambda item: item[0])
    return settings, prediction


def advice(
    model: ModelSize, work: Workload, wanted: Settings, *, device_bytes: int, host_bytes: int | None = None
) -> str:
    """Returns what to say after the device ran out of memory: settings that need clearly less, the gentlest first."""
    ladder = [wanted, replace(wanted, gradient_checkpointing=True)]
    ladder += [replace(ladder[1], base_format=name) for name in ("int8", "nf4") if wanted.base_format == "dense"]
    target = int(min(0.9 * device_bytes, 0.85 * predict(model, work, wanted).device_bytes))
    for rung in ladder:
        found = fitting_settings(model, work, rung, device_bytes=target, host_bytes=host_bytes)
        if found is not None:
            settings, prediction = found
            return f"{option_text(settings)} should fit: about {prediction.device_bytes / 1e9:.1f} GB"
    if work.batch > 1:
        return f"train_batch_size = {max(1, work.batch // 2)} with gradient_accumulation_steps = 2 needs half as much"
    return "no settings for this size of picture fit: train at a lower resolution"


def option_text(settings: Settings) -> str:
    """Returns the settings as the options that a user would write."""
    words = [f"--blocks-to-swap {settings.blocks_to_swap}"]
    if settings.base_format != "dense":
        words.append(f"--base-dtype {settings.base_format}")
    if settings.blocks_to_swap and settings.modulation != "stream":
        words.append(f"--modulation {settings.modulation}")
    if settings.activation_offload:
        words.append("--activation-offload")
    if not settings.gradient_checkpointing:
        words.append("--no-gradient-checkpointing")
    return " ".join(words)


def _variations(model: ModelSize, wanted: Settings, modes: Sequence[ModulationMode]) -> Iterator[Settings]:
    for offload in dict.fromkeys((wanted.activation_offload, True)):
        if offload and not wanted.gradient_checkpointing:
            continue
        for count in range(model.depth + 1):
            for mode in modes if count else (wanted.modulation,):
                yield replace(wanted, blocks_to_swap=count, modulation=mode, activation_offload=offload)


def _device_parts(model: ModelSize, work: Workload, settings: Settings, streamed: tuple[int, ...]) -> dict[str, int]:
    resident = [block for number, block in enumerate(model.blocks) if number not in streamed]
    blocks = sum(_part_bytes(block, "whole", settings) for block in resident)
    if settings.modulation == "resident":
        blocks += sum(model.blocks[number].modulation_bytes(settings.dtype_bytes) for number in streamed)
    tokens = work.batch * (work.image_tokens + work.text_tokens)
    inputs = tokens * model.width * settings.dtype_bytes
    kept = min(_STAGED_BLOCKS, model.depth) if settings.activation_offload else model.depth
    if settings.layer_major and not settings.activation_offload:
        kept *= work.accumulation
    saved = [_saved_bytes(model, block, work, settings) for block in model.blocks]
    return {
        "resident blocks": blocks,
        "ring": sum(sum(_travelling(model, settings, ring)[:RING_SLOTS]) for ring in _rings(model, streamed)),
        "outside blocks": model.outside * settings.dtype_bytes,
        "block inputs": kept * inputs if settings.gradient_checkpointing else 0,
        "kept for backward": max(saved) if settings.gradient_checkpointing else sum(saved),
        "gradients of activations": _GRADIENTS * inputs,
        "unpacked weights": _unpacked_bytes(model, settings),
        "adapter and optimizer": work.adapter_weights * work.adapter_bytes_per_weight,
        "CUDA": _CUDA_BYTES,
    }


def _host_parts(model: ModelSize, work: Workload, settings: Settings, streamed: tuple[int, ...]) -> dict[str, int]:
    tokens = work.batch * (work.image_tokens + work.text_tokens)
    parts = {"process": PROCESS_BYTES, "position table": model.position_table * settings.dtype_bytes}
    with_modulation = settings.modulation != "resident"
    blocks = [model.blocks[number] for number in streamed]
    parts["streamed blocks"] = sum(
        _part_bytes(block, "whole", settings) - (0 if with_modulation else block.modulation_bytes(settings.dtype_bytes))
        for block in blocks
    )
    if settings.activation_offload:
        repeats = work.accumulation if settings.layer_major else 1
        parts["block inputs"] = repeats * model.depth * tokens * model.width * settings.dtype_bytes
    parts["one block while loading"] = max(
        _part_bytes(block, "whole", replace(settings, base_format="dense")) for block in model.blocks
    )
    return parts


def _copied_bytes(model: ModelSize, settings: Settings, streamed: tuple[int, ...]) -> tuple[int, int]:
    """Returns the bytes that the forward and the backward pass of a step fetch, once all is under way."""
    rings = _rings(model, streamed)
    both = step_copies(rings, modulation=settings.modulation)
    forward = both[: sum(copy.part != "body" for copy in both)] if settings.modulation == "stream" else []
    if settings.modulation != "stream":
        forward = both[: len(both) // 2]  # each pass fetches what the other one left out
    sizes = [_part_bytes(model.blocks[copy.block], copy.part, settings) for copy in both]
    return sum(sizes[: len(forward)]), sum(sizes[len(forward) :])


def _seconds(
    model: ModelSize, work: Workload, settings: Settings, copied: tuple[int, int], rates: Rates
) -> tuple[float, float]:
    """Returns seconds of pure computing, and of a step whose copies run beside it."""
    repeats = work.accumulation
    tokens = (work.batch, work.image_tokens, work.text_tokens)
    forward = model.forward_flop(*tokens) / rates.flop_per_second
    backward = model.backward_flop(*tokens, recompute=settings.gradient_checkpointing) / rates.flop_per_second
    fetches = [size / rates.copy_bytes_per_second for size in copied]
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


def _travelling(model: ModelSize, settings: Settings, ring: list[int]) -> list[int]:
    part = "whole" if settings.modulation == "stream" else "body"
    return [_part_bytes(model.blocks[number], part, settings) for number in ring]


def _part_bytes(block: BlockSize, part: str, settings: Settings) -> int:
    body = block.body_bytes(settings.dtype_bytes, settings.base_format)
    modulation = block.modulation_bytes(settings.dtype_bytes)
    return {"body": body, "modulation": modulation, "whole": body + modulation}[part]


def _saved_bytes(model: ModelSize, block: BlockSize, work: Workload, settings: Settings) -> int:
    plain = _SAVED_QK_NORM if model.qk_norm else _SAVED_PLAIN
    per_image_token = _SAVED_DUAL if block.dual else plain
    tokens = per_image_token * work.image_tokens + plain * work.text_tokens
    return work.batch * tokens * model.width * settings.dtype_bytes


def _unpacked_bytes(model: ModelSize, settings: Settings) -> int:
    """The largest weight, unpacked for a product; the one before it may not be freed yet."""
    return 0 if settings.base_format == "dense" else 2 * 4 * model.width**2 * settings.dtype_bytes
