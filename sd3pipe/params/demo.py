"""Options of `sd3pipe demo`."""

from sd3pipe.params.fields import OptionPath, Params, option


class DemoParams(Params):
    folder: OptionPath = option(
        "sd3pipe-demo", "Folder of the demo's project.", positional=True, role="path", validate_default=True
    )
    steps: int = option(900, "Training steps.", ge=1)
    seeds: int = option(2, "Pictures per prompt, before and after.", ge=1, le=64)
