"""Options of `sd3pipe train`: named as in sd-scripts where it has them, with the defaults of a new project."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from sd3pipe.params.fields import OptionPath, Params, option
from sd3pipe.params.memory import BlocksToSwap
from sd3pipe.params.stage import StageParams

_PATHS, _ADAPTER, _OPTIMISATION, _LOSS = "Paths", "Adapter", "Optimisation", "Noise and loss"
_TEXT, _SAVING, _SAMPLES, _VALIDATION = "Text and position", "Saving and resuming", "Sample pictures", "Validation"
_RECORDS, _MEMORY = "Records", "Memory and speed"


def _steps_or_ratio(value: Any) -> Any:
    """Returns "10%" as 0.1, as sd-scripts reads it."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*%\s*", value) if isinstance(value, str) else None
    return float(match[1]) / 100 if match else value


def _shift(value: Any) -> Any:
    """Returns the number in a command line's text; "auto" stays."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[0-9.]+(e-?\d+)?", value) else value


def _duration(value: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?[smhd]?", value):
        raise ValueError("write seconds, or a number with s, m, h or d, such as 90m")
    return value


StepsOrRatio = Annotated[float, BeforeValidator(_steps_or_ratio), Field(ge=0)]
Shift = Annotated[Annotated[float, Field(gt=0)] | Literal["auto"], BeforeValidator(_shift)]
Duration = Annotated[str, AfterValidator(_duration)]


class SubsetOverride(Params):
    """What [subsets.NAME] may change without encoding."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    num_repeats: int | None = Field(default=None, ge=0)
    loss_weight: float | None = Field(default=None, ge=0)
    prior_loss_weight: float | None = Field(default=None, ge=0)
    caption_dropout_rate: float | None = Field(default=None, ge=0, le=1)
    caption_dropout_every_n_epochs: int | None = Field(default=None, ge=0)
    diff_output_preservation: bool | None = None


class TrainParams(StageParams):
    # fmt: off
    model: str = option(
        ..., "Base model: a .safetensors file, a diffusers folder or a hub id.",
        role="path", panel=_PATHS, paths_key="model", aliases=("pretrained_model_name_or_path",),
    )
    text: OptionPath = option(..., "Cache of encoded captions.", role="path", panel=_PATHS, paths_key="caches/text")
    latents: OptionPath = option(
        ..., "Cache of encoded pictures.", role="path", panel=_PATHS, paths_key="caches/latents"
    )
    prompts: OptionPath | None = option(
        None, "Cache of encoded sample prompts; without it no samples are drawn.",
        role="path", panel=_PATHS, paths_key="caches/prompts",
    )
    out: OptionPath = option(
        ..., "Folder of the run.", role="path", panel=_PATHS, paths_key="run", aliases=("output_dir",)
    )
    mmdit: OptionPath | None = option(
        None, "MMDiT in a file of its own; beats the one in --model.", role="path", panel=_PATHS, advanced=True
    )
    vae: OptionPath | None = option(
        None, "VAE in a file of its own, for sample pictures.",
        role="path", panel=_PATHS, paths_key="vae", advanced=True,
    )
    output_name: str | None = option(
        None, "Name of the adapter files in --loras-dir; default: the run folder's.", panel=_PATHS, pattern=r"^[^/\\]+$"
    )
    loras_dir: OptionPath | None = option(
        None, "Folder that each saved adapter is copied to, such as ComfyUI's models/loras.",
        role="path", panel=_PATHS, paths_key="loras_dir",
    )
    stale_ok: bool = option(
        False, "Train even though captions or pictures changed since they were encoded.", panel=_PATHS, advanced=True
    )

    network_dim: int = option(16, "Rank of the adapter.", role="identity", panel=_ADAPTER, ge=1)
    network_alpha: float | None = option(
        None, "Strength is alpha / rank; default (or 0): the rank, so strength 1.",
        role="identity", panel=_ADAPTER, ge=0,
    )
    adapter_type: Literal["lora", "dora", "loha", "lokr"] = option(
        "lora", "Kind of adapter.", role="identity", panel=_ADAPTER
    )
    network_dropout: float = option(
        0.0, "Share of rank activations dropped while training.",
        role="identity", panel=_ADAPTER, advanced=True, ge=0, lt=1,
    )
    network_args: tuple[str, ...] = option(
        (), "More about the adapter, as KEY=VALUE: context_attn_dim, context_mlp_dim, context_mod_dim, x_attn_dim, "
        "x_mlp_dim, x_mod_dim, emb_dims, train_block_indices, split_qkv, rank_dropout, module_dropout, "
        "loraplus_lr_ratio, rs_lora, lokr_factor.",
        role="identity", panel=_ADAPTER, advanced=True,
    )
    rank_rules: tuple[str, ...] = option(
        (), "PATTERN=RANK for modules whose path the regular expression is found in; 0 leaves them out.",
        role="identity", panel=_ADAPTER, advanced=True,
    )
    lr_rules: tuple[str, ...] = option(
        (), "PATTERN=RATE: learning rate of the modules whose path the regular expression is found in.",
        role="identity", panel=_ADAPTER, advanced=True,
    )
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

    learning_rate: float = option(
        1e-4, "Learning rate.", role="identity", panel=_OPTIMISATION, gt=0, aliases=("unet_lr",)
    )
    optimizer_type: str = option(
        "AdamW", "AdamW, AdamW8bit, Lion, Adafactor, Prodigy, AdamWScheduleFree, ..., a class of torch.optim, or a "
        "dotted class path.", role="identity", panel=_OPTIMISATION, trust="code",
    )
    allow_code: bool = option(
        False, "Import and run an optimizer that a parameter file names by a dotted class path.",
        panel=_OPTIMISATION, advanced=True, trust="typed",
    )
    optimizer_args: tuple[str, ...] = option(
        (), "Arguments of the optimizer as KEY=VALUE, such as weight_decay=0.01.",
        role="identity", panel=_OPTIMISATION, advanced=True,
    )
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr",
        "polynomial", "inverse_sqrt", "warmup_stable_decay", "piecewise_constant",
    ] = option("constant_with_warmup", "Learning rate over the steps.", role="identity", panel=_OPTIMISATION)
    lr_warmup_steps: StepsOrRatio = option(
        0.05, "Steps over which the learning rate rises; below 1 a share of all steps.",
        role="identity", panel=_OPTIMISATION,
    )
    lr_decay_steps: StepsOrRatio = option(
        0.0, "Steps over which warmup_stable_decay falls; below 1 a share of all steps.",
        role="identity", panel=_OPTIMISATION, advanced=True,
    )
    lr_scheduler_num_cycles: int = option(
        1, "Restarts of cosine_with_restarts.", role="identity", panel=_OPTIMISATION, advanced=True, ge=1
    )
    lr_scheduler_power: float = option(
        1.0, "Power of polynomial.", role="identity", panel=_OPTIMISATION, advanced=True, gt=0
    )
    lr_scheduler_min_lr_ratio: float = option(
        0.0, "Share of the learning rate at which a falling schedule ends.",
        role="identity", panel=_OPTIMISATION, advanced=True, ge=0, le=1,
    )
    lr_scheduler_timescale: int | None = option(
        None, "Steps that inverse_sqrt counts in; default: the warm-up.",
        role="identity", panel=_OPTIMISATION, advanced=True, ge=1,
    )
    lr_scheduler_args: tuple[str, ...] = option(
        (), "step_rules=FACTOR:STEP,FACTOR:STEP,FACTOR for piecewise_constant.",
        role="identity", panel=_OPTIMISATION, advanced=True,
    )
    max_train_steps: int = option(2000, "Steps to train.", panel=_OPTIMISATION, ge=1)
    max_train_epochs: int | None = option(
        None, "Epochs to train; overrides the steps.", panel=_OPTIMISATION, advanced=True, ge=1
    )
    train_batch_size: int = option(1, "Pictures per forward pass.", role="identity", panel=_OPTIMISATION, ge=1)
    gradient_accumulation_steps: int = option(
        1, "Forward passes per step, on each process.", panel=_OPTIMISATION, ge=1
    )  # times the processes, it is part of a run's identity
    max_grad_norm: float = option(
        1.0, "Gradients are scaled down to this norm; 0 leaves them.", role="identity", panel=_OPTIMISATION, ge=0
    )
    ema_decay: float | None = option(
        None, "Save the running average of the adapter with this decay, such as 0.999.",
        role="identity", panel=_OPTIMISATION, advanced=True, gt=0, lt=1,
    )
    seed: int = option(42, "Everything random is a function of it.", role="identity", panel=_OPTIMISATION, ge=0)

    loss_form: Literal["velocity", "x0"] = option(
        "velocity", "velocity: as SD3 was trained; x0: sd-scripts', weighted by sigma^2.", role="identity", panel=_LOSS
    )
    weighting_scheme: Literal["uniform", "none", "logit_normal", "mode", "cosmap", "sigma_sqrt"] = option(
        "logit_normal", "How noise levels are drawn, and under x0 weighted.", role="identity", panel=_LOSS
    )
    training_shift: Shift = option(
        "auto", "Moves noise levels towards noise above 1; auto: 3 at 1024 x 1024 pixels, less below.",
        role="identity", panel=_LOSS,
    )
    logit_mean: float = option(0.0, "Mean of logit_normal.", role="identity", panel=_LOSS, advanced=True)
    logit_std: float = option(
        1.0, "Standard deviation of logit_normal.", role="identity", panel=_LOSS, advanced=True, gt=0
    )
    mode_scale: float = option(1.29, "Scale of mode.", role="identity", panel=_LOSS, advanced=True)
    min_timestep: int = option(
        0, "Lowest timestep of 0..1000.", role="identity", panel=_LOSS, advanced=True, ge=0, le=999
    )
    max_timestep: int = option(
        1000, "Highest timestep of 0..1000.", role="identity", panel=_LOSS, advanced=True, ge=1, le=1000
    )
    loss_type: Literal["l2", "l1", "huber", "smooth_l1"] = option(
        "l2", "Penalty of an error.", role="identity", panel=_LOSS, advanced=True
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = option(
        "snr", "Where huber and smooth_l1 turn linear, over the noise levels.",
        role="identity", panel=_LOSS, advanced=True,
    )
    huber_c: float = option(0.1, "Where they turn linear.", role="identity", panel=_LOSS, advanced=True, gt=0)
    huber_scale: float = option(1.0, "Multiplies huber_c.", role="identity", panel=_LOSS, advanced=True, gt=0)
    masked_loss: Literal["mean", "sum", "off"] = option(
        "mean", "Masks encoded with the pictures: mean over their area, sum over the picture as in sd-scripts, or off.",
        role="identity", panel=_LOSS, advanced=True,
    )
    prior_loss_weight: float = option(
        1.0, "Weight of regularisation pictures.", role="identity", panel=_LOSS, advanced=True, ge=0
    )

    clip_l_dropout_rate: float = option(
        0.0, "Share of samples trained without CLIP-L.", role="identity", panel=_TEXT, advanced=True, ge=0, le=1
    )
    clip_g_dropout_rate: float = option(
        0.0, "Share of samples trained without CLIP-G.", role="identity", panel=_TEXT, advanced=True, ge=0, le=1
    )
    t5_dropout_rate: float = option(
        0.0, "Share of samples trained without T5.", role="identity", panel=_TEXT, advanced=True, ge=0, le=1
    )
    pos_emb_random_crop_rate: float = option(
        0.0, "Share of samples trained at a random place of the position table.",
        role="identity", panel=_TEXT, advanced=True, ge=0, le=1,
    )
    enable_scaled_pos_embed: bool = option(
        False, "Stretch position codes to each resolution; inference programs do not.",
        role="identity", panel=_TEXT, advanced=True,
    )
    subsets: dict[str, SubsetOverride] = option(
        {}, "Per subset: num_repeats, loss_weight, prior_loss_weight, caption_dropout_rate.",
        role="identity", panel=_TEXT, advanced=True,
    )

    save_every_n_steps: int | None = option(250, "Steps between checkpoints.", panel=_SAVING, ge=1)
    save_every_n_epochs: int | None = option(
        None, "Epochs between checkpoints.", panel=_SAVING, advanced=True, ge=1
    )
    save_last_n_steps: int | None = option(
        None, "Delete checkpoints that are this many steps old.", panel=_SAVING, advanced=True, ge=0
    )
    save_last_n_steps_state: int | None = option(
        None, "Delete optimizer states that are this many steps old; default: keep the newest two.",
        panel=_SAVING, advanced=True, ge=0,
    )
    save_last_n_epochs: int | None = option(
        None, "Delete checkpoints that are this many epochs old.", panel=_SAVING, advanced=True, ge=1
    )
    save_last_n_epochs_state: int | None = option(
        None, "Delete optimizer states that are this many epochs old.", panel=_SAVING, advanced=True, ge=1
    )
    save_precision: Literal["float", "fp16", "bf16"] | None = option(
        None, "Number format of saved adapters; default: as trained.", panel=_SAVING, advanced=True
    )
    resume: str = option(
        "auto", "auto: go on with an equal run; never: start afresh; or the checkpoint to go on from.", panel=_SAVING
    )
    allow_changes: tuple[str, ...] = option(
        (), "Parts of the run's identity that may differ on resume, separated by commas.", panel=_SAVING, advanced=True
    )
    time_limit: Duration | None = option(
        None, "Save and stop with exit code 75 after this time, such as 90m.", panel=_SAVING, advanced=True
    )
    on_bad_loss: Literal["stop", "rollback"] = option(
        "stop", "At a loss that is no number or spikes: stop, or leave that step out and go back a checkpoint.",
        panel=_SAVING, advanced=True,
    )
    loss_spike_factor: float | None = option(
        None, "A loss this many times the running mean counts as a spike; default: none does.",
        panel=_SAVING, advanced=True, gt=1,
    )

    sample_every_n_steps: int | None = option(250, "Steps between sample pictures.", panel=_SAMPLES, ge=1)
    sample_every_n_epochs: int | None = option(
        None, "Epochs between sample pictures.", panel=_SAMPLES, advanced=True, ge=1
    )
    sample_at_first: bool = option(
        True, "Draw samples before the first step, too.", panel=_SAMPLES, advanced=True
    )
    variant: Literal["sd35-large-turbo"] | None = option(
        None, "Sample with the turbo model's steps and scale; nothing else tells it from large.",
        panel=_SAMPLES, advanced=True,
    )

    validate_every_n_steps: int | None = option(
        250, "Steps between validations on held-out pictures.", panel=_VALIDATION, advanced=True, ge=1
    )
    validate_every_n_epochs: int | None = option(
        None, "Epochs between validations.", panel=_VALIDATION, advanced=True, ge=1
    )
    max_validation_steps: int | None = option(
        None, "Batches per validation; default: all.", panel=_VALIDATION, advanced=True, ge=1
    )
    validation_seed: int | None = option(
        None, "Seed of the validation noise; default: --seed.", panel=_VALIDATION, advanced=True, ge=0
    )

    log_with: Literal["tensorboard", "wandb", "all"] | None = option(
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
    metadata_title: str | None = option(None, "Title in the adapter's metadata.", panel=_RECORDS, advanced=True)
    metadata_author: str | None = option(None, "Author in the adapter's metadata.", panel=_RECORDS, advanced=True)
    metadata_description: str | None = option(
        None, "Description in the adapter's metadata.", panel=_RECORDS, advanced=True
    )
    metadata_license: str | None = option(None, "Licence in the adapter's metadata.", panel=_RECORDS, advanced=True)
    metadata_tags: str | None = option(None, "Tags in the adapter's metadata.", panel=_RECORDS, advanced=True)
    metadata_trigger_phrase: str | None = option(
        None, "Trigger phrase in the adapter's metadata.", panel=_RECORDS, advanced=True
    )
    metadata_usage_hint: str | None = option(
        None, "Usage hint in the adapter's metadata.", panel=_RECORDS, advanced=True
    )

    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = option(
        "auto", "Number format of the base and of computing; auto: bf16 where CUDA has it, float32 on the CPU.",
        panel=_MEMORY,
    )  # as resolved, it is part of a run's identity
    gradient_checkpointing: bool = option(
        True, "Recompute activations in the backward pass instead of keeping them.", panel=_MEMORY
    )
    base_dtype: Literal["fp8", "int8", "nf4"] | None = option(
        None, "Keep the base's blocks packed: fp8 scaled, int8 or nf4; default: as mixed_precision says.",
        role="identity", panel=_MEMORY, advanced=True,
    )
    blocks_to_swap: BlocksToSwap = option(
        "auto", "Blocks that stay in host memory and visit the device; auto: as few as fit, on CUDA; none on the CPU.",
        panel=_MEMORY,
    )
    modulation: Literal["stream", "resident", "ahead"] = option(
        "stream", "Where swapped blocks' adaLN weights are used: streamed, kept on the device, or on the host ahead.",
        panel=_MEMORY, advanced=True,
    )
    activation_offload: bool = option(
        False, "Let the inputs of recomputed blocks wait in host memory.", panel=_MEMORY, advanced=True
    )
    layer_major: bool = option(
        False, "Take all accumulated batches through a block before the next one is fetched; same result.",
        panel=_MEMORY, advanced=True,
    )
    tf32: bool = option(
        True, "Let CUDA round the factors of float32 products to TF32; off under deterministic.",
        panel=_MEMORY, advanced=True,
    )
    sdpa_backend: Literal["auto", "flash", "cudnn", "efficient", "math"] = option(
        "auto", "Kernel of the attention; auto: torch takes the quickest that fits the card.",
        panel=_MEMORY, advanced=True,
    )
    torch_compile: bool | None = option(
        None, "Compile the joint blocks, one graph for each shape of block; default: with CUDA and a C compiler, in "
        "runs of 500 steps or more, unless deterministic.",
        panel=_MEMORY, advanced=True,
    )
    deterministic: bool = option(
        False, "Equal bits on CUDA, too, at equal device and libraries; slower.", panel=_MEMORY, advanced=True
    )
    max_data_loader_n_workers: int | None = option(
        None, "Processes that read caches ahead; default: 2 with CUDA, none on the CPU.",
        panel=_MEMORY, advanced=True, ge=0,
    )
    verify_reads: Literal["always", "first", "never"] = option(
        "first", "When a row's digest is checked.", panel=_MEMORY, advanced=True
    )
    verify_weights: bool = option(
        False, "Hash the base model again instead of remembering its hash.", panel=_MEMORY, advanced=True
    )
    # fmt: on

    @model_validator(mode="after")
    def _check_together(self) -> "TrainParams":
        if self.dim_from_weights and self.network_weights is None:
            raise ValueError("dim_from_weights needs network_weights")
        if len(self.base_weights_multiplier) > len(self.base_weights):
            raise ValueError("base_weights_multiplier has more entries than base_weights")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps and "lr_warmup_steps" in self.model_fields_set:
            raise ValueError(
                "lr_scheduler = constant has no warm-up: choose constant_with_warmup, or lr_warmup_steps = 0"
            )
        return self
