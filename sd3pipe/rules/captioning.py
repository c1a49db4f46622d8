"""How a picture is captioned by a model, and what becomes of the model's words."""

from dataclasses import dataclass

from sd3pipe.errors import ParameterError
from sd3pipe.rules.declaring import rule
from sd3pipe.words import CaptionerFormat

# fmt: off


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRules:
    """What changes a model's words, and so enters the keys of its rows."""

    captioner_dtype: CaptionerFormat = rule(
        "bfloat16", "Number format that the captioner computes in; int8 and nf4 pack its matrices.", role="recipe"
    )
    captioner_px: int = rule(
        1024, "Longest side of what the captioner sees: larger pictures are made smaller first.",
        role="recipe", ge=32, le=8192,
    )
    max_new_tokens: int = rule(
        200, "Most tokens that an image-text model writes.", role="recipe", ge=1, le=4096
    )
    num_beams: int = rule(1, "Beams of the search for words; 1 is greedy.", role="recipe", advanced=True, ge=1, le=32)
    general_threshold: float = rule(
        0.35, "Least probability of a tag.", role="recipe", advanced=True, gt=0, le=1
    )
    character_threshold: float = rule(
        0.85, "Least probability of a character's name among the tags.", role="recipe", advanced=True, gt=0, le=1
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WordingRules:
    """What is done to a model's words before they are a caption: no row changes with it."""

    drop: tuple[str, ...] = rule((), "Words, phrases or tags to leave out; may be repeated.")
    replace: tuple[str, ...] = rule((), "OLD=NEW: words to replace; may be repeated.")
    keep_underscores: bool = rule(False, "Leave underscores in tags instead of writing blanks.", advanced=True)
    trigger: str | None = rule(
        None, "Word that calls what is trained: in the place of --class-word, else in front.", min_length=1
    )
    class_word: str | None = rule(None, "Word that the trigger takes the place of, such as 'man'.", min_length=1)
    prefix: str = rule("", "Text in front of every caption.")
    suffix: str = rule("", "Text behind every caption.")
    most_t5_tokens: int | None = rule(
        None, "Cut captions at the end of a sentence or tag to so many of T5's tokens.", advanced=True, ge=8, le=512
    )

    def __post_init__(self) -> None:
        for pair in self.replace:
            if not pair.partition("=")[0].strip() or "=" not in pair:
                raise ParameterError(f"replace = {pair!r}: write OLD=NEW, such as 'the image shows=' or cat=tabby")
        if self.class_word is not None and self.trigger is None:
            raise ParameterError("class_word needs the trigger that takes its place")
