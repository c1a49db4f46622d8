"""Options of `sd3pipe check-captions`."""

from pydantic import field_validator

from sd3pipe.params import stage
from sd3pipe.params.fields import NewFilePath, OptionPath, option
from sd3pipe.words import WantedPrecision

_PATHS, _ASKED, _RUN = "Paths", "What is asked", "This run"


class CheckCaptionsParams(stage.ModelParams):
    # fmt: off
    text: OptionPath = option(
        ..., "Cache of encoded captions.", role="path", panel=_PATHS, paths_key="caches/text"
    )
    latents: OptionPath = option(
        ..., "Cache of latents.", role="path", panel=_PATHS, paths_key="caches/latents"
    )
    adapter: OptionPath | None = option(
        None, "Run or adapter: tells as well what it has learnt of each picture.", role="path", panel=_PATHS
    )
    out: NewFilePath = option(..., "JSON file to write.", role="path", panel=_PATHS, paths_key="caption_check")

    checkpoints: str | None = option(
        None, "Checkpoints of the run: all, every:N (each N-th), or steps such as 250,500; default: the finished one.",
        panel=_ASKED, pattern=stage.CHECKPOINTS,
    )
    sigmas: str = option(
        "0.3,0.5,0.7,0.9", "Noise levels between 0 and 1.", panel=_ASKED, pattern=r"^0?\.\d+(,0?\.\d+)*$"
    )
    draws: int = option(4, "Draws of noise at each level.", panel=_ASKED, ge=2, le=1000)
    other_captions: int = option(
        8, "Captions of other pictures that each picture's own is compared with.", panel=_ASKED, ge=2, le=1000
    )
    mixed_precision: WantedPrecision = stage.mixed_precision(_RUN)
    caption_batch_size: int = option(5, "Captions that go through the model at once.", panel=_RUN, ge=1, le=256)
    blocks_to_swap: stage.BlocksToSwap = stage.blocks_to_swap(_RUN)
    shard: stage.Shard | None = stage.SHARD
    # fmt: on

    _no_value_twice = field_validator("sigmas")(stage.no_value_twice)

    def noise_levels(self) -> tuple[float, ...]:
        return tuple(float(number) for number in self.sigmas.split(","))
