"""The report page: complete, self-contained, and alive in a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from support.command_line import sd3pipe

from sd3pipe.reporting.charts import Series, line_chart, ticks

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=2000",
)  # fmt: skip


def write_run(folder: Path, *, steps: int = 30, rate: float = 1e-3) -> Path:
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
        "inputs": {"text": "caches/text", "latents": "caches/latents"}, "phases": {"steps": 10.0, "samples": 2.0},
        "memory": {"device_bytes": {"predicted": 9_000_000_000, "measured": 8_500_000_000}},
        "data": {"pictures": 12, "buckets": {"64x96": 4}, "subsets": {"cats": {"pictures": 12, "loss_weight": 1.0}}},
    }  # fmt: skip
    caches = folder.parent / "caches"
    caches.mkdir(exist_ok=True)
    (caches / "text.report.json").write_text(
        json.dumps({"seconds": 5.0, "captions": {"captions": 12, "different": 11, "most_frequent": {"a cat": 9}}})
    )
    (folder / "report.json").write_text(json.dumps(report))
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
    sd3pipe("report", run)
    return run / "report.html"


def test_page_shows_losses_options_and_provenance_escaped(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 3  # loss, validation, learning rate
    assert "network_dim" in text and "370 MB" in text
    assert "abc&lt;def&gt;" in text and "abc<def>" not in text


def test_page_shows_data_phases_and_predictions(page):
    text = page.read_text(encoding="utf-8")
    for words in ("64x96", "a cat", "sigma 0.9", "train, samples", "encode-text, last run", "9 GB", "8.5 GB"):
        assert words in text, words


def test_page_names_nothing_that_would_be_fetched(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", text)
    assert "default-src 'none'" in text
    assert text.count("data:image/png;base64,") == 6


def test_two_runs_stand_side_by_side_and_differences_are_marked(tmp_path):
    runs = [write_run(tmp_path / "a", rate=1e-3), write_run(tmp_path / "b", rate=2e-3)]
    sd3pipe("report", *runs, "--out", tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    marked = re.findall(r'<tr class="differs"><th>([^<]*)', text)
    assert marked == ["learning_rate"]


def test_a_folder_without_a_run_is_told(tmp_path):
    assert "is no run folder" in sd3pipe("report", tmp_path, expect=3).stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_slider_changes_the_pictures_and_nothing_is_fetched(page, tmp_path):
    """Moves the slider to the first step by a script appended to a copy, and reads the page back from the browser."""
    probe = (
        "<script>const s=document.querySelector('input[type=range]');s.value=0;"
        "s.dispatchEvent(new Event('input'));"
        "document.title=JSON.stringify({text:document.querySelector('output').textContent,"
        "shown:[...document.querySelectorAll('img.large')].filter(i=>!i.hidden&&i.naturalWidth)"
        ".map(i=>i.dataset.step)});</script>"
    )
    copy = tmp_path / "probe.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", probe + "</body>"), encoding="utf-8")
    log = tmp_path / "net.json"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--dump-dom"]
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None
    state = json.loads(title[1].replace("&quot;", '"'))
    assert state == {"text": "step 0", "shown": ["0", "0"]}
    asked = set(re.findall(r'"url":"([^"]+)"', log.read_text(errors="replace")))
    assert not {url for url in asked if url.startswith(("http:", "https:")) and "google" not in url}


def test_ticks_are_round_numbers_inside_the_range():
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
    assert ticks(3, 1997) == [500, 1000, 1500]


def test_a_chart_without_points_says_so():
    assert "nothing was recorded" in line_chart([Series(name="a", x=[], y=[])], x_label="x", y_label="y")


def test_a_loss_that_is_no_number_leaves_the_rest_of_the_line():
    svg = line_chart([Series(name="a", x=[1, 2, 3], y=[1.0, float("nan"), 2.0])], x_label="x", y_label="y")
    assert not re.search(r"\bnan\b", svg)
