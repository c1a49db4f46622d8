"""Chooses how the base is kept before it is loaded: measures the card, asks the cost model, says what to expect."""

import functools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from sd3pipe.adapters.kind import AdapterLayer
from sd3pipe.adapters.kinds import KINDS
from sd3pipe.adapters.weights import activation_rank, adapter_weights
from sd3pipe.console import readable_bytes
from sd3pipe.device_memory import memory_errors, peak_rss_bytes, share_of_memory, usable_device_bytes
from sd3pipe.errors import DeviceMemoryError, ParameterError
from sd3pipe.memory.choosing import Freedom, Limits, advice, fitting_settings
from sd3pipe.memory.plan import (
    PROCESS_BYTES,
    Prediction,
    Rates,
    Settings,
    Workload,
    adapter_bytes_per_weight,
    option_text,
    predict,
)
from sd3pipe.memory.sizes import image_tokens, model_size
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.params.train import TrainParams
from sd3pipe.training.adapter_options import adapter_spec
from sd3pipe.training.kept_by_kinds import kept_beside_lora
from sd3pipe.training.rates import measure_rates, measure_reading

log = logging.getLogger(__name__)

_SHARE_OF_HOST = 0.5  # for training on the CPU; the rest is for rows, samples and other programs
_HOST_ADVICE = "stream fewer blocks, pack the base (--base-dtype int8, then nf4) or free some"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How the base is kept, and what that is expected to cost."""

    architecture: MMDiTArchitecture
    work: Workload
    settings: Settings
    rates: Rates | None
    prediction: Prediction

    def as_report(
        self, *, peak_device_bytes: int, seconds_per_step: float | None, copied_bytes_per_step: int | None
    ) -> dict[str, object]:
        """Returns prediction beside truth, for the run's report."""
        depth = self.architecture.depth
        return {
            "blocks_to_swap": self.settings.blocks_to_swap,
            "recomputed_blocks": self.settings.recomputed_blocks(depth),
            "attention_kept_blocks": self.settings.attention_kept_blocks,
            "file_blocks": self.settings.file_blocks,
            "settings": asdict(self.settings),
            "rates": None if self.rates is None else asdict(self.rates),
            # torch does not count what CUDA itself takes
            "device_bytes": {"predicted": self.prediction.tensor_bytes, "measured": peak_device_bytes},
            "device_parts": self.prediction.device_parts,
            "host_bytes": {"predicted": self.prediction.host_bytes, "measured": peak_rss_bytes()},
            "seconds_per_step": {"predicted": self.prediction.seconds, "measured": seconds_per_step},
            "copied_bytes_per_step": {"predicted": self.prediction.copied_bytes, "measured": copied_bytes_per_step},
        }

    def advice(self, device: torch.device) -> str:
        """Returns which settings would fit, after the device ran out of memory."""
        if device.type != "cuda":
            return _HOST_ADVICE
        total = torch.cuda.mem_get_info(device)[1]
        model = model_size(self.architecture.shapes())
        return advice(model, self.work, self.settings, Limits(device_bytes=total))


def run_memory(
    params: TrainParams,
    architecture: MMDiTArchitecture,
    *,
    resolutions_px: Iterable[tuple[int, int]],
    text_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    files: Sequence[Path] = (),
) -> MemoryPlan:
    """Returns the memory plan of a training run, for the largest of its pictures; `files` hold the base.

    Raises ParameterError and DeviceMemoryError.
    """
    spec, sizes = adapter_spec(params.adapter, seed=params.seed), architecture.linear_sizes()
    work = Workload(
        image_tokens=max(image_tokens(width, height) for width, height in resolutions_px),
        text_tokens=text_tokens,
        batch=params.batches.train_batch_size,
        accumulation=params.batches.gradient_accumulation_steps,
        adapter_weights=adapter_weights(sizes, spec),
        adapter_rank=activation_rank(spec),
        adapter_bytes_per_weight=adapter_bytes_per_weight(params.optimizer.optimizer_type),
    )
    work = replace(work, adapter_kept_bytes=kept_beside_lora(architecture, spec, work, dtype))
    rules = params.memory
    wanted = Settings.of(rules, dtype.itemsize, architecture.depth)
    freedom = Freedom.of(rules, modulation_is_open="modulation" not in params.model_fields_set)
    plan = plan_memory(
        architecture, work, wanted, freedom, device=device, dtype=dtype, host_bound=rules.host_bytes, files=files
    )
    _check_blocks_in_file(params, plan.settings)
    return plan


def _check_blocks_in_file(params: TrainParams, settings: Settings) -> None:
    """Refuses what needs weights of the base in memory that stay in the file. Raises ParameterError."""
    if not settings.file_blocks:
        return
    reason = ""
    if params.base_weights:
        reason = "base_weights are merged into the whole base"
    elif KINDS[params.adapter.adapter_type].layer_class.measure is not AdapterLayer.measure:
        reason = f"{KINDS[params.adapter.adapter_type].title} starts from the base's own weights"
    if reason:
        raise ParameterError(
            f"the host's memory holds {settings.blocks_to_swap - settings.file_blocks} of {settings.blocks_to_swap} "
            f"swapped blocks, and {reason}: give --host-memory more, or leave that out"
        )


def plan_memory(
    architecture: MMDiTArchitecture,
    work: Workload,
    wanted: Settings,
    freedom: Freedom,
    *,
    device: torch.device,
    dtype: torch.dtype,
    host_bound: int | None = None,
    files: Sequence[Path] = (),
) -> MemoryPlan:
    """Returns the settings to train with: the quickest that fit, as far as there is freedom to choose.

    On CUDA the copy bandwidth and one block's time are measured, which takes about a second. Without CUDA blocks have
    nowhere to be streamed from: activations alone are chosen, within half of what the host has left. `host_bound` is
    what the user gives of the host's memory. Where that does not hold the streamed blocks, the disk's rate is measured
    once. Raises DeviceMemoryError where nothing fits.
    """
    host = share_of_memory()
    limit = host_bound if host_bound is not None else None if host is None else host + PROCESS_BYTES
    rates = None
    if device.type == "cuda":
        free = usable_device_bytes(device)  # before anything of ours lies there
        smaller = "a smaller train_batch_size or a lower" if work.batch > 1 else "a lower"
        way_out = f"not even one block runs at this size of picture: choose {smaller} resolution, or free the card"
        with memory_errors(lambda: way_out):
            rates = measure_rates(architecture, work, wanted, device=device, dtype=dtype)
        torch.cuda.empty_cache()
        if freedom.blocks or freedom.kept:
            chosen = functools.partial(choose, architecture, work, wanted, freedom, device_bytes=free, host_limit=limit)
            plan = chosen(rates=rates)
            if plan.settings.file_blocks and files:
                plan = chosen(rates=replace(rates, read_bytes_per_second=measure_reading(files)))
            return plan
    elif host is not None and (freedom.kept or host_bound is not None):
        wanted = _chosen_on_the_host(architecture, work, wanted, freedom, host=host, host_bound=host_bound)
    prediction = predict(model_size(architecture.shapes()), work, wanted, rates)
    if device.type != "cuda":
        prediction = prediction.on_host()
    if host is not None and prediction.added_host_bytes > host:
        log.warning(
            "this run needs about %s of host memory, and %s are left: %s",
            readable_bytes(prediction.added_host_bytes),
            readable_bytes(host),
            _HOST_ADVICE,
        )
    return MemoryPlan(architecture=architecture, work=work, settings=wanted, rates=rates, prediction=prediction)


def choose(
    architecture: MMDiTArchitecture,
    work: Workload,
    wanted: Settings,
    freedom: Freedom = Freedom(),
    *,
    device_bytes: int,
    host_limit: int | None = None,
    rates: Rates | None,
) -> MemoryPlan:
    """Returns the quickest settings that fit the device and, with all that this process holds, the host's memory.

    Raises DeviceMemoryError where none do.
    """
    model = model_size(architecture.shapes())
    limits = Limits(device_bytes=device_bytes, host_bytes=host_limit)
    found = fitting_settings(model, work, wanted, limits, rates=rates, freedom=freedom)
    if found is None:
        on_host = "" if host_limit is None else f" and {readable_bytes(host_limit)} of host memory"
        raise DeviceMemoryError(
            f"no number of streamed blocks fits {readable_bytes(device_bytes)} of free device memory{on_host}: "
            + advice(model, work, replace(wanted, blocks_to_swap=0), limits)
        )
    settings, prediction = found
    seconds = "" if prediction.seconds is None else f", {prediction.seconds:.2f} s a step expected"
    log.info(
        "memory: %s (%s of %s expected%s)",
        option_text(settings, architecture.depth),
        readable_bytes(prediction.device_bytes),
        readable_bytes(device_bytes),
        seconds,
    )
    if settings.file_blocks:
        log.info(
            "%d of %d swapped blocks are read from the file, %s a step: give --host-memory more where there is more",
            settings.file_blocks,
            settings.blocks_to_swap,
            readable_bytes(prediction.read_bytes),
        )
    return MemoryPlan(architecture=architecture, work=work, settings=settings, rates=rates, prediction=prediction)


def _chosen_on_the_host(
    architecture: MMDiTArchitecture,
    work: Workload,
    wanted: Settings,
    freedom: Freedom,
    *,
    host: int,
    host_bound: int | None,
) -> Settings:
    """Returns the settings for training on the CPU: activations that the host has room for, blocks that it holds.

    Blocks are read from the file for a bound that the user gives, and for no activations that might be kept instead.
    """
    model, room = model_size(architecture.shapes()), int(_SHARE_OF_HOST * host) + PROCESS_BYTES
    for kept, most in ((True, room), (False, None)):
        bounds = [limit for limit in (most, host_bound) if limit is not None]
        limits = Limits(device_bytes=None, host_bytes=min(bounds, default=None))
        found = fitting_settings(
            model, work, wanted, limits, freedom=replace(freedom, blocks=False, kept=kept and freedom.kept)
        )
        if found is not None and not (host_bound is None and found[0].file_blocks):
            return found[0]
    if host_bound is None:
        return wanted
    raise DeviceMemoryError(
        f"{readable_bytes(host_bound)} of host memory hold too few of the blocks, which on a CPU stay there but for "
        "--blocks-to-swap of them: give more of either, or pack the base (--base-dtype int8, then nf4)"
    )
