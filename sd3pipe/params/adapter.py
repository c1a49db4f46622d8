"""Options of `sd3pipe adapter inspect|convert|resize|merge|extract`."""

from pydantic import model_validator

from sd3pipe.params.export import DescriptionParams
from sd3pipe.params.fields import NewFilePath, OptionPath, Params, option
from sd3pipe.words import AdapterForm, StoredFormat

_FILE, _RANK = "File", "Rank"


class AdapterInspectParams(Params):
    adapter: OptionPath = option(..., "Adapter file, checkpoint or run folder.", positional=True, role="path")
    as_json: bool = option(False, "Print JSON instead of text.", aliases=("json",))
    picture: NewFilePath | None = option(None, "Draw the norms by block and part into this SVG file.", role="path")
    reproduce: bool = option(False, "Print the commands and hashes that would make the adapter again.")
    ignore_unknown: bool = option(False, "Go on where keys stand for nothing in an SD3 model, and list them.")


class WrittenParams(DescriptionParams):
    """What all commands take that write an adapter file."""

    out: NewFilePath = option(..., "File to write.", role="path", panel=_FILE)
    format: AdapterForm = option(
        "comfyui", "comfyui (native keys), comfyui-generic, or diffusers (peft keys).", panel=_FILE
    )
    dtype: StoredFormat = option(
        "auto", "Number format; auto: fp16 where each module's change keeps within 0.1 %, else fp32; same: as it is.",
        panel=_FILE,
    )  # fmt: skip
    model: str | None = option(
        None, "Base model, for a DoRA from or to ComfyUI.", role="path", panel=_FILE, advanced=True, paths_key="model"
    )


class AdapterConvertParams(WrittenParams):
    adapter: OptionPath = option(..., "Adapter of any known form, a checkpoint or a run.", positional=True, role="path")
    dtype: StoredFormat = option(
        "same", "Number format; same: as it is; auto: fp16 where it is good enough.", panel=_FILE
    )
    ignore_unknown: bool = option(False, "Leave out keys that stand for nothing in an SD3 model.", panel=_FILE)


class AdapterResizeParams(WrittenParams):
    adapter: OptionPath = option(..., "Adapter to resize.", positional=True, role="path")
    rank: int | None = option(None, "Largest rank of a module.", panel=_RANK, ge=1)
    energy: float | None = option(
        None, "Share of each module's squared norm that is kept with the least rank, such as 0.99.",
        panel=_RANK, gt=0, le=1,
    )  # fmt: skip

    @model_validator(mode="after")
    def _check_together(self) -> "AdapterResizeParams":
        if self.rank is None and self.energy is None:
            raise ValueError("resize needs rank, energy or both")
        return self


class AdapterMergeParams(WrittenParams):
    adapters: tuple[OptionPath, ...] = option(..., "Adapters to add up.", positional=True, role="path")
    weights: tuple[float, ...] = option((), "Weight of each adapter; default: 1.", panel=_FILE)
    rank: int | None = option(None, "Bring the sum, whose ranks add up, to this rank.", panel=_RANK, ge=1)


class AdapterExtractParams(WrittenParams):
    tuned: str = option(..., "Fine-tuned model.", role="path", panel=_FILE)
    base: str = option(..., "Model that it was tuned from.", role="path", panel=_FILE)
    rank: int = option(..., "Largest rank of a module.", panel=_RANK, ge=1)
    energy: float | None = option(
        None, "Share of each module's squared norm to stop at below that rank.", panel=_RANK, gt=0, le=1
    )
    embedders: bool = option(False, "Extract the layers outside the blocks, too.", panel=_FILE)
