"""The report page: complete, self-contained, and alive in a browser."""

import json
import os
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.browser import ask, needs_chromium
from support.command_line import forked

from sd3pipe.diffusion.picture_grid import save_picture
from sd3pipe.judgement import Score
from sd3pipe.picture_losses import PictureLosses, write_picture_losses
from sd3pipe.previewing.cards import Card, Preview, Section
from sd3pipe.previewing.sheet import draw_page
from sd3pipe.reporting.collect import read_run

LONG = "unbroken_" * 30


def write_run(folder: Path, *, steps: int = 30, rate: float = 1e-3, caption: str = "a cat") -> Path:
    """Writes a run folder as train leaves it, with sample pictures of one colour per step."""
    (folder / "final").mkdir(parents=True)
    records = [
        {"kind": "step", "step": n, "loss": 1 / n, "loss_mean": 1 / n, "learning_rate": rate}
        for n in range(1, steps + 1)
    ]
    records += [
        {"kind": "validation", "step": n, "loss": 0.5, "ci95": 0.1, "bands": {"sigma_0.1": 0.2, "sigma_0.9": 0.8}}
        for n in (10, 20, 30)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    report = {
        "stage": "train", "steps": steps, "loss_first": 1.0, "loss_last": 1 / steps, "seconds": 12.0,
        "peak_rss_bytes": 370225152, "options": {"learning_rate": rate, "network_dim": 4},
        "phases": {"steps": 10.0, "samples": 2.0},
        "memory": {"device_bytes": {"predicted": 9_000_000_000, "measured": 8_500_000_000}},
        "data": {"pictures": 12, "buckets": {"64x96": 4}, "subsets": {"cats": {"pictures": 12, "loss_weight": 1.0}}},
        "encoded": {"text": {"seconds": 5.0, "captions": {"captions": 12, "most_frequent": {caption: 9}}, "cut": 2}},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    gained = Score(value=0.1, low=0.05, high=0.15)
    losses = [
        PictureLosses(name=f"{n}.png", subset="cats", seen=9, quantile=n / 4, gained=gained, learnt=n != 3)
        for n in range(4)
    ]
    write_picture_losses(folder, losses)
    (folder / "final" / "inputs.json").write_text(json.dumps({"base": "abc<def>"}))
    for step, colour in ((0, "red"), (10, "green"), (30, "blue")):
        place = folder / "samples" / f"step-{step:08d}"
        place.mkdir(parents=True)
        for prompt in ("000", "001"):
            Image.new("RGB", (16, 16), colour).save(place / f"{prompt}.png")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    run = write_run(tmp_path_factory.mktemp("report") / "cat")
    forked("report", run)
    return run / "report.html"


def test_page_shows_losses_options_and_provenance_escaped(page):
    text = page.read_text(encoding="utf-8")
    assert text.count('<svg class="chart"') == 3  # loss, validation, learning rate
    assert "network_dim" in text and "370 MB" in text
    assert "abc&lt;def&gt;" in text and "abc<def>" not in text


def test_page_says_which_pictures_were_learnt_the_hardest_first(page):
    text = page.read_text(encoding="utf-8")
    assert "Of 3 of 4 pictures the loss fell measurably" in text
    (rows,) = re.findall(r"loss fell by.*?</table>", text, re.DOTALL)
    assert re.findall(r"cats/(\d)", rows) == ["3", "2", "1", "0"] and rows.count("not learnt") == 1
    assert "+10.0% (+5.0% to +15.0%)" in rows


def test_page_shows_data_phases_and_predictions(page):
    text = page.read_text(encoding="utf-8")
    for words in ("64x96", "a cat", "sigma 0.9", "train, samples", "encode-text, last run before", "9 GB", "8.5 GB"):
        assert words in text, words


def test_samples_are_titled_with_their_prompts(tmp_path):
    run = write_run(tmp_path / "cat")
    for folder in (run / "samples").iterdir():
        save_picture(folder / "000.png", np.zeros((16, 16, 3), np.uint8), title="a cat & ünïcode")
    titles = {sample.prompt: sample.title for sample in read_run(run).samples}
    assert titles == {"000": "a cat & ünïcode", "001": ""}


def test_page_names_nothing_that_would_be_fetched(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", text)
    assert "default-src 'none'" in text
    assert text.count("data:image/png;base64,") == 6


def test_two_runs_stand_side_by_side_and_differences_are_marked(tmp_path):
    runs = [write_run(tmp_path / "a", rate=1e-3), write_run(tmp_path / "b", rate=2e-3)]
    forked("report", *runs, "--out", tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    marked = re.findall(r'<table class="differs">(.*?)</table>', text, re.DOTALL)
    assert [re.findall(r"<tr><th>([a-z_]+)", rows) for rows in marked] == [["learning_rate"]]


def test_each_run_keeps_the_captions_that_it_was_trained_on(tmp_path):
    """Whatever the cache holds by now."""
    runs = [write_run(tmp_path / name, caption=f"caption of {name}") for name in ("new", "old")]
    for name in ("text", "latents"):
        (tmp_path / f"{name}.report.json").write_text('{"seconds": 1, "captions": {"most_frequent": {"of today": 3}}}')
    for run in runs:
        report = json.loads((run / "report.json").read_text())
        (run / "report.json").write_text(json.dumps(report | {"inputs": {"text": "text", "latents": "latents"}}))
    forked("report", *runs, "--out", tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "caption of new" in text and "caption of old" in text and "of today" not in text


def test_a_folder_without_a_run_is_told(tmp_path):
    assert "is no run folder" in forked("report", tmp_path, expect=3).stderr
    assert "there is no such folder" in forked("report", tmp_path / "gone", expect=3).stderr


def png() -> bytes:
    data = BytesIO()
    Image.new("RGB", (16, 16), "red").save(data, "PNG")
    return data.getvalue()


def plant(run: Path) -> dict[str, str]:
    """Puts into the samples what no page may hold; returns names and the reason to leave each out."""
    samples, outside = run / "samples", run.parent / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret-4711")
    (outside / "picture.png").write_bytes(png())
    (samples / "link-step-1.png").symlink_to(outside / "secret.txt")
    (samples / "picture-step-1.png").symlink_to(outside / "picture.png")
    (samples / "folder").symlink_to(outside)
    (samples / "within-step-1.png").symlink_to(samples / "folder" / "picture.png")
    (samples / "nowhere-step-1.png").symlink_to("gone")
    (samples / "circle-step-1.png").symlink_to("circle-step-1.png")
    (samples / "page-step-1.png").write_text("<html><script>alert(4711)</script></html>")
    (samples / "drawing-step-1.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>4711</script></svg>")
    (samples / "cut-step-1.png").write_bytes(png()[:50])
    Image.new("1", (5000, 5000)).save(samples / "wide-step-1.png")
    (samples / "bitmap-step-1.png").write_bytes(b"BM" + bytes(60))
    (samples / "device-step-1.png").symlink_to("/dev/zero")
    (samples / "folder-step-1.png").mkdir()
    os.mkfifo(samples / "pipe-step-1.png")
    (samples / "long-step-1.png").touch()
    os.truncate(samples / "long-step-1.png", 3_000_000_000)
    return {
        "link": "leads out", "picture": "leads out", "within": "leads out", "device": "leads out",
        "nowhere": "cannot be read", "circle": "cannot be read", "folder": "cannot be read", "pipe": "no regular file",
        "page": "no picture", "drawing": "no picture", "cut": "damaged", "wide": "pixels", "bitmap": "damaged",
        "long": "larger than",
    }  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_the_page_holds_pictures_inside_the_run_alone(tmp_path, caplog):
    run = write_run(tmp_path / "cat")
    (run / "samples" / "own-step-1.png").symlink_to(run / "samples" / "step-00000000" / "000.png")
    reasons = plant(run)
    samples = read_run(run).samples
    assert len(samples) == 7 and all(sample.kind == "png" for sample in samples)
    told = {Path(record.args[0]).name.removesuffix("-step-1.png"): record.getMessage() for record in caplog.records}
    assert set(told) == set(reasons)
    assert all(reason in told[name] for name, reason in reasons.items())
    assert b"secret" not in b"".join(sample.data for sample in samples)


def test_a_step_without_a_running_mean_is_no_point_of_its_curve(tmp_path):
    run = write_run(tmp_path / "run", steps=3)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {"loss_mean": None}
    (run / "metrics.jsonl").write_text("\n".join([json.dumps(first), *lines[1:], ""]))
    forked("report", run, "--out", tmp_path / "page.html")
    assert "running mean" in (tmp_path / "page.html").read_text()


def test_a_run_without_a_step_has_a_page(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"stage": "train", "exit_code": 8}))
    forked("report", tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "no step was recorded" in text and "<h2>Samples" not in text and "<h2>Validation" not in text


@pytest.mark.long
@needs_chromium
def test_slider_changes_the_pictures_and_nothing_is_fetched(page, tmp_path):
    script = """
        const slider = document.querySelector("input[type=range]");
        slider.value = 0;
        slider.dispatchEvent(new Event("input"));
        const large = [...document.querySelectorAll("img.large")].filter((i) => i.checkVisibility() && i.src);
        const said = [...document.images].every((i) => i.alt) && large.every((i) => i.alt.endsWith(", step 0"));
        return [document.querySelector("output").textContent, large.map((i) => i.dataset.step), said];
    """
    assert ask(page.read_text(encoding="utf-8"), script, tmp_path) == ["step 0", ["0", "0"], True]
    asked = set(re.findall(r'"url":"([^"]+)"', (tmp_path / "net.json").read_text(errors="replace")))
    assert not {url for url in asked if url.startswith(("http:", "https:")) and "google" not in url}


@pytest.mark.long
@needs_chromium
def test_without_its_script_the_page_shows_every_picture(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    unscripted = re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL)
    script = "return [...document.images].filter((i) => i.checkVisibility()).map((i) => i.naturalWidth)"
    assert unscripted != text and ask(unscripted, script, tmp_path) == [16] * 6


def narrow_pages(folder: Path) -> list[str]:
    """Returns a preview, a report and a comparison whose names and captions are long and unbroken."""
    card = Card(
        name=LONG, picture=np.zeros((90, 240, 3), np.uint8), facts=(LONG,), captions=(LONG, "b"), warnings=(LONG,)
    )
    section = Section(width=64, height=64, pictures=1, rows=1, cards=(card,))
    preview = Preview(
        title=LONG, sections=(section,), warnings=(LONG,), unreadable=((LONG, LONG),), tags={LONG: {LONG: 1}}
    )
    runs = [write_run(folder / "a"), write_run(folder / "b", rate=0.25)]
    for run in runs:
        report = json.loads((run / "report.json").read_text())
        report["options"][LONG] = LONG + run.name
        report["validation"], report["data"]["buckets"] = LONG, {LONG: 3}
        report["data"]["subsets"] = {f"{LONG}{n}": {"pictures": 12, "loss_weight": n} for n in range(4)}
        (run / "report.json").write_text(json.dumps(report))
    forked("report", runs[0])
    forked("report", *runs, "--out", folder / "both.html")
    paths = (runs[0] / "report.html", folder / "both.html")
    return [draw_page(preview), *(path.read_text(encoding="utf-8") for path in paths)]


@pytest.mark.long
@needs_chromium
def test_nothing_runs_off_at_phone_width_and_axes_stay_readable(tmp_path):
    script = """
        for (const folded of document.querySelectorAll("details")) folded.open = true;
        const texts = [...document.querySelectorAll(".chart text")].map((text) => text.getBoundingClientRect());
        const charts = [...document.querySelectorAll(".chart > svg")].map((svg) => svg.getBoundingClientRect().width);
        return {
          width: document.scrollingElement.scrollWidth,
          outside: texts.filter((box) => box.left < 0 || box.right > 400).length,
          lowest: Math.min(...texts.map((box) => box.height)),
          narrowest: Math.min(...charts),
        };
    """
    for number, page in enumerate(narrow_pages(tmp_path)):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = ask(page, script, folder, width=400)
        assert found["width"] <= 400 and found["outside"] == 0, (number, found)
        if number:
            assert found["lowest"] >= 12 and found["narrowest"] > 0.7 * found["width"], (number, found)


def test_damaged_lines_and_reports_are_left_out(tmp_path, caplog):
    folder = write_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "step", "step": "x"}\n[]\n' + "[" * 5000 + '\n{"kind": "step", "ste')
    (folder / "report.json").write_text('{"phases": {"steps": "long"}}')
    record = read_run(folder)
    assert len(record.steps) == 30 and record.report == {}
    assert "report.json: phases.steps" in caplog.text and "left out of the report" in caplog.text


def test_a_duration_that_is_no_number_leaves_its_report_out(tmp_path, caplog):
    folder = write_run(tmp_path / "run")
    (folder / "report.json").write_text('{"phases": {"steps": NaN}}')
    assert read_run(folder).report == {}
    assert "report.json: phases.steps" in caplog.text
