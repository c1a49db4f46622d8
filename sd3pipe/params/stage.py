"""Options that every stage has."""

from sd3pipe.params.fields import Params, option


class StageParams(Params):
    device: str = option("auto", "Device to compute on: auto, cpu, cuda, cuda:N.", panel="Machine")
    threads: int | None = option(None, "CPU threads to compute with; default: all cores.", panel="Machine", ge=1)
