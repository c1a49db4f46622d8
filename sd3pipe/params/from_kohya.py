"""Options of `sd3pipe from-kohya`."""

from sd3pipe.params.fields import OptionPath, Params, option


class FromKohyaParams(Params):
    source: tuple[str, ...] = option(
        ...,
        "A command of sd3_train_network.py (in quotes, or after --), a file with it (.sh, .bat, .ps1, .txt), its "
        "config .toml, or settings saved by kohya_ss' GUI (.json).",
        positional=True,
    )
    out: OptionPath = option(".", "Folder of the new project.", role="path", validate_default=True)
    tokenizers: OptionPath | None = option(None, "Folder with clip_l/, clip_g/ and t5xxl/.", role="path")
    all: bool = option(False, "Say of each option without effect why it has none.")
    modernize: bool = option(False, "Take sd3pipe's own defaults for what the command does not say.")
    dry_run: bool = option(False, "Tell what would change, and write nothing.")
