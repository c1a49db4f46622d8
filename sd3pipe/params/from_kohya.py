"""Options of `sd3pipe from-kohya`."""

from pydantic import model_validator

from sd3pipe.params.fields import OptionPath, Params, option


class FromKohyaParams(Params):
    source: tuple[str, ...] = option(
        ..., "A command of sd3_train_network.py (in quotes, or after --), or its config .toml.", positional=True
    )
    out: OptionPath = option(".", "Folder of the new project.", role="path", validate_default=True)
    modernize: bool = option(False, "Take sd3pipe's own defaults for what the command does not say.")
    import_cache: bool = option(
        False, "Take over the latents and text encoder outputs that sd-scripts cached, where they are proved to belong."
    )
    verify_rows: int = option(
        8, "Cached rows of each kind that are encoded again and compared; as many as there are checks each.", ge=1
    )
    dry_run: bool = option(False, "Tell what would change, and write nothing.")

    @model_validator(mode="after")
    def _options_agree(self) -> "FromKohyaParams":
        if self.dry_run and self.import_cache:
            raise ValueError("--import-cache reads the dataset file that --dry-run does not write: pass one of them")
        return self
