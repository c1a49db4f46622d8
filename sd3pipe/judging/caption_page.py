"""The page of a caption check: who is named, and every picture with its interval, the least explained first."""

from collections.abc import Sequence

from sd3pipe.caption_findings import CaptionFindings, CheckedPicture
from sd3pipe.judgement import Score
from sd3pipe.pages.render import render as render_page

_HEADS = ("", "advantage of its own caption", "")
_LEARNT_HEADS = ("loss fell by", "", "quantile of its losses in training")


def render_findings(findings: CaptionFindings) -> str:
    """Returns the page."""
    learnt = any(picture.learnt or picture.in_training for picture in findings.pictures)
    ordered = sorted(findings.pictures, key=lambda item: (not _named(item), _advantage(item), item.full_name))
    return render_page(
        "judging/captions.html",
        title="Captions checked",
        named=[_row(picture, learnt) for picture in ordered if _named(picture)],
        others=[_row(picture, learnt) for picture in ordered if not _named(picture)],
        heads=[*_HEADS, *(_LEARNT_HEADS if learnt else ())],
        checkpoints=[
            [
                str(item.checkpoint),
                *(_shown(item.gained_by_subset.get(subset)) for subset in _subsets(findings)),
                _shown(item.memorised_gap),
            ]
            for item in findings.checkpoints
        ],
        checkpoint_heads=["checkpoint", *_subsets(findings), "more at low noise than held-out pictures"],
    )


def _named(picture: CheckedPicture) -> bool:
    return picture.suspect or picture.changes_nothing


def _advantage(picture: CheckedPicture) -> float:
    return float("inf") if picture.advantage is None else picture.advantage.value


def _subsets(findings: CaptionFindings) -> Sequence[str]:
    return sorted({name for item in findings.checkpoints for name in item.gained_by_subset})


def _row(picture: CheckedPicture, learnt: bool) -> list[str]:
    words = {
        "held out": picture.held_out,
        "explains it no better than others' captions": picture.suspect,
        "changes nothing": picture.changes_nothing,
        "nothing to compare with": picture.advantage is None,
    }
    row = [picture.full_name, _shown(picture.advantage), ", ".join(word for word, holds in words.items() if holds)]
    if learnt:
        losses = picture.in_training
        row += [_shown(picture.gained), picture.learnt or "", f"{losses.quantile:.2f}" if losses else ""]
    return row


def _shown(score: Score | None) -> str:
    return "" if score is None else score.shown("+.1%")
