"""`judge`: draws, looks and compares once; its results are read by the report and by export."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import ExifTags, Image
from support.random_runs import write_base_and_prompts, write_random_checkpoints
from support.tiny_clip import write_tiny_clip
from support.tiny_training import make_inputs, pictures

from sd3pipe.commands import export, judge, report, sample
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.fingerprint import hash_file
from sd3pipe.judgement import SCORES, Suggestion, read_judgement
from sd3pipe.judging.judge_model import find_judge_model
from sd3pipe.params.export import ExportParams
from sd3pipe.params.judge import JudgeParams
from sd3pipe.params.report import ReportParams
from sd3pipe.params.sample import SampleParams

STEPS = (100, 200)
PROMPTS = """\
a red wubble --w 32 --h 32 --s 2
a large wubble --w 32 --h 32 --s 2
a blue square --w 32 --h 32 --s 2
a green circle --w 32 --h 32 --s 2
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny base, prompts with and without a word, training pictures, two random adapters as checkpoints, a CLIP."""
    folder = tmp_path_factory.mktemp("judge")
    model = write_base_and_prompts(folder, PROMPTS, cache="caches/prompts")
    make_inputs(folder, [*pictures(4), *pictures(1, split="validation")])
    write_random_checkpoints(folder / "runs/r", model, STEPS)
    write_tiny_clip(folder / "clip")
    return folder


def params(made: Path, out: Path, **options) -> JudgeParams:
    given = {
        "model": str(made / "base.safetensors"), "prompts": made / "caches/prompts", "adapter": made / "runs/r",
        "latents": made / "caches/latents", "judge_model": str(made / "clip"), "trigger": "wubble", "seeds": "1,2",
        "threads": 1, **options,
    }  # fmt: skip
    return JudgeParams(out=out, **given)


def told(out: Path) -> dict:
    return json.loads(Path(f"{out}.report.json").read_text())


@pytest.fixture(scope="module")
def judged(made) -> Path:
    judge.main(params(made, made / "runs/r/judge"))
    return made / "runs/r/judge"


def test_every_checkpoint_has_every_score_with_its_interval(judged):
    found = read_judgement(judged)
    assert [scores.checkpoint for scores in found.scores] == list(STEPS)
    for scores in found.scores:
        for name in SCORES:
            score = getattr(scores, name)
            assert score.low <= score.value <= score.high
    assert found.suggestion.text and found.remarks
    assert told(judged)["drawn"] == told(judged)["pictures"] == 4 * 2 * 3


def test_a_second_call_draws_and_looks_at_nothing_and_says_the_same_to_the_bit(made, judged, monkeypatch):
    before = (judged / "judge.json").read_bytes()
    monkeypatch.setattr(judge, "draw_cells", lambda *_, **__: pytest.fail("nothing is missing"))
    monkeypatch.setattr("sd3pipe.judging.pictures.JudgeModel", lambda *_: pytest.fail("nothing is missing"))
    judge.main(params(made, judged))
    assert (judged / "judge.json").read_bytes() == before


@pytest.mark.long
def test_only_what_is_missing_is_drawn_after_a_batch_was_lost(made, judged, tmp_path):
    folder = shutil.copytree(made / "caches", tmp_path / "caches")
    latents = sorted((folder / ".sd3pipe/pictures").rglob("*.safetensors"))
    for file in latents[:3]:
        file.unlink()
    for segment in (folder / ".sd3pipe/embeddings/segments").iterdir():
        segment.unlink()
    out = tmp_path / "out"
    judge.main(params(made, out, prompts=folder / "prompts"))
    assert told(out)["drawn"] == 3
    assert read_judgement(out).scores == read_judgement(judged).scores


@pytest.mark.long
def test_a_damaged_embedding_is_made_again(made, judged, tmp_path):
    folder = shutil.copytree(made / "caches", tmp_path / "caches")
    (segment,) = (folder / ".sd3pipe/embeddings/segments").iterdir()
    data = bytearray(segment.read_bytes())
    data[-3] ^= 1
    segment.write_bytes(data)
    judge.main(params(made, tmp_path / "out", prompts=folder / "prompts"))
    assert told(tmp_path / "out")["looked_at"] == 1
    assert read_judgement(tmp_path / "out").scores == read_judgement(judged).scores


@pytest.mark.long
def test_sample_finds_what_judge_drew(made, judged, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "draw_cells", lambda *_, **__: pytest.fail("nothing is missing"))
    sample.main(
        SampleParams(
            model=str(made / "base.safetensors"), prompts=made / "caches/prompts", adapter=made / "runs/r",
            checkpoints="all", seeds="1,2", threads=1, out=tmp_path / "out",
        )
    )  # fmt: skip
    drawn = list((tmp_path / "out/pictures").iterdir())
    assert len(drawn) == 4 * 2 * 3
    assert all("Sampler: Euler" in Image.open(file).info["parameters"] for file in drawn)


def test_small_pictures_say_what_they_were_drawn_with(judged):
    said = {
        Image.open(file).getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
        for file in (judged / "pictures").glob("*.jpg")
    }
    texts = {text.removeprefix(b"UNICODE\0").decode("utf-16-be") for text in said}
    assert texts and all("Sampler: Euler" in text and "Seed: " in text for text in texts)


@pytest.mark.long
def test_a_checkpoint_more_draws_its_pictures_alone(made, judged, tmp_path):
    judge.main(params(made, tmp_path / "out", multiplier="1,0.5"))
    assert told(tmp_path / "out")["drawn"] == 4 * 2 * 2
    found = read_judgement(tmp_path / "out")
    assert [(item.checkpoint, item.multiplier) for item in found.scores] == [(100, 1), (100, 0.5), (200, 1), (200, 0.5)]


@pytest.mark.long
def test_of_a_style_nothing_is_suggested(made, judged, tmp_path):
    judge.main(params(made, tmp_path / "out", goal="style"))
    suggestion = read_judgement(tmp_path / "out").suggestion
    assert suggestion.checkpoint is None and "style" in suggestion.text


@pytest.mark.long
def test_a_judge_model_that_tells_nothing_apart_suggests_nothing(made, judged, tmp_path, monkeypatch):
    monkeypatch.setattr("sd3pipe.judging.scores.towards", lambda *_: None)
    judge.main(params(made, tmp_path / "out"))
    found = read_judgement(tmp_path / "out")
    assert found.suggestion.checkpoint is None and "does not tell the training pictures" in found.suggestion.text
    assert [scores.likeness for scores in found.scores] == [None] * len(STEPS)


def test_a_trigger_that_no_prompt_has_is_refused(made, tmp_path):
    with pytest.raises(ParameterError, match="no prompt of"):
        judge.main(params(made, tmp_path / "out", trigger="wombat"))


def test_a_folder_that_is_no_model_is_refused_with_the_way_out(made, tmp_path):
    for model, why in (("caches", r"no config\.json"), ("clipp", r"no such folder \(did you mean \S+clip\?\)")):
        with pytest.raises(InputError, match=why):
            judge.main(params(made, tmp_path / "out", judge_model=str(made / model)))


def test_a_model_that_is_not_there_is_told_as_such():
    with pytest.raises(InputError, match="nothere: there is no such folder"):
        find_judge_model("nothere")


def test_strength_0_is_not_judged_beside_the_base():
    with pytest.raises(ValueError, match="0 is the base alone"):
        JudgeParams(model="m", adapter="a", prompts="p", latents="l", judge_model="j", out="o", multiplier="1,0.0")


def test_a_damaged_judgement_is_told(tmp_path):
    (tmp_path / "judge.json").write_text('{"format": 2, "scores": 3}')
    with pytest.raises(InputError, match=r"run `sd3pipe judge` again"):
        read_judgement(tmp_path)


def suggesting(made: Path, judged: Path, folder: Path, checkpoint: int | None) -> Path:
    """Returns a copy of the run whose judgement suggests a checkpoint."""
    run = shutil.copytree(made / "runs/r", folder / "r")
    suggestion = Suggestion(
        checkpoint=checkpoint, multiplier=1.0, sure=0.9, told_apart=True, draws_needed=None, text="Suggested."
    )
    replace(read_judgement(judged), suggestion=suggestion).save(run / "judge")
    return run


def test_export_takes_what_is_suggested(made, judged, tmp_path):
    run = suggesting(made, judged, tmp_path, STEPS[0])
    for adapter, out, options in (
        (run, tmp_path / "best.safetensors", {"checkpoints": "best"}),
        (run / "checkpoints/step-00000100", tmp_path / "first.safetensors", {}),
    ):
        export.main(ExportParams(adapter=adapter, out=out, **options))
    assert hash_file(tmp_path / "best.safetensors") == hash_file(tmp_path / "first.safetensors")


@pytest.mark.parametrize("checkpoint, message", [(None, "suggests no checkpoint"), (150, "has the steps 100, 200")])
def test_export_says_why_there_is_nothing_to_take(made, judged, tmp_path, checkpoint, message):
    run = suggesting(made, judged, tmp_path, checkpoint)
    with pytest.raises(InputError, match=message):
        export.main(ExportParams(adapter=run, out=tmp_path / "best.safetensors", checkpoints="best"))


def test_page_and_report_show_the_suggestion_and_the_curves(made, judged, tmp_path):
    run = suggesting(made, judged, tmp_path, STEPS[0])
    (run / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 1.0, "loss_mean": 1.0}\n')
    report.main(ReportParams(runs=(run,)))
    for page in ((run / "report.html").read_text(), (judged / "judge.html").read_text()):
        assert "Which checkpoint" in page and "drift: prompts without the trigger" in page
        assert page.count('class="point') == 1 + len(STEPS)
        assert page.count("data:image/jpeg;base64,") > 4 * 3
        assert 'alt=""' not in page and f'alt="step {STEPS[0]}: ' in page
        legend = page[page.index('<p class="legend">') :].partition("</p>")[0]  # of the points, which come first
        assert all(f"{name}</span>" in legend for name in ("base", *(f"step {step}" for step in STEPS)))
