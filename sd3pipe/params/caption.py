"""Options of `sd3pipe caption`."""

from pydantic import model_validator

from sd3pipe.params.fields import OptionPath, group, option
from sd3pipe.params.stage import ENGINE, RAY_WORKERS, SHARD, Shard, StageParams, check_engine
from sd3pipe.rules.captioning import GenerationRules, WordingRules
from sd3pipe.words import AutoCaptionerKind, Engine, WrittenCaptions

_PATHS, _MODEL, _WORDING, _FILES, _RUN = "Paths", "Captioner", "Wording", "Caption files", "This run"


class CaptionParams(StageParams):
    # fmt: off
    images: str | None = option(
        None, "Folder of pictures, with the folders in it, or what else an image_dir may name; instead of --dataset.",
        role="path", panel=_PATHS,
    )
    dataset: OptionPath | None = option(
        None, "Dataset file (TOML or JSON) whose pictures are captioned; in a project the default is its own.",
        role="path", panel=_PATHS, aliases=("dataset_config",),
    )
    captioner: str | None = option(
        None, "Image-text model in transformers' layout or tagger in WD14's: a folder or a hub id.",
        role="path", panel=_PATHS, paths_key="captioner",
    )
    tokenizers: OptionPath | None = option(
        None, "Folder with t5xxl/, to count tokens with; only --most-t5-tokens needs it.",
        role="path", panel=_PATHS, paths_key="tokenizers", advanced=True,
    )
    out: OptionPath = option(
        ..., "Folder of the cache of the model's words.", role="path", panel=_PATHS, paths_key="caches/captions"
    )
    kind: AutoCaptionerKind = option(
        "auto", "What the captioner is: vlm (an image-text model) or tagger; auto tells by its files.", panel=_MODEL
    )
    prompt: str | None = option(
        None, "What an image-text model is asked; default: what suits its kind.", role="recipe", panel=_MODEL
    )
    generation: GenerationRules = group(_MODEL)
    trust_remote_code: bool = option(
        False, "Run code that the captioner's folder brings.", panel=_MODEL, advanced=True, trust="typed"
    )
    captioner_batch_size: int = option(4, "Pictures that go through the captioner at once.", panel=_MODEL, ge=1)
    wording: WordingRules = group(_WORDING)
    write: WrittenCaptions = option(
        "own", "Which caption files are written: missing ones and our own untouched (own), missing ones only, all "
        "(a person's, too; needs --yes), or none.", panel=_FILES,
    )
    lines_of: tuple[OptionPath, ...] = option(
        (), "Caches of other captioners, whose captions become further lines, each a variant with enable_wildcard.",
        role="path", panel=_FILES,
    )
    yes: bool = option(False, "Write over captions that a person wrote, with --write all.", panel=_FILES, trust="typed")
    undo: bool = option(
        False, "Take back what was written and nobody touched since; what stood there before comes back.",
        panel=_FILES, trust="typed",
    )
    dry_run: bool = option(
        False, "Write nothing: tell what would be captioned, and show five pictures' words rule by rule.", panel=_RUN
    )
    shard: Shard | None = SHARD
    engine: Engine = ENGINE
    ray_workers: int | None = RAY_WORKERS
    rehash: bool = option(
        False, "Read every picture and model file anew instead of trusting times and sizes.",
        panel=_RUN, advanced=True, aliases=("verify_weights",),
    )
    # fmt: on

    @model_validator(mode="after")
    def _options_agree(self) -> "CaptionParams":
        check_engine(self.engine, self.shard, self.ray_workers)
        if self.images is not None and self.dataset is not None:
            raise ValueError("--images and --dataset name two sets of pictures: pass one")
        self.rules(WordingRules)
        return self
