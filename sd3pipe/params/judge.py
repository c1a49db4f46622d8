"""Options of `sd3pipe judge`."""

from pydantic import field_validator

from sd3pipe.params import stage
from sd3pipe.params.fields import OptionPath, option
from sd3pipe.words import ToldVariant, WantedPrecision

_PATHS, _COMPARED, _DRAWING = "Paths", "What is compared", "Drawing"


class JudgeParams(stage.ModelParams):
    # fmt: off
    vae: OptionPath | None = option(
        None, "VAE in a file of its own; beats the one in --model.", role="path", panel=_PATHS, paths_key="vae"
    )
    adapter: OptionPath = option(
        ..., "Run whose checkpoints are judged, or a single adapter.", role="path", panel=_PATHS, paths_key="run"
    )
    prompts: OptionPath = option(
        ..., "Cache of encoded sample prompts.", role="path", panel=_PATHS, paths_key="caches/prompts"
    )
    latents: OptionPath = option(
        ..., "Cache of latents: the training pictures that drawn ones are compared with.",
        role="path", panel=_PATHS, paths_key="caches/latents",
    )
    judge_model: str = option(
        ..., "Model that looks at pictures: folder or hub id of a CLIP, SigLIP or DINO as transformers loads it.",
        role="path", panel=_PATHS, paths_key="judge_model",
    )
    dataset: OptionPath | None = option(
        None, "Dataset file, in whose captions --trigger auto looks.", role="path", panel=_PATHS, paths_key="dataset"
    )
    out: OptionPath = option(
        ..., "Folder for judge.json, the page and small pictures.", role="path", panel=_PATHS, paths_key="judge"
    )

    checkpoints: str | None = option(
        None, "Checkpoints of the run: all, every:N (each N-th), or steps such as 250,500; default: all that it has.",
        panel=_COMPARED, pattern=stage.CHECKPOINTS,
    )
    multiplier: str = option(
        "1", "Strengths of the adapter, such as 0.6,0.8,1.0.",
        panel=_COMPARED, aliases=("strength",), pattern=stage.NUMBERS,
    )
    trigger: str = option(
        "auto", "Words that prompts bear which ask for what is learnt; auto: found in the dataset's captions.",
        panel=_COMPARED, min_length=1,
    )
    seeds: str = option("1,2,3,4", "Seeds, a picture of each prompt for each.", panel=_COMPARED, pattern=stage.INTEGERS)
    tolerance: float = option(
        0.5, "Share of the base's prompt fidelity, other subjects and variety that a suggested checkpoint may lose.",
        panel=_COMPARED, ge=0, le=1,
    )
    goal: stage.AnyGoal = option(
        "object", "What is learnt; of a style, likeness is measured but nothing is suggested: few models see styles.",
        panel=_COMPARED,
    )
    judge_sees_style: bool = option(
        False, "The judge model was made to see styles, so suggest for a style, too.", panel=_COMPARED, advanced=True
    )
    variant: ToldVariant | None = stage.TOLD_VARIANT
    mixed_precision: WantedPrecision = stage.mixed_precision(_DRAWING)
    blocks_to_swap: stage.BlocksToSwap = stage.blocks_to_swap(_DRAWING)
    # fmt: on

    _no_value_twice = field_validator("multiplier", "seeds")(stage.no_value_twice)

    @field_validator("multiplier")
    @classmethod
    def _not_the_base(cls, value: str) -> str:
        if 0.0 in map(float, value.split(",")):
            raise ValueError("0 is the base alone, which all are compared with: leave it out")
        return value

    def multipliers(self) -> tuple[float, ...]:
        return tuple(float(number) for number in self.multiplier.split(","))

    def seed_numbers(self) -> tuple[int, ...]:
        return tuple(int(number) for number in self.seeds.split(","))
