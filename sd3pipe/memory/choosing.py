"""Chooses settings that fit a machine: the quickest by the cost model, and what else there would be. Free of torch."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sd3pipe.memory.plan import Prediction, Rates, Settings, Workload, option_text, predict
from sd3pipe.memory.sizes import ModelSize
from sd3pipe.rules.memory import MemoryRules
from sd3pipe.words import ModulationMode

_OFFLOAD_COST = 1.02  # its own copies are not in the model
_STREAMING_COST = 1.05  # measured: 1.00 to 1.16 of what the model says, see docs/memory.md
_CLEARLY_LESS = 0.75

PlanRow = tuple[Settings, Prediction]


@dataclass(frozen=True, slots=True, kw_only=True)
class Freedom:
    """What the planner may choose; all else stays as wanted.

    blocks  how many blocks are streamed, and whether the inputs of recomputed ones wait on the host
    modes   where the adaLN weights of streamed blocks are used; with `blocks` alone
    kept    how many blocks keep attention's output or all activations, the more the quicker

    How many of the streamed blocks are read from the file follows from the limit of the host's memory, if there is one.
    """

    blocks: bool = True
    modes: Sequence[ModulationMode] = ("resident", "stream")
    kept: bool = False

    @classmethod
    def of(cls, rules: MemoryRules, *, modulation_is_open: bool) -> "Freedom":
        """Returns what options leave open."""
        return cls(
            blocks=rules.blocks_to_swap == "auto",
            modes=cls().modes if modulation_is_open else (rules.modulation,),
            kept=rules.gradient_checkpointing == "auto",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What there is of memory; None: any amount. Without a device the host's memory holds all."""

    device_bytes: int | None
    host_bytes: int | None = None

    def predicted(self, model: ModelSize, work: Workload, settings: Settings, rates: Rates | None = None) -> Prediction:
        prediction = predict(model, work, settings, rates)
        return prediction.on_host() if self.device_bytes is None else prediction

    def host_allows(self, prediction: Prediction) -> bool:
        return self.host_bytes is None or prediction.host_bytes <= self.host_bytes

    def allow(self, prediction: Prediction) -> bool:
        on_device = self.device_bytes is None or prediction.device_bytes <= self.device_bytes
        return on_device and self.host_allows(prediction)


def fitting_settings(
    model: ModelSize,
    work: Workload,
    wanted: Settings,
    limits: Limits,
    *,
    rates: Rates | None = None,
    freedom: Freedom = Freedom(),
) -> PlanRow | None:
    """Returns the quickest settings within the limits, or None.

    Without rates, those with the fewest copied bytes, then the fewest operations. The base format and all that changes
    numbers stay as wanted.
    """
    fitting = [
        row
        for variation in _variations(model, wanted, freedom)
        if (row := _most_kept(model, work, variation, limits, rates, freedom)) is not None
    ]
    return min(fitting, key=_order, default=None)


def alternatives(
    model: ModelSize,
    work: Workload,
    choice: PlanRow,
    limits: Limits,
    *,
    rates: Rates | None = None,
    freedom: Freedom = Freedom(),
) -> list[PlanRow]:
    """Returns up to two other ways: the quickest with clearly less device memory, and with clearly less of the host."""
    settings, prediction = choice
    on_host = limits.host_bytes if limits.host_bytes is not None else prediction.host_bytes
    less = [
        replace(limits, device_bytes=int(_CLEARLY_LESS * prediction.device_bytes)),
        replace(limits, host_bytes=min(on_host, int(_CLEARLY_LESS * prediction.host_bytes))),
    ]
    found = (fitting_settings(model, work, settings, limit, rates=rates, freedom=freedom) for limit in less)
    return [row for row in found if row is not None]


def advice(model: ModelSize, work: Workload, wanted: Settings, limits: Limits) -> str:
    """Returns what to say after the device ran out of memory: settings that need clearly less, the gentlest first."""
    assert limits.device_bytes is not None, "there is no settling for less without a device"
    target = int(min(0.9 * limits.device_bytes, 0.85 * predict(model, work, wanted).device_bytes))
    lean = replace(wanted, all_kept_blocks=0, attention_kept_blocks=0)
    ladder = [lean, *(replace(lean, base_format=name) for name in ("int8", "nf4") if wanted.base_format == "dense")]
    for rung in ladder:
        found = fitting_settings(model, work, rung, replace(limits, device_bytes=target))
        if found is not None:
            settings, prediction = found
            return f"{option_text(settings, model.depth)} should fit: about {prediction.device_bytes / 1e9:.1f} GB"
    if work.batch > 1:
        return f"train_batch_size = {max(1, work.batch // 2)} with gradient_accumulation_steps = 2 needs half as much"
    return "no settings for this size of picture fit: train at a lower resolution"


def _order(row: PlanRow) -> tuple[float, ...]:
    settings, prediction = row
    cost = prediction.copied_bytes if prediction.seconds is None else prediction.seconds
    cost *= _OFFLOAD_COST if settings.activation_offload else 1.0
    cost *= _STREAMING_COST if settings.blocks_to_swap else 1.0
    offload = settings.activation_offload
    return cost, prediction.operations, settings.file_blocks, settings.blocks_to_swap, offload, prediction.device_bytes


def _variations(model: ModelSize, wanted: Settings, freedom: Freedom) -> Iterator[Settings]:
    """Yields every number of streamed blocks, with and without offload; kept activations as wanted."""
    if not freedom.blocks:
        yield wanted
        return
    for offload in dict.fromkeys((wanted.activation_offload, True)):
        for count in range(model.depth + 1):
            for mode in freedom.modes if count else (wanted.modulation,):
                yield replace(wanted, blocks_to_swap=count, modulation=mode, activation_offload=offload)


def _most_kept(
    model: ModelSize, work: Workload, settings: Settings, limits: Limits, rates: Rates | None, freedom: Freedom
) -> PlanRow | None:
    """Returns the settings with as many activations kept as the limits allow, or None where even none are too many.

    Attention's output comes first, in block after block: for a 24th of the bytes it saves a quarter of the time. Each
    rung of that ladder takes more memory and fewer operations than the one before.
    """
    depth = model.depth

    def rung(number: int) -> Settings:
        if not freedom.kept:
            return settings
        whole = max(0, number - depth)
        return replace(settings, all_kept_blocks=whole, attention_kept_blocks=min(number, depth) - whole)

    found, low, high = None, 0, 2 * depth if freedom.kept else 0
    while low <= high:
        middle = (low + high + 1) // 2 if found else low  # the first rung settles whether there is any
        row = _within_host(model, work, rung(middle), limits, rates)
        if limits.allow(row[1]):
            found, low = row, middle + 1
        else:
            high = middle - 1
    return found


def _within_host(model: ModelSize, work: Workload, settings: Settings, limits: Limits, rates: Rates | None) -> PlanRow:
    """Returns the settings with as few blocks read from the file as the host's memory allows; packed ones never are."""
    row = settings, limits.predicted(model, work, settings, rates)
    if limits.host_allows(row[1]) or settings.base_format != "dense" or settings.modulation != "stream":
        return row

    def fits(count: int) -> bool:  # more of them take less of the host, beside the buffers that the first one brings
        return limits.host_allows(limits.predicted(model, work, replace(settings, file_blocks=count)))

    counts = range(1, settings.blocks_to_swap + 1)
    fewest = bisect.bisect_left(counts, True, key=fits)
    if fewest == len(counts):
        return row
    from_file = replace(settings, file_blocks=counts[fewest])
    return from_file, limits.predicted(model, work, from_file, rates)
