"""Options of `sd3pipe cache ls | verify | why | gc | merge | export`."""

from pydantic import model_validator

from sd3pipe.params.fields import OptionPath, Params, option
from sd3pipe.words import CacheForm

_CACHE = "Folder of the cache, as caches/latents."


class CacheLsParams(Params):
    cache: OptionPath = option(..., "Folder of the cache, or a folder that holds caches.", role="path", positional=True)
    json_output: bool = option(False, "Print JSON (short: --json).", aliases=("json",))


class CacheVerifyParams(Params):
    cache: OptionPath = option(..., _CACHE, role="path", positional=True)
    repair: bool = option(False, "Move what is damaged aside, so that the next encode fills the hole.")
    threads: int | None = option(None, "How many segments are read at once; default: one per core.", ge=1)


class CacheWhyParams(Params):
    cache: OptionPath = option(..., _CACHE, role="path", positional=True)
    subject: str = option(
        ..., "Picture file or name, caption as it goes into the encoders, or the start of a key.", positional=True
    )
    json_output: bool = option(False, "Print JSON (short: --json).", aliases=("json",))


class CacheGcParams(Params):
    cache: OptionPath = option(..., _CACHE, role="path", positional=True)
    older_than: float | None = option(None, "Delete only what has been unused for more than so many days.", ge=0)
    keep_gb: float | None = option(None, "Delete the oldest until the unused rows take no more than so many GB.", ge=0)
    dry_run: bool = option(False, "Only tell what would be deleted.")


class CacheMergeParams(Params):
    caches: tuple[OptionPath, ...] = option(..., "Folders of the caches to unite.", role="path", positional=True)
    out: OptionPath = option(..., "Folder of the united cache; may be one of them.", role="path")


class CacheExportParams(Params):
    cache: OptionPath = option(..., _CACHE, role="path", positional=True)
    out: OptionPath = option(..., "Folder to write, as latents.zarr; it must not exist.", role="path")
    format: CacheForm = option(
        "zarr", "Arrays for any program, or shards of samples for WebDataset, Streaming (MDS) or LitData."
    )
    text: OptionPath | None = option(
        None, "Text cache of the same pictures, whose tensors go into the samples of latents.", role="path"
    )

    @model_validator(mode="after")
    def _options_agree(self) -> "CacheExportParams":
        if self.text is not None and self.format == "zarr":
            raise ValueError("--text joins samples: pass --format webdataset, mds or litdata, or export each as zarr")
        return self
