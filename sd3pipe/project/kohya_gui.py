"""The settings that kohya_ss' GUI saves as JSON, as options of sd3_train_network.py (its revision 45088f04)."""

import re
from collections.abc import Mapping
from typing import Any

from sd3pipe.errors import ParameterError
from sd3pipe.params.sd_scripts import OPTIONS

_NAMES = {  # the GUI's name -> the script's
    "max_resolution": "resolution",
    "optimizer": "optimizer_type",
    "epoch": "max_train_epochs",
    "sd3_clip_l": "clip_l",
    "sd3_t5xxl": "t5xxl",
    "sd3_clip_l_dropout_rate": "clip_l_dropout_rate",
    "sd3_t5_dropout_rate": "t5_dropout_rate",
    "sd3_enable_scaled_pos_embed": "enable_scaled_pos_embed",
    "sd3_text_encoder_batch_size": "text_encoder_batch_size",
    "sd3_fused_backward_pass": "fused_backward_pass",
    "sd3_disable_mmap_load_safetensors": "disable_mmap_load_safetensors",
    "sd3_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "sd3_cache_text_encoder_outputs_to_disk": "cache_text_encoder_outputs_to_disk",
}
_NOT_HANDED_ON = ("t5xxl_max_token_length", "apply_t5_attn_mask", "cpu_offload_checkpointing")  # for SD3
_OTHER_FAMILIES = {"sdxl": "SDXL", "flux1_checkbox": "Flux", "v2": "Stable Diffusion 2", "lumina_checkbox": "Lumina"}
_ZERO_COUNTS = (  # where 0 is a value, not an empty field
    "network_alpha", "logit_mean", "keep_tokens", "max_data_loader_n_workers", "max_grad_norm", "blocks_to_swap",
    "prior_loss_weight",
)  # fmt: skip
_IN_NETWORK_ARGS = (
    "loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio", "rank_dropout", "module_dropout",
)  # fmt: skip


def from_gui(settings: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """Returns the script's options, and the words that the GUI adds to its command as they are.

    Empty fields say nothing, and neither do zeros where the GUI means an empty field. Raises ParameterError for
    settings of another model, or of its training whole.
    """
    if not settings.get("sd3_checkbox"):
        family = next((name for key, name in _OTHER_FAMILIES.items() if settings.get(key)), "another model")
        raise ParameterError(
            f"{where}: these are settings for {family}: only SD3 (sd3_checkbox = true) can be translated"
        )
    if "learning_rate_te" in settings and "LoRA_type" not in settings:  # of the tabs Dreambooth and Finetuning
        raise ParameterError(f"{where}: these are settings to train a whole model: only LoRA can be translated")
    given = {
        _NAMES.get(key, key): value
        for key, value in settings.items()
        if (_NAMES.get(key, key) in OPTIONS and key not in _NOT_HANDED_ON) and _says_something(key, value)
    }
    attention = settings.get("xformers")  # the GUI's field for what the flags of these names ask
    if attention in ("sdpa", "xformers"):
        given |= {"xformers": False, attention: True}
    given |= _network(settings) | _steps(settings)
    if not given.get("wandb_run_name") and given.get("log_with") in ("wandb", "all") and "output_name" in given:
        given["wandb_run_name"] = given["output_name"]
    return given, str(settings.get("additional_parameters") or "")


def _says_something(key: str, value: Any) -> bool:
    if value is False or value in (None, "", []):
        return False
    return value not in (0, "0") or key in _ZERO_COUNTS


def _network(settings: Mapping[str, Any]) -> dict[str, Any]:
    words = str(settings.get("network_args") or "").split()
    words += [f"{key}={settings[key]}" for key in _IN_NETWORK_ARGS if _says_something(key, settings.get(key))]
    kind = re.split("[/ ]", str(settings.get("LoRA_type") or "Standard"))[-1].lower()  # of "LyCORIS/LoHa"
    given: dict[str, Any] = {"network_module": "networks.lora_sd3"}
    if kind != "standard":
        given["network_module"] = "lycoris.kohya"
        words.append(f"algo={kind}")
        words += [f"factor={settings['factor']}"] if kind == "lokr" and settings.get("factor") else []
    if words:
        given["network_args"] = words
    if _says_something("unet_lr", settings.get("unet_lr")) and not settings.get("text_encoder_lr"):
        given["network_train_unet_only"] = True
    return given


def _steps(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of steps, which win over the ones of epochs and percent as in the GUI."""
    given: dict[str, Any] = {}
    if _says_something("max_train_epochs", settings.get("max_train_epochs")):
        given["max_train_epochs"] = settings["max_train_epochs"]
    elif _says_something("max_train_steps", settings.get("max_train_steps")):
        given["max_train_epochs"] = None
    if not _says_something("lr_warmup_steps", settings.get("lr_warmup_steps")) and settings.get("lr_warmup"):
        given["lr_warmup_steps"] = f"{settings['lr_warmup']}%"
    if settings.get("lr_scheduler_num_cycles") == "" and settings.get("epoch"):
        given["lr_scheduler_num_cycles"] = settings["epoch"]
    return given
