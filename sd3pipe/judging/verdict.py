"""From embeddings to judge.json: the scores, what is suggested, and what is to be known about both."""

# C columns, P prompts, S seeds, D embedding width, N training pictures, M held-out ones

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sd3pipe.console import count
from sd3pipe.diffusion.drawing import Cell
from sd3pipe.judgement import Drawn, Judgement, Suggestion
from sd3pipe.judging.pictures import JudgeStore
from sd3pipe.judging.references import MOST, Reference
from sd3pipe.judging.scores import Embedded, as_scores, losses, measure
from sd3pipe.judging.suggestion import Candidate, suggest
from sd3pipe.judging.trigger import bears, without

_FEW_NEUTRAL = 4
_STYLE = (
    "The project is about a style, and models such as CLIP and DINO see what is shown, hardly how: likeness is no "
    "evidence here. Judge with a model that was made for styles and say --judge-sees-style, or look at the pictures."
)
_NOT_ASKED = "No prompt bears the trigger, so nothing tells how alike the pictures are: see --trigger."
_NOT_SEEN = (
    "The judge model does not tell the training pictures from what the base draws of these prompts, so it cannot say "
    "which checkpoint has come nearer to them: try another one with --judge-model."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared: pictures [column][prompt][seed], the base's first."""

    cells: Sequence[Sequence[Sequence[Cell]]]
    candidates: Sequence[Candidate]
    references: Sequence[Reference]
    trigger: str
    reads_text: bool
    is_style: bool
    tolerance: float
    judge_model: str

    @property
    def prompts(self) -> list[str]:
        return [row[0].prompt.prompt for row in self.cells[0]]

    @property
    def texts(self) -> list[str]:
        """The prompts as the judge model reads them: without the trigger, which it does not know."""
        return [without(prompt, self.trigger) for prompt in self.prompts] if self.reads_text else []

    def shown(self) -> list[Cell]:
        """Returns the pictures of the first seed, of which the page shows thumbnails."""
        return [row[0] for column in self.cells for row in column]


def judgement(comparison: Comparison, seen: JudgeStore) -> Judgement:
    """Returns what the embeddings, all of which are there, say."""
    embedded = _embedded(comparison, seen)
    measured = measure(embedded)
    lost = losses(measured, comparison.tolerance)
    if measured.likeness is None:
        suggestion = _nothing(_NOT_SEEN if embedded.with_trigger_P.any() else _NOT_ASKED)
    elif comparison.is_style:
        suggestion = replace(suggest(comparison.candidates, measured.likeness, lost), **_UNSAID)
    else:
        suggestion = suggest(comparison.candidates, measured.likeness, lost)
    return Judgement(
        judge_model=comparison.judge_model,
        trigger=comparison.trigger,
        tolerance=comparison.tolerance,
        limits={name: loss.limit for name, loss in lost.items()},
        draws=len(comparison.prompts) * len(comparison.cells[0][0]),
        scores=as_scores(comparison.candidates, measured, comparison.tolerance),
        suggestion=suggestion,
        remarks=tuple(_remarks(comparison, embedded)),
        drawn=tuple(
            Drawn(
                prompt=prompt,
                with_trigger=bool(embedded.with_trigger_P[number]),
                pictures=tuple(seen.thumbnail(column[number][0]).name for column in comparison.cells),
            )
            for number, prompt in enumerate(comparison.prompts)
        ),
    )


_UNSAID = {"checkpoint": None, "multiplier": None, "sure": None, "text": _STYLE}


def _nothing(text: str) -> Suggestion:
    return Suggestion(
        checkpoint=None, multiplier=None, sure=None, told_apart=False, draws_needed=None, text=text
    )  # fmt: skip


def _embedded(comparison: Comparison, seen: JudgeStore) -> Embedded:
    keys = [[[seen.picture_key(cell) for cell in row] for row in column] for column in comparison.cells]
    drawn_CPSD = np.array([[[seen.rows.values(key) for key in row] for row in column] for column in keys], np.float64)
    trained, held_out = (
        [seen.rows.values(seen.reference_key(item)) for item in comparison.references if item.held_out is wanted]
        for wanted in (False, True)
    )
    texts = [seen.rows.values(seen.text_key(text)) for text in comparison.texts]
    return Embedded(
        drawn_CPSD=drawn_CPSD,
        trained_ND=np.array(trained, np.float64),
        held_out_MD=np.array(held_out, np.float64).reshape(-1, drawn_CPSD.shape[-1]),
        texts_PD=np.array(texts, np.float64) if texts else None,
        with_trigger_P=bears(comparison.prompts, comparison.trigger),
    )


def _remarks(comparison: Comparison, embedded: Embedded) -> list[str]:
    remarks = ["A judge model sees what a picture shows, not whether it is beautiful; look at the pictures, too."]
    neutral = int((~embedded.with_trigger_P).sum())
    seeds = embedded.drawn_CPSD.shape[2]
    if not comparison.trigger:
        remarks.append("No trigger is known, so all prompts count as bearing it, and drift is not measured.")
    elif not neutral:
        remarks.append("All prompts bear the trigger, so drift is not measured: add prompts without it.")
    elif neutral < _FEW_NEUTRAL:
        remarks.append(f"Drift rests on {count(neutral, 'prompt')} without the trigger, which is few.")
    if embedded.texts_PD is None:
        remarks.append("The judge model reads no text, so nothing is said of how well prompts are followed.")
    if seeds == 1:
        remarks.append("With a single seed nothing is said of variety.")
    if len(embedded.trained_ND) == 1:
        remarks.append("There is one training picture: likeness and copying are hard to tell apart.")
    if max(len(embedded.trained_ND), len(embedded.held_out_MD)) == MOST:
        remarks.append(f"At most {MOST} training and held-out pictures each were looked at.")
    return remarks
