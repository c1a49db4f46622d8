"""Options of `sd3pipe train`: named as in sd-scripts where it has them, with the defaults of a new project."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, Field, model_validator

from sd3pipe.params.fields import FileName, OptionPath, Params, RunPath, group, option
from sd3pipe.params.stage import MMDIT, StageParams, base_model
from sd3pipe.rules.adapter import AdapterRules
from sd3pipe.rules.description import Description
from sd3pipe.rules.feeding import EncoderDropout, PositionRules, ReadingRules
from sd3pipe.rules.flow import LossRules, SigmaSampling
from sd3pipe.rules.memory import MemoryRules, NumericsRules
from sd3pipe.rules.occasions import BadLossRules, SampleRules, SavingRules, ValidationRules
from sd3pipe.rules.optimisation import BatchRules, OptimizerRules, ScheduleRules
from sd3pipe.words import Trackers, WantedPrecision

_PATHS, _ADAPTER, _OPTIMISATION, _LOSS = "Paths", "Adapter", "Optimisation", "Noise and loss"
_TEXT, _SAVING, _SAMPLES, _VALIDATION = "Text and position", "Saving and resuming", "Sample pictures", "Validation"
_RECORDS, _MEMORY = "Records", "Memory and speed"
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _duration(value: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?[smhd]?", value):
        raise ValueError("write seconds, or a number with s, m, h or d, such as 90m")
    return value


def duration_seconds(text: str) -> float:
    """Returns seconds from "90", "90s", "15m", "1.5h" or "2d"."""
    return float(text[:-1]) * _SECONDS[text[-1]] if text[-1] in _SECONDS else float(text)


Duration = Annotated[str, AfterValidator(_duration)]


class SubsetOverride(Params):
    """What [subsets.NAME] may change without encoding."""

    num_repeats: int | None = Field(default=None, ge=0)
    loss_weight: float | None = Field(default=None, ge=0)
    prior_loss_weight: float | None = Field(default=None, ge=0)
    caption_dropout_rate: float | None = Field(default=None, ge=0, le=1)
    caption_dropout_every_n_epochs: int | None = Field(default=None, ge=0)
    diff_output_preservation: bool | None = None


class TrainParams(StageParams):
    # fmt: off
    model: str = base_model(...)
    text: OptionPath = option(..., "Cache of encoded captions.", role="path", panel=_PATHS, paths_key="caches/text")
    latents: OptionPath = option(
        ..., "Cache of encoded pictures.", role="path", panel=_PATHS, paths_key="caches/latents"
    )
    prompts: OptionPath | None = option(
        None, "Cache of encoded sample prompts; without it no samples are drawn.",
        role="path", panel=_PATHS, paths_key="caches/prompts",
    )
    out: RunPath = option(
        ..., "Folder of the run.", role="path", panel=_PATHS, paths_key="run", aliases=("output_dir",)
    )
    mmdit: OptionPath | None = MMDIT
    vae: OptionPath | None = option(
        None, "VAE in a file of its own, for sample pictures.",
        role="path", panel=_PATHS, paths_key="vae", advanced=True,
    )
    output_name: FileName | None = option(
        None, "Name of the adapter files in --loras-dir; default: the run folder's.", panel=_PATHS
    )
    loras_dir: OptionPath | None = option(
        None, "Folder that each saved adapter is copied to, such as ComfyUI's models/loras.",
        role="path", panel=_PATHS, paths_key="loras_dir",
    )
    stale_ok: bool = option(
        False, "Train even though captions or pictures changed since they were encoded.", panel=_PATHS, advanced=True
    )

    adapter: AdapterRules = group(_ADAPTER, role="identity")
    network_weights: OptionPath | None = option(
        None, "Adapter to start from: a file, a checkpoint or a run folder.", role="path", panel=_ADAPTER
    )
    dim_from_weights: bool = option(
        False, "Take ranks and alphas from --network-weights.", role="identity", panel=_ADAPTER, advanced=True
    )
    base_weights: tuple[OptionPath, ...] = option(
        (), "Adapters merged into the base before training.", role="path", panel=_ADAPTER, advanced=True
    )
    base_weights_multiplier: tuple[float, ...] = option(
        (), "Strength of each of --base-weights; default 1.", role="identity", panel=_ADAPTER, advanced=True
    )
    scale_weight_norms: float | None = option(
        None, "Largest norm of a module's weight change; larger ones are scaled down after each step.",
        role="identity", panel=_ADAPTER, advanced=True, gt=0,
    )
    full_bf16: bool = option(
        False, "Keep the adapter in bfloat16, updated with stochastic rounding.",
        role="identity", panel=_ADAPTER, advanced=True,
    )

    optimizer: OptimizerRules = group(_OPTIMISATION, role="identity")
    schedule: ScheduleRules = group(_OPTIMISATION, role="identity")
    batches: BatchRules = group(_OPTIMISATION, role="identity")
    max_grad_norm: float = option(
        1.0, "Gradients are scaled down to this norm; 0 leaves them.", role="identity", panel=_OPTIMISATION, ge=0
    )
    ema_decay: float | None = option(
        None, "Save the running average of the adapter with this decay, such as 0.999.",
        role="identity", panel=_OPTIMISATION, advanced=True, gt=0, lt=1,
    )
    seed: int = option(42, "Everything random is a function of it.", role="identity", panel=_OPTIMISATION, ge=0)

    noise: SigmaSampling = group(_LOSS, role="identity")
    loss: LossRules = group(_LOSS, role="identity")
    prior_loss_weight: float = option(
        1.0, "Weight of regularisation pictures.", role="identity", panel=_LOSS, advanced=True, ge=0
    )

    encoder_dropout: EncoderDropout = group(_TEXT, role="identity")
    positions: PositionRules = group(_TEXT, role="identity")
    subsets: dict[str, SubsetOverride] = option(
        {}, "Per subset: num_repeats, loss_weight, prior_loss_weight, caption_dropout_rate.",
        role="identity", panel=_TEXT, advanced=True,
    )

    saving: SavingRules = group(_SAVING)
    resume: str = option(
        "auto", "auto: go on with an equal run; never: start afresh; or the checkpoint to go on from.", panel=_SAVING
    )
    allow_changes: tuple[str, ...] = option(
        (), "Parts of the run's identity that may differ on resume, separated by commas.", panel=_SAVING, advanced=True
    )
    time_limit: Duration | None = option(
        None, "Save and stop with exit code 75 after this time, such as 90m.", panel=_SAVING, advanced=True
    )
    bad_loss: BadLossRules = group(_SAVING)

    samples: SampleRules = group(_SAMPLES)
    validation: ValidationRules = group(_VALIDATION)

    log_with: Trackers | None = option(
        None, "Trackers to log to, besides metrics.jsonl.", panel=_RECORDS, advanced=True
    )
    logging_dir: OptionPath | None = option(
        None, "Folder for TensorBoard's files; default: OUT/logs.", role="path", panel=_RECORDS, advanced=True
    )
    log_tracker_name: str | None = option(
        None, "Project name at the tracker; default: the output name.", panel=_RECORDS, advanced=True
    )
    wandb_run_name: str | None = option(None, "Name of the run at W&B.", panel=_RECORDS, advanced=True)
    training_comment: str | None = option(
        None, "Goes into the adapter's metadata.", panel=_RECORDS, advanced=True
    )
    description: Description = group(_RECORDS)

    mixed_precision: WantedPrecision = option(
        "auto", "Number format of the base and of computing; auto: bf16 where CUDA has it, float32 on the CPU.",
        panel=_MEMORY,
    )  # as resolved, it is part of a run's identity
    memory: MemoryRules = group(_MEMORY)
    numerics: NumericsRules = group(_MEMORY)
    reading: ReadingRules = group(_MEMORY)
    # fmt: on

    @model_validator(mode="after")
    def _check_together(self) -> "TrainParams":
        if self.dim_from_weights and self.network_weights is None:
            raise ValueError("dim_from_weights needs network_weights")
        if len(self.base_weights_multiplier) > len(self.base_weights):
            raise ValueError("base_weights_multiplier has more entries than base_weights")
        if self.memory.matmul_dtype is not None and self.memory.base_dtype is not None:
            raise ValueError("matmul_dtype keeps the base in the format that it multiplies in: leave base_dtype out")
        has_warmup = self.schedule.lr_warmup_steps and "lr_warmup_steps" in self.model_fields_set
        if self.schedule.lr_scheduler == "constant" and has_warmup:
            raise ValueError(
                "lr_scheduler = constant has no warm-up: choose constant_with_warmup, or lr_warmup_steps = 0"
            )
        return self


# option -> (the option that it depends on, the values, or the type of values, under which it acts)
_ACTS_UNDER: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "lr_decay_steps": ("lr_scheduler", ("warmup_stable_decay",)),
    "lr_scheduler_num_cycles": ("lr_scheduler", ("cosine_with_restarts",)),
    "lr_scheduler_power": ("lr_scheduler", ("polynomial",)),
    "lr_scheduler_timescale": ("lr_scheduler", ("inverse_sqrt",)),
    "lr_scheduler_min_lr_ratio": (
        "lr_scheduler",
        ("linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "warmup_stable_decay"),
    ),
    "logit_mean": ("weighting_scheme", ("logit_normal",)),
    "logit_std": ("weighting_scheme", ("logit_normal",)),
    "mode_scale": ("weighting_scheme", ("mode",)),
    "huber_schedule": ("loss_type", ("huber", "smooth_l1")),
    "huber_c": ("loss_type", ("huber", "smooth_l1")),
    "huber_scale": ("loss_type", ("huber", "smooth_l1")),
    "network_dim": ("dim_from_weights", (False,)),
    "network_alpha": ("dim_from_weights", (False,)),
    "adapter_type": ("dim_from_weights", (False,)),
    "train_layers": ("dim_from_weights", (False,)),
    "rank_rules": ("dim_from_weights", (False,)),
    "activation_offload": ("gradient_checkpointing", ("auto", "on", int)),
    "matmul_rotation": ("matmul_dtype", ("int8", "fp8")),
    "logging_dir": ("log_with", get_args(Trackers)),
    "log_tracker_name": ("log_with", get_args(Trackers)),
    "wandb_run_name": ("log_with", ("wandb", "all")),
}


def idle_options(params: TrainParams) -> list[str]:
    """Returns one line for each option that differs from its default and cannot act."""
    lines = []
    for name, (other, values) in _ACTS_UNDER.items():
        value, state = getattr(params, name), getattr(params, other)
        if state not in values and type(state) not in values and value != TrainParams.model_fields[name].get_default():
            wanted = " or ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values if v is not int)
            lines.append(f"{name} has no effect here: it acts under {other} = {wanted}")
    return lines
