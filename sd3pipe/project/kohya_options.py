"""The options of sd-scripts' sd3_train_network.py that carry a value over, with its defaults (revision 48d368fa)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["flag", "int", "float", "int_or_float", "str", "list"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KohyaOption:
    """Type and default of one option; None means that sd-scripts has no value unless one is given."""

    kind: Kind
    default: Any = None


def _flag() -> KohyaOption:
    return KohyaOption(kind="flag", default=False)


def _of(kind: Kind, default: Any = None) -> KohyaOption:
    return KohyaOption(kind=kind, default=default)


TRAIN_OPTIONS: Mapping[str, KohyaOption] = {
    "apply_lg_attn_mask": _flag(),
    "apply_t5_attn_mask": _flag(),
    "base_weights": _of("list"),
    "base_weights_multiplier": _of("list"),
    "blocks_to_swap": _of("int"),
    "clip_g_dropout_rate": _of("float", 0.0),
    "clip_l_dropout_rate": _of("float", 0.0),
    "dim_from_weights": _flag(),
    "enable_scaled_pos_embed": _flag(),
    "full_bf16": _flag(),
    "full_fp16": _flag(),
    "gradient_accumulation_steps": _of("int", 1),
    "gradient_checkpointing": _flag(),
    "huber_c": _of("float", 0.1),
    "huber_scale": _of("float", 1.0),
    "huber_schedule": _of("str", "snr"),
    "learning_rate": _of("float", 2e-6),
    "logit_mean": _of("float", 0.0),
    "logit_std": _of("float", 1.0),
    "loss_type": _of("str", "l2"),
    "lr_decay_steps": _of("int_or_float", 0),
    "lr_scheduler": _of("str", "constant"),
    "lr_scheduler_args": _of("list"),
    "lr_scheduler_min_lr_ratio": _of("float"),
    "lr_scheduler_num_cycles": _of("int", 1),
    "lr_scheduler_power": _of("float", 1.0),
    "lr_scheduler_timescale": _of("int"),
    "lr_scheduler_type": _of("str", ""),
    "lr_warmup_steps": _of("int_or_float", 0),
    "masked_loss": _flag(),
    "max_data_loader_n_workers": _of("int", 8),
    "max_grad_norm": _of("float", 1.0),
    "max_timestep": _of("int"),
    "max_train_epochs": _of("int"),
    "max_train_steps": _of("int", 1600),
    "max_validation_steps": _of("int"),
    "min_timestep": _of("int"),
    "mixed_precision": _of("str", "no"),
    "mode_scale": _of("float", 1.29),
    "network_alpha": _of("float", 1.0),
    "network_args": _of("list"),
    "network_dim": _of("int", 4),
    "network_dropout": _of("float"),
    "network_weights": _of("str"),
    "optimizer_args": _of("list"),
    "optimizer_type": _of("str", "AdamW"),
    "pos_emb_random_crop_rate": _of("float", 0.0),
    "prior_loss_weight": _of("float", 1.0),
    "sample_at_first": _flag(),
    "sample_every_n_epochs": _of("int"),
    "sample_every_n_steps": _of("int"),
    "save_every_n_epochs": _of("int"),
    "save_every_n_steps": _of("int"),
    "save_last_n_epochs": _of("int"),
    "save_last_n_epochs_state": _of("int"),
    "save_last_n_steps": _of("int"),
    "save_last_n_steps_state": _of("int"),
    "save_precision": _of("str"),
    "scale_weight_norms": _of("float"),
    "seed": _of("int"),
    "t5_dropout_rate": _of("float", 0.0),
    "torch_compile": _flag(),
    "train_batch_size": _of("int", 1),
    "training_shift": _of("float", 1.0),
    "unet_lr": _of("float"),
    "validate_every_n_epochs": _of("int"),
    "validate_every_n_steps": _of("int"),
    "weighting_scheme": _of("str", "uniform"),
    "logging_dir": _of("str"),
    "log_with": _of("str"),
    "log_prefix": _of("str"),
    "log_tracker_name": _of("str"),
    "log_tracker_config": _of("str"),
    "log_config": _flag(),
    "wandb_run_name": _of("str"),
    "wandb_api_key": _of("str"),
    "metadata_author": _of("str"),
    "metadata_description": _of("str"),
    "metadata_license": _of("str"),
    "metadata_merged_from": _of("str"),
    "metadata_preprocessor": _of("str"),
    "metadata_tags": _of("str"),
    "metadata_thumbnail": _of("str"),
    "metadata_title": _of("str"),
    "metadata_trigger_phrase": _of("str"),
    "metadata_usage_hint": _of("str"),
    "metadata_is_negative_embedding": _of("str"),
    "training_comment": _of("str"),
    "ddp_timeout": _of("int"),
    "ddp_gradient_as_bucket_view": _flag(),
    "ddp_static_graph": _flag(),
    "fp8_base": _flag(),
    "t5xxl_max_token_length": _of("int", 256),
    "text_encoder_batch_size": _of("int"),
    "vae_batch_size": _of("int", 1),
}

PATH_OPTIONS: Mapping[str, str] = {  # option -> key of project.toml
    "pretrained_model_name_or_path": "model",
    "clip_l": "clip_l",
    "clip_g": "clip_g",
    "t5xxl": "t5xxl",
    "vae": "vae",
    "sample_prompts": "sample_prompts",
    "output_dir": "loras_dir",
}

DATASET_OPTIONS: Mapping[str, KohyaOption] = {  # what the command line gives to the dataset file
    "resolution": _of("str"),
    "enable_bucket": _flag(),
    "min_bucket_reso": _of("int", 256),
    "max_bucket_reso": _of("int", 1024),
    "bucket_reso_steps": _of("int", 64),
    "bucket_no_upscale": _flag(),
    "resize_interpolation": _of("str"),
    "shuffle_caption": _flag(),
    "caption_separator": _of("str", ","),
    "caption_extension": _of("str", ".caption"),
    "keep_tokens": _of("int", 0),
    "keep_tokens_separator": _of("str", ""),
    "secondary_separator": _of("str"),
    "enable_wildcard": _flag(),
    "caption_prefix": _of("str"),
    "caption_suffix": _of("str"),
    "caption_dropout_rate": _of("float", 0.0),
    "caption_dropout_every_n_epochs": _of("int", 0),
    "caption_tag_dropout_rate": _of("float", 0.0),
    "flip_aug": _flag(),
    "random_crop": _flag(),
    "face_crop_aug_range": _of("str"),
    "alpha_mask": _flag(),
    "validation_seed": _of("int"),
    "validation_split": _of("float", 0.0),
}

OTHER_OPTIONS = (
    "dataset_config", "config_file", "output_name", "train_data_dir", "reg_data_dir", "resume", "conditioning_data_dir",
)  # fmt: skip
