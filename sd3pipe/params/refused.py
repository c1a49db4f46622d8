"""What sd-scripts knows and sd3pipe does not take: keys whose wish is met anyway, and keys refused with the reason.

Names and meanings are sd-scripts' (revision 48d368fa). Nothing is accepted and ignored: a key either acts, or is
answered here.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What to say to a key: accepted (the wish is met) or not, and one line."""

    accepted: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MetWish:
    """A key that asks for what sd3pipe does in any case, as long as its value is one of `values`."""

    values: tuple[Any, ...]
    text: str
    otherwise: str

    def answer(self, value: Any) -> Answer:
        if value in self.values:
            return Answer(accepted=True, text=self.text)
        return Answer(accepted=False, text=self.otherwise)


_CACHED = "the encode stages always write a cache on disk"
_SDPA = "attention always runs through torch's scaled_dot_product_attention"
_ONLY_SAFETENSORS = "only safetensors is read and written; pickled files can run code when loaded"

ALREADY_SO: dict[str, MetWish] = {
    "sdpa": MetWish(values=(True,), text=_SDPA, otherwise=f"{_SDPA}: remove the key"),
    "xformers": MetWish(values=(True, False), text=_SDPA, otherwise=_SDPA),
    "mem_eff_attn": MetWish(values=(True, False), text=_SDPA, otherwise=_SDPA),
    "network_module": MetWish(
        values=("networks.lora_sd3",),
        text="sd3pipe's own adapters train the same modules",
        otherwise="only networks.lora_sd3 fits SD3; choose another adapter kind with adapter_type",
    ),
    "save_model_as": MetWish(values=("safetensors",), text=_ONLY_SAFETENSORS, otherwise=_ONLY_SAFETENSORS),
    "network_train_unet_only": MetWish(
        values=(True,),
        text="the adapter is on the MMDiT alone",
        otherwise="text encoders are not trained: their outputs are cached; remove the key",
    ),
    "network_train_text_encoder_only": MetWish(
        values=(False,),
        text="the adapter is on the MMDiT",
        otherwise="text encoders are not trained: outputs are cached",
    ),
    "no_half_vae": MetWish(
        values=(True, False), text="the VAE computes in float32", otherwise="the VAE computes in float32"
    ),
    "lowram": MetWish(
        values=(True, False), text="each component is loaded alone", otherwise="each component is loaded alone"
    ),
    "highvram": MetWish(values=(True, False), text="nothing is flushed between batches", otherwise="nothing to choose"),
    "disable_mmap_load_safetensors": MetWish(
        values=(True, False), text="weights are read without mmap", otherwise="weights are read without mmap"
    ),
    "save_state": MetWish(
        values=(True,),
        text="every checkpoint can be resumed",
        otherwise="every checkpoint can be resumed: remove the key",
    ),
    "save_state_on_train_end": MetWish(values=(True, False), text="the last checkpoint can be resumed", otherwise=""),
    "skip_until_initial_step": MetWish(values=(True, False), text="resume is exact", otherwise="resume is exact"),
    "persistent_data_loader_workers": MetWish(
        values=(True, False), text="reader workers live as long as the run", otherwise=""
    ),
    "v2": MetWish(values=(False,), text="the model is SD3", otherwise="sd3pipe trains SD3 and SD3.5 only"),
    "v_parameterization": MetWish(
        values=(False,),
        text="SD3 predicts the flow's velocity",
        otherwise="SD3 predicts the flow's velocity: see loss_form",
    ),
    **{
        key: MetWish(values=(True,), text=_CACHED, otherwise=f"{_CACHED}: remove the key")
        for key in (
            "cache_latents",
            "cache_latents_to_disk",
            "cache_text_encoder_outputs",
            "cache_text_encoder_outputs_to_disk",
        )
    },
}

_NOISE = "sd-scripts accepts it for SD3 and ignores it; flow matching has no such term"
_EPSILON = "sd-scripts accepts it for SD3 and ignores it; it is defined for noise prediction: see weighting_scheme"
_UPLOAD = "sd3pipe uploads nothing; send the exported file with the hub's own client"
_LIVE = "text encoders never run during training; change captions in the dataset file and encode again"
_DEEPSPEED = "a LoRA and its optimizer are small; stream the base with blocks_to_swap instead"
_TEXT_ENCODER_LORA = "text encoders are not trained: their outputs are cached; use a caption word as trigger instead"

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "noise_offset", "noise_offset_random_strength", "multires_noise_iterations", "multires_noise_discount",
            "adaptive_noise_scale", "ip_noise_gamma", "ip_noise_gamma_random_strength", "zero_terminal_snr",
        ),
        _NOISE,
    ),
    **dict.fromkeys(
        ("min_snr_gamma", "debiased_estimation_loss", "v_pred_like_loss", "scale_v_pred_loss_like_noise_pred"), _EPSILON
    ),
    **dict.fromkeys(
        (
            "huggingface_repo_id", "huggingface_repo_type", "huggingface_path_in_repo", "huggingface_token",
            "huggingface_repo_visibility", "save_state_to_huggingface", "resume_from_huggingface", "async_upload",
        ),
        _UPLOAD,
    ),
    **dict.fromkeys(
        (
            "deepspeed", "zero_stage", "offload_optimizer_device", "offload_optimizer_nvme_path",
            "offload_param_device", "offload_param_nvme_path", "zero3_init_flag", "zero3_save_16bit_model",
            "fp16_master_weights_and_gradients",
        ),
        _DEEPSPEED,
    ),
    **dict.fromkeys(("text_encoder_lr", "train_t5xxl"), _TEXT_ENCODER_LORA),
    **dict.fromkeys(("token_warmup_min", "token_warmup_step"), _LIVE),
    **dict.fromkeys(
        ("ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph"),
        "the adapter's gradients are reduced without DDP's wrapper, so there is nothing to set",
    ),
    "fp8_base": 'its name here is base_dtype = "fp8"',
    "full_fp16": "small updates of an fp16 adapter vanish; full_bf16 rounds them stochastically",
    "log_config": "runs/NAME/report.json records every option",
    "log_prefix": "name the run with output_name or log_tracker_name",
    "log_tracker_config": "set the tracker's own environment variables",
    "lr_scheduler_type": "a schedule of foreign code could not be resumed exactly; choose one with lr_scheduler",
    "metadata_is_negative_embedding": "it describes embeddings, and this is an adapter",
    "metadata_merged_from": "sd3pipe adapter merge records its sources itself",
    "metadata_preprocessor": "it describes control adapters",
    "metadata_thumbnail": "give the picture to export, with --thumbnail",
    "wandb_api_key": "set WANDB_API_KEY in the environment; a key in a file gets copied along with it",
    "weighted_captions": "sd-scripts has it unimplemented for SD3; weights in a caption are literal text",
    "clip_skip": "SD3 always takes the penultimate layer; sd-scripts ignores the key for SD3",
    "max_token_length": "CLIP reads 77 tokens; for T5 set t5xxl_max_token_length in stages/encode_text.toml",
    "fused_backward_pass": "sd-scripts' network trainer ignores it; an adapter's optimizer state is small",
    "cpu_offload_checkpointing": "its name here is activation_offload",
    "fp8_base_unet": "its name here is base_dtype = \"fp8\"",
    "color_aug": "every jittered picture would need a latent of its own; jitter the pictures on disk, or leave it out",
    "save_clip": "sd-scripts declares it as not working; text encoders are not changed by training",
    "save_t5xxl": "sd-scripts declares it as not working; text encoders are not changed by training",
    "t5xxl_device": "sd-scripts declares it as not working; use --device of encode-text",
    "t5xxl_dtype": "sd-scripts declares it as not working; see t5xxl_base_dtype in stages/encode_text.toml",
    "tokenizer_cache_dir": "name the folder with clip_l/, clip_g/ and t5xxl/ in tokenizers",
    "skip_cache_check": "checking costs less than a second; a cache that is not checked is a stale one",
    "cache_info": "picture sizes and hashes are remembered, and checked against the files each time",
    "dataset_class": "sd3pipe loads no user code; write a dataset file",
    "debug_dataset": "use `sd3pipe preview`",
    "train_data_dir": "write a dataset file: `sd3pipe init --images DIR` does it for a folder",
    "reg_data_dir": "write a dataset file with is_reg = true for that subset",
    "in_json": "write a dataset file with metadata_file",
    "dataset_repeats": "write num_repeats in the dataset file",
    "dynamo_backend": "inductor is used when torch_compile is on",
    "save_n_epoch_ratio": "say save_every_n_epochs",
    "initial_epoch": "resume is exact; there is nothing to skip",
    "initial_step": "resume is exact; there is nothing to skip",
    "sample_sampler": "sd-scripts ignores it for SD3; the sampler is Euler on the flow",
    "output_config": "runs/NAME/report.json records every option",
    "no_metadata": "give it to export: training always records what a file was made from",
    "use_8bit_adam": 'say optimizer_type = "AdamW8bit"',
    "use_lion_optimizer": 'say optimizer_type = "Lion"',
    "console_log_file": "redirect stderr",
    "console_log_level": "redirect stderr",
    "console_log_simple": "lines are plain when the output is no terminal",
    "caption_extention": "the word is caption_extension, in the dataset file",
}  # fmt: skip

# Keys of our own that stand in older projects.
GONE = {"imported": "rows that sd-scripts cached are not taken over any more; remove the key, and all is encoded here"}
