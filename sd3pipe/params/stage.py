"""Options that every stage has, and those of stages that run a model."""

from sd3pipe.params.fields import OptionPath, Params, option


class StageParams(Params):
    device: str = option("auto", "Device to compute on: auto, cpu, cuda, cuda:N.", panel="Machine")
    threads: int | None = option(None, "CPU threads to compute with; default: all cores.", panel="Machine", ge=1)


class ModelParams(StageParams):
    # fmt: off
    model: str = option(
        ..., "Base model: a .safetensors file, a diffusers folder or a hub id.",
        role="path", panel="Paths", paths_key="model", aliases=("pretrained_model_name_or_path",),
    )
    mmdit: OptionPath | None = option(
        None, "MMDiT in a file of its own; beats the one in --model.", role="path", panel="Paths", advanced=True
    )
    # fmt: on
