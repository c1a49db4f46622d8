"""Options of `sd3pipe encode-text`."""

from pydantic import model_validator

from sd3pipe.params.fields import OptionPath, option
from sd3pipe.params.stage import ENGINE, RAY_WORKERS, SHARD, Shard, StageParams, check_engine
from sd3pipe.words import AutoOnOff, Engine, Format, PackedFormat, Padding, RowFormat

_PATHS, _TEXT, _RUN = "Paths", "Text", "This run"


class EncodeTextParams(StageParams):
    # fmt: off
    model: str | None = option(
        None, "Checkpoint file, diffusers folder or hub id with the text encoders that are not given apart.",
        role="path", panel=_PATHS, aliases=("pretrained_model_name_or_path",), paths_key="model",
    )
    clip_l: OptionPath | None = option(
        None, "CLIP-L file; beats the one in the model.", role="path", panel=_PATHS, paths_key="clip_l"
    )
    clip_g: OptionPath | None = option(
        None, "CLIP-G file; beats the one in the model.", role="path", panel=_PATHS, paths_key="clip_g"
    )
    t5xxl: OptionPath | None = option(
        None, "T5-XXL file (fp16, bf16, fp8 or scaled fp8); beats the one in the model.",
        role="path", panel=_PATHS, paths_key="t5xxl",
    )
    tokenizers: OptionPath | None = option(
        None, "Folder with clip_l/, clip_g/ and t5xxl/; else SD3PIPE_TOKENIZERS, beside the model, the hub's cache.",
        role="path", panel=_PATHS, paths_key="tokenizers",
    )
    dataset: OptionPath | None = option(
        None, "Dataset file (TOML or JSON) whose captions are encoded; in a project the default is its own.",
        role="path", panel=_PATHS, aliases=("dataset_config",),
    )
    sample_prompts: OptionPath | None = option(
        None, "File of sample prompts (text, TOML or JSON) that are encoded instead.", role="path", panel=_PATHS
    )
    out: OptionPath | None = option(
        None, "Folder of the cache that is filled; in a project the default is its caches/text or caches/prompts.",
        role="path", panel=_PATHS,
    )

    t5xxl_max_token_length: int = option(
        256, "T5 tokens that a caption is cut to.", role="recipe", panel=_TEXT, ge=1, le=512
    )
    t5_pad_to: int | None = option(
        None, "T5 tokens that a shorter caption is padded to; 77 is ComfyUI's rule. "
        "Default: t5xxl_max_token_length.", role="recipe", panel=_TEXT, ge=1, le=512,
    )
    padding: Padding = option(
        "keep", "States at padding positions: as they come, as every inference program has them, or zeros.",
        role="recipe", panel=_TEXT,
    )
    apply_lg_attn_mask: bool = option(
        False, "CLIP-L and CLIP-G do not attend to padding.", role="recipe", panel=_TEXT, advanced=True
    )
    apply_t5_attn_mask: bool = option(
        False, "T5 does not attend to padding.", role="recipe", panel=_TEXT, advanced=True
    )
    text_dtype: Format = option(
        "bfloat16", "Number format of encoding and of the rows; for float16, T5 computes in float32, as it overflows.",
        role="recipe", panel=_TEXT,
    )
    t5xxl_base_dtype: PackedFormat | None = option(
        None, "Pack T5's matrices while encoding: int8 halves its memory, nf4 quarters it. Streaming needs less still.",
        role="recipe", panel=_TEXT, advanced=True,
    )
    t5xxl_row_dtype: RowFormat | None = option(
        None, "Keep T5's states as int8 with a scale for each 64 numbers: half of their disk, an error of 0.6 %. "
        "Default: as text_dtype says.", role="recipe", panel=_TEXT,
    )
    caption_variants: int = option(
        8, "Captions per picture where something about them is random (shuffled or dropped tags, wildcards).",
        role="recipe", panel=_TEXT, ge=1, le=1000,
    )
    seed: int = option(42, "Seed of random captions.", role="recipe", panel=_TEXT, ge=0)

    text_encoder_batch_size: int = option(8, "Captions that go through an encoder at once.", panel=_RUN, ge=1)
    t5xxl_streaming: AutoOnOff = option(
        "auto", "Read T5 block by block while encoding: the device then holds two blocks (0.8 GB) instead of 9.5 GB.",
        panel=_RUN,
    )
    dry_run: bool = option(False, "Only tell what would be encoded and how big it is.", panel=_RUN)
    shard: Shard | None = SHARD
    engine: Engine = ENGINE
    ray_workers: int | None = RAY_WORKERS
    rehash: bool = option(
        False, "Read every picture anew instead of trusting times and sizes.", panel=_RUN, advanced=True
    )
    verify_weights: bool = option(
        False, "Read every weight file and tokenizer anew instead of trusting times and sizes.",
        panel=_RUN, advanced=True,
    )
    # fmt: on

    @model_validator(mode="after")
    def _options_agree(self) -> "EncodeTextParams":
        if self.dataset is not None and self.sample_prompts is not None:
            raise ValueError("--dataset and --sample-prompts fill two caches: run the command once for each")
        check_engine(self.engine, self.shard, self.ray_workers)
        if self.t5_pad_to is not None and self.t5_pad_to > self.t5xxl_max_token_length:
            raise ValueError(
                f"--t5-pad-to {self.t5_pad_to} is more than --t5xxl-max-token-length {self.t5xxl_max_token_length}: "
                "lower the first or raise the second"
            )
        return self
