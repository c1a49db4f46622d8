"""Options of `sd3pipe from-kohya`."""

from sd3pipe.params.fields import OptionPath, Params, option


class FromKohyaParams(Params):
    source: tuple[str, ...] = option(
        ..., "A command of sd3_train_network.py (in quotes, or after --), or its config .toml.", positional=True
    )
    out: OptionPath = option(".", "Folder of the new project.", role="path", validate_default=True)
    modernize: bool = option(False, "Take sd3pipe's own defaults for what the command does not say.")
    dry_run: bool = option(False, "Tell what would change, and write nothing.")
