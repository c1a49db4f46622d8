"""What becomes of each option of sd-scripts' sd3_train_network.py (revision 48d368fa), in one table.

`from-kohya` translates by it, a word that is no option of a stage is answered from it, in files as on the command line,
and docs/from-sd-scripts.md shows it. Nothing is accepted and ignored: an option either acts, or is answered here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sd3pipe.params.stage_file import toml_value

# steps   a number of steps, or a share of all of them
# size    W,H or one number; range: LOW,HIGH
# words, floats   several of them
Kind = Literal["flag", "int", "float", "steps", "str", "size", "range", "words", "floats"]

# acts     its value goes to `places`
# read     from-kohya reads it: `text` says as what
# met      asks for what happens in any case
# idle     changes nothing in what is trained, neither there nor here
# refused  acts there, and cannot here
Fate = Literal["acts", "read", "met", "idle", "refused"]

SECRETS = ("wandb_api_key", "huggingface_token")  # whose values are never shown
_NOTHING = (None, "", "None", [], ())


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKey:
    """A key of a stage's file, of dataset.toml or of project.toml; its value is the given one unless it is fixed."""

    file: str
    key: str
    value: Any = None

    def __str__(self) -> str:
        key = self.key if self.value is None else f"{self.key} = {toml_value(self.value)}"
        if self.file == "project":
            return f"[paths] {key} in project.toml"
        return f"{key} in {'dataset.toml' if self.file == 'dataset' else f'stages/{self.file}.toml'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SdScriptsOption:
    """Type and default of one option, where None means no value unless one is given, and what becomes of it.

    `met` are the values whose wish is met anyway, `otherwise` answers the others; `off` are values that ask for
    nothing, beside the default and zero.
    """

    kind: Kind
    default: Any
    fate: Fate
    places: tuple[FileKey, ...] = ()
    text: str = ""
    met: tuple[Any, ...] = ()
    otherwise: str = ""
    off: tuple[Any, ...] = ()

    def is_off(self, value: Any) -> bool:
        """Whether a value asks for nothing."""
        if value in _NOTHING or value in self.off:
            return True
        if self.fate == "acts":
            return value is False and any(place.value is not None for place in self.places)
        several = isinstance(value, list | tuple)
        return value == self.default or (not any(value) if several else value in (False, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What to say to a word that is no option here: accepted (its wish is met) or not, and one line."""

    accepted: bool
    text: str


def answer(name: str, value: Any) -> Answer | None:
    """Returns what to say to an option of sd-scripts or a key of a dataset file; None if it is neither.

    None also for options that a stage has under the same name: which one it is depends on the stage.
    """
    row = OPTIONS.get(name)
    if name in DATASET_KEYS:
        return Answer(accepted=False, text="it belongs in dataset.toml")
    if row is None:
        return None
    if row.fate == "met":
        return Answer(accepted=value in row.met, text=row.text if value in row.met else row.otherwise or row.text)
    if row.fate != "acts":
        return Answer(accepted=False, text=row.text if row.fate == "read" else f"not supported: {row.text}")
    place = row.places[0]
    if place.file == "dataset":
        return Answer(
            accepted=False, text="it belongs in dataset.toml" + (f", as {place.key}" if place.key != name else "")
        )
    if place.file == "project":
        return Answer(accepted=False, text=f"it is {place}")
    return None if place.key == name else Answer(accepted=False, text=f"say {place}")


def _acts(kind: Kind, default: Any, *places: str, off: tuple[Any, ...] = (), **fixed: Any) -> SdScriptsOption:
    """An option that goes to `places`, 'FILE' or 'FILE.KEY'; `fixed` are the values of FILE_KEY that do not vary."""
    parts = [place.partition(".")[::2] for place in places]
    found = tuple(FileKey(file=file, key=key, value=fixed.get(key)) for file, key in parts)
    return SdScriptsOption(kind=kind, default=default, fate="acts", places=found, off=off)


def _read(kind: Kind, text: str) -> SdScriptsOption:
    return SdScriptsOption(kind=kind, default=None, fate="read", text=text)


def _met(
    text: str, *, met: tuple[Any, ...] = (True,), otherwise: str = "", kind: Kind = "flag", default: Any = False
) -> SdScriptsOption:
    return SdScriptsOption(kind=kind, default=default, fate="met", text=text, met=met, otherwise=otherwise)


def _idle(kind: Kind, text: str, default: Any = None, off: tuple[Any, ...] = ()) -> SdScriptsOption:
    return SdScriptsOption(kind=kind, default=False if kind == "flag" else default, fate="idle", text=text, off=off)


def _refused(kind: Kind, text: str, default: Any = None) -> SdScriptsOption:
    return SdScriptsOption(kind=kind, default=False if kind == "flag" else default, fate="refused", text=text)


_CACHED = "the encode stages always write a cache on disk"
_SDPA = "attention always runs through torch's scaled_dot_product_attention"
_NOISE = "sd-scripts accepts it for SD3 and ignores it; flow matching has no such term"
_EPSILON = "sd-scripts accepts it for SD3 and ignores it; it is defined for noise prediction: see weighting_scheme"
_UPLOAD = "sd3pipe uploads nothing; send the exported file with the hub's own client"
_SHARDED = "a LoRA and its optimizer are small; stream the base with blocks_to_swap instead"
_BROKEN = "sd-scripts declares it as not working"
_UNTRAINED = "text encoders are not trained: their outputs are cached; use a caption word as trigger instead"
_WARM_UP = "captions are encoded before training: use caption_tag_dropout_rate with caption_variants"
_DDP = "the adapter's gradients are reduced without DDP's wrapper, so there is nothing to set"
_REPORT = "runs/NAME/report.json records every option"
_EXACT = "resume is exact: there is nothing to skip"

_MODELS = {
    "pretrained_model_name_or_path": _acts("str", None, "project.model"),
    "clip_l": _acts("str", None, "project.clip_l"),
    "clip_g": _acts("str", None, "project.clip_g"),
    "t5xxl": _acts("str", None, "project.t5xxl"),
    "vae": _acts("str", None, "project.vae"),
    "tokenizer_cache_dir": _acts("str", None, "project.tokenizers"),
    "v2": _idle("flag", "sd3pipe trains SD3 and SD3.5 only"),
    "v_parameterization": _idle("flag", "SD3 predicts the flow's velocity: see loss_form"),
    "disable_mmap_load_safetensors": _met("weights are read without mmap", met=(True, False)),
    "lowram": _met("each component is loaded alone", met=(True, False)),
    "highvram": _met("nothing is flushed between batches", met=(True, False)),
    "no_half_vae": _met("the VAE computes in float32", met=(True, False)),
    "clip_skip": _idle("int", "SD3 always takes the penultimate layer; sd-scripts ignores it for SD3", off=(1,)),
    "max_token_length": _idle(
        "int", "CLIP reads 77 tokens; T5's are t5xxl_max_token_length in stages/encode_text.toml"
    ),
    "save_clip": _idle("flag", f"{_BROKEN}; text encoders are not changed by training"),
    "save_t5xxl": _idle("flag", f"{_BROKEN}; text encoders are not changed by training"),
    "t5xxl_device": _idle("str", f"{_BROKEN}; use --device of encode-text"),
    "t5xxl_dtype": _idle("str", f"{_BROKEN}; see t5xxl_base_dtype in stages/encode_text.toml"),
}

_DATA = {
    "config_file": _read("str", "from-kohya reads it: its values count where the command says nothing"),
    "dataset_config": _read("str", "it is [paths] dataset in project.toml, or --dataset; from-kohya rewrites the file"),
    "train_data_dir": _read("str", "write a dataset file: `sd3pipe init --images DIR` does it, from-kohya each N_NAME"),
    "reg_data_dir": _read("str", "write a dataset file with is_reg = true for that subset, as from-kohya does"),
    "in_json": _read("str", "write a dataset file with metadata_file, as from-kohya does"),
    "conditioning_data_dir": _read("str", "it belongs in dataset.toml, into each subset, where from-kohya writes it"),
    "resolution": _acts("size", None, "dataset"),
    "enable_bucket": _acts("flag", False, "dataset"),
    "min_bucket_reso": _acts("int", 256, "dataset"),
    "max_bucket_reso": _acts("int", 1024, "dataset"),
    "bucket_reso_steps": _acts("int", 64, "dataset"),
    "bucket_no_upscale": _acts("flag", False, "dataset"),
    "resize_interpolation": _acts("str", None, "dataset"),
    "shuffle_caption": _acts("flag", False, "dataset"),
    "caption_separator": _acts("str", ",", "dataset"),
    "caption_extension": _acts("str", ".caption", "dataset"),
    "caption_extention": _acts("str", None, "dataset.caption_extension"),
    "keep_tokens": _acts("int", 0, "dataset"),
    "keep_tokens_separator": _acts("str", "", "dataset"),
    "secondary_separator": _acts("str", None, "dataset"),
    "enable_wildcard": _acts("flag", False, "dataset"),
    "caption_prefix": _acts("str", None, "dataset"),
    "caption_suffix": _acts("str", None, "dataset"),
    "caption_dropout_rate": _acts("float", 0.0, "dataset"),
    "caption_dropout_every_n_epochs": _acts("int", 0, "dataset"),
    "caption_tag_dropout_rate": _acts("float", 0.0, "dataset"),
    "flip_aug": _acts("flag", False, "dataset"),
    "random_crop": _acts("flag", False, "dataset"),
    "face_crop_aug_range": _acts("range", None, "dataset"),
    "alpha_mask": _acts("flag", False, "dataset", "train.masked_loss", masked_loss="sum"),
    "dataset_repeats": _acts("int", 1, "dataset.num_repeats"),
    "color_aug": _refused(
        "flag", "every jittered picture would need a latent of its own; jitter the pictures on disk, or leave it out"
    ),
    "token_warmup_min": _refused("int", _WARM_UP, default=1),
    "token_warmup_step": _refused("float", _WARM_UP, default=0),
    "dataset_class": _refused("str", "sd3pipe loads no user code: write a dataset file"),
    "debug_dataset": _refused("flag", "use `sd3pipe preview`"),
    "weighted_captions": _idle("flag", "sd-scripts has none for SD3; weights in a caption are literal text"),
    "cache_info": _idle("flag", "picture sizes and hashes are remembered, and checked against the files each time"),
    "skip_cache_check": _idle("flag", "checking costs less than a second; a cache that is not checked is a stale one"),
    **{
        name: _met(_CACHED, otherwise=f"{_CACHED}: remove the key")
        for name in (
            "cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs",
            "cache_text_encoder_outputs_to_disk",
        )
    },
    "vae_batch_size": _acts("int", 1, "encode_latents"),
    "text_encoder_batch_size": _acts("int", None, "encode_text"),
    "t5xxl_max_token_length": _acts("int", 256, "encode_text"),
    "apply_lg_attn_mask": _acts("flag", False, "encode_text"),
    "apply_t5_attn_mask": _acts("flag", False, "encode_text"),
}  # fmt: skip

_NETWORK = {
    "network_module": _met(
        "sd3pipe's own adapters train the same modules",
        met=("networks.lora_sd3",),
        otherwise="only networks.lora_sd3 fits SD3; choose another kind of adapter with adapter_type",
        kind="str",
        default=None,
    ),
    "network_train_unet_only": _met(
        "the adapter is on the MMDiT alone",
        otherwise="text encoders are not trained: their outputs are cached; remove the key",
    ),
    "network_train_text_encoder_only": _refused(
        "flag", "trains text encoders alone; here the MMDiT is trained, and they are not"
    ),
    "text_encoder_lr": _refused("floats", _UNTRAINED),
    "network_dim": _acts("int", 4, "train"),
    "network_alpha": _acts("float", 1.0, "train"),
    "network_dropout": _acts("float", None, "train"),
    "network_args": _acts("words", None, "train"),
    "network_weights": _acts("str", None, "train"),
    "dim_from_weights": _acts("flag", False, "train"),
    "base_weights": _acts("words", None, "train"),
    "base_weights_multiplier": _acts("floats", None, "train"),
    "scale_weight_norms": _acts("float", None, "train", off=(0,)),
    "full_bf16": _acts("flag", False, "train"),
    "full_fp16": _refused("flag", "small updates of an fp16 adapter vanish; full_bf16 rounds them stochastically"),
}

_OPTIMISATION = {
    "learning_rate": _acts("float", 2e-6, "train"),
    "unet_lr": _acts("float", None, "train.learning_rate"),
    "optimizer_type": _acts("str", "AdamW", "train"),
    "optimizer_args": _acts("words", None, "train"),
    "use_8bit_adam": _acts("flag", False, "train.optimizer_type", optimizer_type="AdamW8bit"),
    "use_lion_optimizer": _acts("flag", False, "train.optimizer_type", optimizer_type="Lion"),
    "lr_scheduler": _acts("str", "constant", "train"),
    "lr_scheduler_args": _acts("words", None, "train"),
    "lr_scheduler_type": _refused(
        "str", "a schedule of foreign code could not be resumed exactly; choose one with lr_scheduler"
    ),
    "lr_warmup_steps": _acts("steps", 0, "train"),
    "lr_decay_steps": _acts("steps", 0, "train"),
    "lr_scheduler_num_cycles": _acts("int", 1, "train"),
    "lr_scheduler_power": _acts("float", 1.0, "train"),
    "lr_scheduler_timescale": _acts("int", None, "train"),
    "lr_scheduler_min_lr_ratio": _acts("float", None, "train"),
    "max_train_steps": _acts("int", 1600, "train"),
    "max_train_epochs": _acts("int", None, "train"),
    "train_batch_size": _acts("int", 1, "train"),
    "gradient_accumulation_steps": _acts("int", 1, "train"),
    "max_grad_norm": _acts("float", 1.0, "train"),
    "seed": _acts("int", None, "train", "encode_text", "encode_latents"),
    "fused_backward_pass": _idle("flag", "sd-scripts' network trainer ignores it; an adapter's state is small"),
}

_LOSS = {
    "weighting_scheme": _acts("str", "uniform", "train"),
    "logit_mean": _acts("float", 0.0, "train"),
    "logit_std": _acts("float", 1.0, "train"),
    "mode_scale": _acts("float", 1.29, "train"),
    "training_shift": _acts("float", 1.0, "train"),
    "min_timestep": _acts("int", None, "train"),
    "max_timestep": _acts("int", None, "train"),
    "loss_type": _acts("str", "l2", "train"),
    "huber_schedule": _acts("str", "snr", "train"),
    "huber_c": _acts("float", 0.1, "train"),
    "huber_scale": _acts("float", 1.0, "train"),
    "masked_loss": _acts("flag", False, "train.masked_loss", masked_loss="sum"),
    "prior_loss_weight": _acts("float", 1.0, "train"),
    "clip_l_dropout_rate": _acts("float", 0.0, "train"),
    "clip_g_dropout_rate": _acts("float", 0.0, "train"),
    "t5_dropout_rate": _acts("float", 0.0, "train"),
    "pos_emb_random_crop_rate": _acts("float", 0.0, "train"),
    "enable_scaled_pos_embed": _acts("flag", False, "train"),
    "noise_offset": _idle("float", _NOISE),
    "noise_offset_random_strength": _idle("flag", _NOISE),
    "multires_noise_iterations": _idle("int", _NOISE),
    "multires_noise_discount": _idle("float", _NOISE, default=0.3),
    "adaptive_noise_scale": _idle("float", _NOISE),
    "ip_noise_gamma": _idle("float", _NOISE),
    "ip_noise_gamma_random_strength": _idle("flag", _NOISE),
    "zero_terminal_snr": _idle("flag", _NOISE),
    "min_snr_gamma": _idle("float", _EPSILON),
    "debiased_estimation_loss": _idle("flag", _EPSILON),
    "v_pred_like_loss": _idle("float", _EPSILON),
    "scale_v_pred_loss_like_noise_pred": _idle("flag", _EPSILON),
}

_MEMORY = {
    "mixed_precision": _acts("str", "no", "train"),
    "gradient_checkpointing": _acts("flag", False, "train"),
    "cpu_offload_checkpointing": _acts("flag", False, "train.activation_offload", activation_offload=True),
    "blocks_to_swap": _acts("int", None, "train"),
    "fp8_base": _acts("flag", False, "train.base_dtype", base_dtype="fp8"),
    "fp8_base_unet": _acts("flag", False, "train.base_dtype", base_dtype="fp8"),
    "torch_compile": _acts("flag", False, "train"),
    "dynamo_backend": _idle("str", "inductor is used when torch_compile is on", default="inductor", off=("no",)),
    "sdpa": _met(_SDPA, otherwise=f"{_SDPA}: remove the key"),
    "xformers": _met(_SDPA, met=(True, False)),
    "mem_eff_attn": _met(_SDPA, met=(True, False)),
    "max_data_loader_n_workers": _acts("int", 8, "train", "encode_latents"),
    "persistent_data_loader_workers": _met("reader workers live as long as the run", met=(True, False)),
    "deepspeed": _idle("flag", _SHARDED),
    "zero_stage": _idle("int", _SHARDED, default=2),
    "offload_optimizer_device": _idle("str", _SHARDED),
    "offload_optimizer_nvme_path": _idle("str", _SHARDED),
    "offload_param_device": _idle("str", _SHARDED),
    "offload_param_nvme_path": _idle("str", _SHARDED),
    "zero3_init_flag": _idle("flag", _SHARDED),
    "zero3_save_16bit_model": _idle("flag", _SHARDED),
    "fp16_master_weights_and_gradients": _idle("flag", _SHARDED),
    "ddp_timeout": _idle("int", _DDP),
    "ddp_gradient_as_bucket_view": _idle("flag", _DDP),
    "ddp_static_graph": _idle("flag", _DDP),
}

_SAVING = {
    "output_dir": _acts("str", None, "project.loras_dir"),
    "output_name": _read("str", "it is the name of the run and of the export in project.toml"),
    "save_model_as": _met(
        "only safetensors is written",
        met=("safetensors",),
        otherwise="only safetensors is read and written; pickled files can run code when loaded",
        kind="str",
        default="safetensors",
    ),
    "save_precision": _acts("str", None, "train"),
    "save_every_n_steps": _acts("int", None, "train", off=(0,)),
    "save_every_n_epochs": _acts("int", None, "train", off=(0,)),
    "save_n_epoch_ratio": _read("int", "say save_every_n_epochs: all epochs divided by it"),
    "save_last_n_steps": _acts("int", None, "train"),
    "save_last_n_steps_state": _acts("int", None, "train"),
    "save_last_n_epochs": _acts("int", None, "train"),
    "save_last_n_epochs_state": _acts("int", None, "train"),
    "save_state": _met("every checkpoint can be resumed", otherwise="every checkpoint can be resumed: remove the key"),
    "save_state_on_train_end": _met("the last checkpoint can be resumed", met=(True, False)),
    "resume": _refused("str", "sd-scripts' states cannot be read; network_weights starts from a saved adapter"),
    "skip_until_initial_step": _met("resume is exact", met=(True, False)),
    "initial_epoch": _idle("int", _EXACT),
    "initial_step": _idle("int", _EXACT),
    "huggingface_repo_id": _refused("str", _UPLOAD),
    "huggingface_repo_type": _refused("str", _UPLOAD),
    "huggingface_path_in_repo": _refused("str", _UPLOAD),
    "huggingface_token": _refused("str", _UPLOAD),
    "huggingface_repo_visibility": _refused("str", _UPLOAD),
    "save_state_to_huggingface": _refused("flag", _UPLOAD),
    "resume_from_huggingface": _refused("flag", _UPLOAD),
    "async_upload": _refused("flag", _UPLOAD),
}

_RECORDS = {
    "sample_prompts": _acts("str", None, "project.sample_prompts"),
    "sample_every_n_steps": _acts("int", None, "train", off=(0,)),
    "sample_every_n_epochs": _acts("int", None, "train", off=(0,)),
    "sample_at_first": _acts("flag", False, "train"),
    "sample_sampler": _idle("str", "sd-scripts ignores it for SD3; the sampler is Euler on the flow", default="ddim"),
    "validation_split": _acts("float", 0.0, "dataset"),
    "validation_seed": _acts("int", None, "dataset", "train"),
    "validate_every_n_steps": _acts("int", None, "train", off=(0,)),
    "validate_every_n_epochs": _acts("int", None, "train", off=(0,)),
    "max_validation_steps": _acts("int", None, "train"),
    "logging_dir": _acts("str", None, "train"),
    "log_with": _acts("str", None, "train"),
    "log_tracker_name": _acts("str", None, "train"),
    "wandb_run_name": _acts("str", None, "train"),
    "log_prefix": _idle("str", "name the run with output_name or log_tracker_name"),
    "log_tracker_config": _idle("str", "set the tracker's own environment variables"),
    "wandb_api_key": _idle("str", "set WANDB_API_KEY in the environment; a key in a file gets copied along with it"),
    "log_config": _idle("flag", _REPORT),
    "output_config": _idle("flag", _REPORT),
    "console_log_level": _idle("str", "lines go to stderr: redirect it"),
    "console_log_file": _idle("str", "lines go to stderr: redirect it"),
    "console_log_simple": _idle("flag", "lines are plain when the output is no terminal"),
    "training_comment": _acts("str", None, "train"),
    "metadata_title": _acts("str", None, "train"),
    "metadata_author": _acts("str", None, "train"),
    "metadata_description": _acts("str", None, "train"),
    "metadata_license": _acts("str", None, "train"),
    "metadata_tags": _acts("str", None, "train"),
    "metadata_trigger_phrase": _acts("str", None, "train"),
    "metadata_usage_hint": _acts("str", None, "train"),
    "metadata_thumbnail": _acts("str", None, "export.thumbnail"),
    "no_metadata": _acts("flag", False, "export.metadata", metadata="none"),
    "metadata_merged_from": _idle("str", "sd3pipe adapter merge records its sources itself"),
    "metadata_preprocessor": _idle("str", "it describes control adapters"),
    "metadata_is_negative_embedding": _idle("str", "it describes embeddings, and this is an adapter"),
}


_ROWS = _MODELS | _DATA | _NETWORK | _OPTIMISATION | _LOSS | _MEMORY | _SAVING | _RECORDS
OPTIONS: Mapping[str, SdScriptsOption] = {  # a place without a key of its own has the option's name
    name: replace(row, places=tuple(replace(place, key=place.key or name) for place in row.places))
    for name, row in _ROWS.items()
}

# Keys that stand in a dataset file alone: of sd-scripts, then our own.
DATASET_KEYS = (
    "image_dir", "metadata_file", "num_repeats", "class_tokens", "is_reg", "batch_size", "network_multiplier",
    "custom_attributes", "name", "recursive", "caption_cache", "loss_weight", "alpha_background",
)  # fmt: skip
