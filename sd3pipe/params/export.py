"""Options of `sd3pipe export`, and those that all commands which write adapters share."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from sd3pipe.params.fields import NewFilePath, OptionPath, Params, group, option
from sd3pipe.params.stage import MMDIT, StageParams
from sd3pipe.rules.description import Description
from sd3pipe.words import AdapterForm, MetadataAmount, StoredFormat

_PATHS, _FILE, _WORDS = "Paths", "File", "What the file says of itself"


def _amount(value: Any) -> Any:
    """Returns what the switch means that files of projects may hold: `metadata = true` is the default."""
    return {True: None, False: "none"}[value] if isinstance(value, bool) else value


class DescriptionParams(Params):
    """Words for the metadata; what is not given stays as the source has it."""

    metadata: Annotated[MetadataAmount | None, BeforeValidator(_amount)] = option(
        None, "full: all that the file was made from; public: that without the names of files and folders and without "
        "captions; none: only what is needed to load it. Default: public for --format hub, else full.", panel=_WORDS,
    )  # fmt: skip
    description: Description = group(_WORDS)
    thumbnail: OptionPath | None = option(
        None, "Small PNG, JPEG or WebP picture that goes into the file.", role="path", panel=_WORDS, advanced=True
    )

    @model_validator(mode="after")
    def _check_words(self) -> Self:
        words = [name for name in DescriptionParams.model_fields if name != "metadata" and getattr(self, name)]
        if words and self.metadata == "none":
            raise ValueError(
                f"--metadata none leaves no place for --{words[0].replace('_', '-')}: leave one of them out"
            )
        return self


class _ExportOptions(Params):
    # fmt: off
    adapter: OptionPath = option(
        ..., "Run folder, checkpoint or adapter file.", role="path", panel=_PATHS, paths_key="run"
    )
    out: NewFilePath = option(
        ..., "File to write; a folder with --checkpoints, for --format hub, and for a base in a folder.",
        role="path", panel=_PATHS, paths_key="export", varies_with="format",
    )
    model: str | None = option(
        None, "Base model on the disk: for --format checkpoint, and for a DoRA to ComfyUI.",
        role="path", panel=_PATHS, aliases=("pretrained_model_name_or_path",), paths_key="model",
    )
    mmdit: OptionPath | None = MMDIT
    format: Literal[AdapterForm, "hub", "checkpoint"] = option(
        "comfyui", "comfyui: native keys, which sd-scripts reads too; comfyui-generic; diffusers: peft keys; hub: a "
        "folder for a model hub, with a model card and the run's samples; checkpoint: the base model with the adapter "
        "in it.", role="recipe", panel=_FILE,
    )
    dtype: StoredFormat = option(
        "auto", "Number format; auto: fp16 where each module's change keeps within 0.1 %, else fp32; same: as it is. "
        "A checkpoint keeps the base's.", role="recipe", panel=_FILE,
    )
    multiplier: float = option(
        1.0, "Strength that is written into the file: loaded at 1 it acts as the adapter does at this. Not for a DoRA, "
        "but with --format checkpoint.", role="recipe", panel=_FILE, aliases=("strength",), advanced=True,
    )
    checkpoints: Literal["all", "best"] | None = option(
        None, "all: export every checkpoint of the run into the folder --out, under names that sort; best: the one "
        "that `sd3pipe judge` suggests.", role="recipe", panel=_FILE,
    )
    # fmt: on


class ExportParams(StageParams, DescriptionParams, _ExportOptions):
    """Options of `sd3pipe export`."""
