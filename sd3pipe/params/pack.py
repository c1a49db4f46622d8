"""Options of `sd3pipe pack`."""

from sd3pipe.params.fields import OptionPath, Params, option


class PackParams(Params):
    project: OptionPath | None = option(
        None, "Folder of the project; default: the current one or the nearest above it.", role="path"
    )
    uplink: float = option(10.0, "Megabits per second of the way out, for the minutes.", gt=0)
    with_model: bool = option(False, "List the base model's files, too; else the other machine brings its own.")
    all: bool = option(False, "List every file; else the ten largest.")
    list_only: bool = option(False, "Print names alone, for rsync --files-from.")
