"""The settings that kohya_ss' GUI saves as JSON, as options of sd3_train_network.py (its revision 45088f04)."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from sd3pipe.errors import ParameterError
from sd3pipe.params.sd_scripts import OPTIONS

log = logging.getLogger(__name__)

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
_NOT_HANDED_ON = (  # for SD3: Flux's fields
    "clip_l", "t5xxl", "t5xxl_max_token_length", "apply_t5_attn_mask", "cpu_offload_checkpointing", "fp8_base_unet",
)  # fmt: skip
_OTHER_FAMILIES = {"sdxl": "SDXL", "flux1_checkbox": "Flux", "v2": "Stable Diffusion 2", "lumina_checkbox": "Lumina"}
_ZERO_COUNTS = ("max_data_loader_n_workers",)  # of others the GUI takes a zero for an empty field
_ZERO_WAS_MEANT = ("max_grad_norm", "network_alpha", "prior_loss_weight")  # by whoever set it
_WORDS = ("optimizer_args", "lr_scheduler_args")  # without the quotes that they may have
_IN_NETWORK_ARGS = (
    "loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio", "rank_dropout", "module_dropout",
)  # fmt: skip
_OF_LORA = (
    "down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold", "block_dims", "block_alphas",
    "conv_block_dims", "conv_block_alphas",
)  # fmt: skip
_OF_LYCORIS = ("conv_dim", "conv_alpha", "rank_dropout_scale", "train_norm", "use_tucker")  # of its kinds but iA3
_OF_LYCORIS_KINDS = {
    "locon": ("bypass_mode", "dora_wd", "use_scalar"),
    "loha": ("bypass_mode", "dora_wd", "use_scalar"),
    "lokr": ("bypass_mode", "dora_wd", "use_scalar", "factor", "use_cp", "decompose_both"),
    "diag-oft": ("constrain", "rescaled"),
}
_LYCORIS_NAMES = {"LyCORIS_preset": "preset", "constrain": "constraint"}  # the GUI's name -> LyCORIS'


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
    for key in _ZERO_WAS_MEANT:
        if settings.get(key) == 0 and settings[key] is not False:
            log.warning("%s = 0: the GUI hands no zero on, so it is %g, as in sd-scripts", key, OPTIONS[key].default)
    given |= {key: str(given[key]).replace('"', "") for key in _WORDS if isinstance(given.get(key), str)}
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
    words = str(settings.get("network_args") or "").replace('"', "").split()
    kind = re.split("[/ ]", str(settings.get("LoRA_type") or "Standard"))[-1].lower()  # of "LyCORIS/LoHa"
    given: dict[str, Any] = {"network_module": "networks.lora_sd3"}
    fields = (*_IN_NETWORK_ARGS, *_OF_LORA)
    if kind != "standard":
        given["network_module"] = "lycoris.kohya"
        words.append(f"algo={kind}")
        fields = (*_IN_NETWORK_ARGS, *_OF_LYCORIS, *_OF_LYCORIS_KINDS.get(kind, ()))
        fields = fields if settings.get("LyCORIS_preset", "full") == "full" else (*fields, "LyCORIS_preset")
    for key in fields:
        if _says_something(key, settings.get(key)):
            words.append(f"{_LYCORIS_NAMES.get(key, key)}={settings[key]}")
    if words:
        given["network_args"] = words
    of_text, of_mmdit = (_says_something(key, settings.get(key)) for key in ("text_encoder_lr", "unet_lr"))
    if of_text != of_mmdit:
        given[f"network_train_{'text_encoder' if of_text else 'unet'}_only"] = True
    return given


def _steps(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of steps, which win over the ones of epochs and percent as in the GUI.

    From `epoch` the GUI counts steps, in folders of pictures alone.
    """
    given: dict[str, Any] = {}
    if _says_something("max_train_epochs", settings.get("max_train_epochs")):
        given["max_train_epochs"] = settings["max_train_epochs"]
    elif _says_something("max_train_steps", settings.get("max_train_steps")):
        given["max_train_epochs"] = None
    elif settings.get("dataset_config") and settings.get("epoch"):
        given["max_train_epochs"] = None
        steps = OPTIONS["max_train_steps"].default
        log.warning("epoch: counts where train_data_dir says the pictures; with dataset_config it is %d steps", steps)
    if not _says_something("lr_warmup_steps", settings.get("lr_warmup_steps")) and settings.get("lr_warmup"):
        given["lr_warmup_steps"] = f"{settings['lr_warmup']}%"
    if settings.get("lr_scheduler_num_cycles") == "" and settings.get("epoch"):
        given["lr_scheduler_num_cycles"] = settings["epoch"]
    return given
