"""The studio in a real browser, as a person uses it: a server of its own, headless Chromium, no network."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the studio's extra is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")

from playwright import sync_api
from support.browser import CHROMIUM, FLAGS, needs_chromium
from support.studios import run_at_a_terminal, write_pictures, write_project

from sd3pipe.caption_findings import CaptionFindings
from sd3pipe.demo.project import write_files

pytestmark = needs_chromium
HOSTILE = '<img src=x onerror="document.title=\'ran\'"><script>document.title="ran"</script>'
PAGES = ("pictures", "plan", "train", "compare")


class Running:
    """A studio in a process of its own, and a browser's page that was opened at the address that it printed."""

    def __init__(self, state: Path, *projects: Path, options: tuple[str, ...] = ()) -> None:
        self.env = {**os.environ, "XDG_STATE_HOME": str(state)}
        self.projects, self.options = projects, options
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "sd3pipe", "studio", *map(str, self.projects), "--port", "0", "--no-open"]
        self.process = subprocess.Popen(
            [*command, *self.options], env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.address = re.search(r"http\S+", self.process.stdout.readline())[0]
        self.root = self.address.partition("/?")[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def chromium():
    flags = [flag for flag in FLAGS if flag not in ("--headless", "--virtual-time-budget=2000")]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Returns a page at a studio's address; a page's own errors, and what its policy stops, fail the test."""
    with contextlib.ExitStack() as stack:

        def open_page(studio: Running, **options):
            context = stack.enter_context(contextlib.closing(chromium.new_context(**options)))
            page = context.new_page()
            page.problems = []
            page.on("pageerror", lambda error: page.problems.append(str(error)))
            page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
            page.on("request", lambda sent: sent.url.startswith(studio.root) or page.problems.append(sent.url))
            page.goto(studio.address)
            page.slug = page.eval_on_selector("body", "body => body.dataset.slug")
            return page

        yield open_page


@pytest.fixture
def running(tmp_path):
    started: list[Running] = []

    def run(*projects: Path, **options) -> Running:
        started.append(Running(tmp_path / "state", *projects, **options))
        return started[-1]

    yield run
    for studio in started:
        studio.process.terminate()
        studio.process.wait(20)


def until(page, expression: str, seconds: float = 600) -> None:
    """Waits for an expression to be true; playwright's own way evaluates text in the page, which its policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(100)


def at(page, studio: Running, name: str) -> None:
    page.goto(f"{studio.root}/p/{page.slug}/{name}")


@pytest.mark.long
def test_captions_and_tags_are_edited_and_undone_and_hostile_ones_run_nothing(tmp_path, running, opened):
    names = {"a": "cat, sofa", "b": "cat, window", HOSTILE.replace("/", ""): HOSTILE}
    project = write_project(tmp_path / "cats", names)
    studio = running(project)
    page, other = opened(studio), opened(studio)
    assert page.url == f"{studio.root}/p/{page.slug}/pictures"  # the token is out of sight
    box = page.get_by_label("caption of a.png")
    box.fill("cat, bed")
    box.press("Control+Enter")
    page.get_by_text("Undo the caption of a.png").wait_for()
    assert (project / "pictures" / "a.txt").read_text() == "cat, bed\n"

    mine = other.get_by_label("caption of a.png")  # the second tab still has what was there
    assert mine.input_value() == "cat, sofa"
    mine.fill("dog")
    mine.press("Control+Enter")
    other.get_by_text("It was changed elsewhere").wait_for()
    assert other.get_by_label("caption of a.png").input_value() == "cat, bed"
    assert (project / "pictures" / "a.txt").read_text() == "cat, bed\n"
    other.get_by_text("Use mine all the same").click()
    other.get_by_text("Undo the caption of a.png").wait_for()
    assert (project / "pictures" / "a.txt").read_text() == "dog\n"

    page.reload()
    page.get_by_label("all 3").check()
    page.get_by_label("operation").select_option("replace")
    page.get_by_label("tag", exact=True).fill("cat")
    page.get_by_label("replace by").fill("tiger")
    page.get_by_text("Show the change").click()
    page.get_by_text("1 caption of 3 would change").wait_for()
    assert (project / "pictures" / "b.txt").read_text() == "cat, window"
    page.get_by_role("button", name="Apply").click()
    page.get_by_text("Undo replace cat -> tiger").click()
    page.get_by_text("undone: replace cat -> tiger, 1 file").wait_for()
    assert (project / "pictures" / "b.txt").read_text() == "cat, window"
    assert page.title() == other.title() == "Pictures · cats"
    assert page.problems == other.problems == []


@pytest.mark.long
@pytest.mark.parametrize("width, scheme", [(400, "dark"), pytest.param(1400, "light", marks=pytest.mark.slow)])
def test_nothing_runs_off_and_all_controls_are_named(tmp_path, running, opened, width, scheme):
    project = write_project(tmp_path / "cats", {f"picture-{n}": "cat, " + "unbroken" * 20 for n in range(5)})
    studio = running(project)
    page = opened(studio, viewport={"width": width, "height": 800}, color_scheme=scheme)
    for address in (*(f"/p/{page.slug}/{name}" for name in PAGES), "/queue", "/begin"):
        page.goto(studio.root + address)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, address
        nameless = page.eval_on_selector_all(
            "input:not([type=hidden]), select, textarea, button",
            "all => all.filter((one) => !one.labels?.length && !one.ariaLabel && !one.textContent.trim()).length",
        )
        assert nameless == 0, address
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(253, 253, 252)"
    assert dark == (scheme == "dark") and page.problems == []


@pytest.mark.long
def test_options_are_saved_with_comments_kept_and_errors_at_their_fields(tmp_path, running, opened):
    project = write_project(tmp_path / "cats", {"a": "cat"})
    (project / "stages").mkdir()
    (project / "stages" / "train.toml").write_text("# mine\nnetwork_dim = 8  # small\n")
    studio = running(project)
    page = opened(studio)
    at(page, studio, "plan")
    page.locator("#network_dim").fill("none")
    page.get_by_role("button", name="Save").click()
    page.locator("[data-errors=network_dim]", has_text="integer").wait_for()
    assert "network_dim = 8" in (project / "stages" / "train.toml").read_text()
    page.locator("#network_dim").fill("32")
    page.locator("#learning_rate").fill("3e-4")
    page.locator("details", has=page.locator("#optimizer_args")).locator("summary").click()
    page.locator("#optimizer_args").fill("betas=0.9,0.99\nweight_decay=0.01")
    page.get_by_role("button", name="Save").click()
    page.wait_for_load_state()
    page.locator("#learning_rate[value='0.0003']").wait_for()
    assert page.locator("#optimizer_args").input_value() == "betas=0.9,0.99\nweight_decay=0.01"
    assert (project / "stages" / "train.toml").read_text() == (
        "# mine\nnetwork_dim = 32  # small\nlearning_rate = 0.0003\n"
        'optimizer_args = ["betas=0.9,0.99", "weight_decay=0.01"]\n'
    )


@pytest.mark.long
def test_what_an_editor_wrote_meanwhile_stays_and_a_folded_error_is_seen(tmp_path, running, opened):
    project = write_project(tmp_path / "cats", {"a": "cat"})
    (project / "stages").mkdir()
    file = project / "stages" / "train.toml"
    file.write_text("network_dim = 8\n")
    studio = running(project)
    page = opened(studio)
    at(page, studio, "plan")
    file.write_text('network_dim = 16\nadapter_type = "lokr"\n')
    page.locator("#learning_rate").fill("3e-4")
    page.get_by_role("button", name="Save").click()
    page.get_by_role("status").get_by_text("saved in").wait_for()  # on the page that was loaded anew
    assert file.read_text() == 'network_dim = 16\nadapter_type = "lokr"\nlearning_rate = 0.0003\n'
    fold = page.locator("details", has=page.locator("#scale_weight_norms"))
    fold.locator("summary").click()
    page.locator("#scale_weight_norms").fill("none")
    fold.locator("summary").click()
    assert not page.locator("#scale_weight_norms").is_visible()
    page.get_by_role("button", name="Save").click()
    page.locator("[data-errors=scale_weight_norms]", has_text="number").wait_for()
    assert page.problems == []


@pytest.mark.long
def test_the_second_of_two_windows_is_told_what_the_first_saved(tmp_path, running, opened):
    project = write_project(tmp_path / "cats", {"a": "cat"})
    studio = running(project)
    pages = [opened(studio) for _ in range(2)]
    for page, dim, scheduler in zip(pages, ("8", "4"), ("linear", "cosine"), strict=True):
        at(page, studio, "plan")
        page.locator("#network_dim").fill(dim)
        page.locator("#lr_scheduler").select_option(scheduler)
    first, second = pages
    first.get_by_role("button", name="Save").click()
    first.get_by_role("status").get_by_text("saved in").wait_for()
    file = project / "stages" / "train.toml"
    second.get_by_role("button", name="Save").click()
    second.locator("[data-errors=network_dim]", has_text="changed elsewhere, to 8").wait_for()
    second.locator("[data-errors=lr_scheduler]", has_text="changed elsewhere, to linear").wait_for()
    assert second.locator("#lr_scheduler").input_value() == "cosine" and "network_dim = 8" in file.read_text()
    second.get_by_role("button", name="Save").click()
    second.get_by_role("status").get_by_text("saved in").wait_for()
    assert "network_dim = 4" in file.read_text() and 'lr_scheduler = "cosine"' in file.read_text()
    assert first.problems == second.problems == []


@pytest.mark.long
def test_a_page_that_stands_alone_has_its_style_under_its_own_policy(tmp_path, running, opened):
    project = write_project(tmp_path / "cats", {"a": "cat"})
    CaptionFindings(pictures=(), suspects=(), change_nothing=(), checkpoints=()).save(project / "caption-check.json")
    page = opened(running(project))
    page.get_by_text("check-captions named no picture").get_by_role("link").click()
    page.get_by_role("heading", name="Captions checked").wait_for()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 252)"
    assert page.problems == []


@pytest.mark.long
def test_what_was_left_out_of_a_command_is_said_on_the_page_that_comes_next(tmp_path, running, opened):
    write_pictures(tmp_path / "train" / "3_cat", {"a": "cat"})
    (tmp_path / "model.safetensors").write_bytes(b"")
    page = opened(running(write_project(tmp_path / "old", {"a": "cat"})))
    page.get_by_role("link", name="Begin").click()
    form = page.locator("form", has=page.get_by_role("button", name="Translate"))
    form.locator("[name=folder]").fill(str(tmp_path / "new"))
    form.locator("[name=text]").fill(
        f"sd3_train_network.py --pretrained_model_name_or_path={tmp_path}/model.safetensors"
        f" --train_data_dir={tmp_path}/train --resolution=64 --network_module=networks.lora_sd3 --lowram"
    )
    form.get_by_role("button", name="Translate").click()
    said = page.locator(".said")
    said.get_by_text("Without effect: 2 options").wait_for()
    said.get_by_role("button", name="Close").click()
    assert not said.is_visible() and page.problems == []


@pytest.mark.long
def test_a_card_keeps_the_keyboard_and_what_is_typed_while_it_is_saved(tmp_path, running, opened):
    project = write_project(tmp_path / "cats", {"a": "cat", "b": "dog"})
    page = opened(running(project))
    page.route("**/pictures/caption", lambda sent: None)
    box = page.get_by_label("caption of a.png")
    box.fill("cat, bed")
    box.press("Control+Enter")
    box.press("End")
    box.press_sequentially(", red")
    until(page, "Boolean(document.querySelector('.card[data-saving]'))")
    page.unroute("**/pictures/caption")  # the one that waits goes on
    page.get_by_text("Undo the caption of a.png").wait_for()
    assert (project / "pictures" / "a.txt").read_text() == "cat, bed\n"
    assert box.input_value() == "cat, bed, red"
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "caption of a.png"
    box.press("Control+Enter")
    until(page, "!document.querySelector('.card.dirty')")
    assert (project / "pictures" / "a.txt").read_text() == "cat, bed, red\n"
    box.press_sequentially("x")
    assert page.locator(".card.dirty").count() == 1
    box.press("Escape")
    assert page.locator(".card.dirty").count() == 0 and page.problems == []


@pytest.mark.slow  # what a person waits for
def test_a_studio_that_is_gone_is_told_and_a_button_keeps_the_keyboard(tmp_path, running, opened):
    project = write_project(tmp_path / "cats", {"a": "cat"})
    studio = running(project)
    page = opened(studio)
    at(page, studio, "train")
    with page.expect_navigation():  # to the page itself, now that something is at work
        page.get_by_role("button", name="Start").click()
    page.goto(studio.root + "/queue")
    page.locator(".state-failed").wait_for()  # there is no model
    page.get_by_role("button", name="remove: run").focus()
    page.wait_for_timeout(2500)  # the list was put in anew
    assert page.evaluate("document.activeElement.value") == "remove"
    train = page.context.new_page()
    at_train = []
    train.on("pageerror", lambda error: at_train.append(str(error)))
    train.goto(f"{studio.root}/p/{page.slug}/train")
    assert train.locator("#lost").is_hidden() and page.locator("#lost").is_hidden() and page.problems == []
    studio.kill()
    page.locator("#lost").wait_for()
    train.locator("#lost").wait_for()
    port = studio.root.rpartition(":")[2]
    studio.options = ("--port", port)
    studio.start()
    if studio.root.endswith(f":{port}"):
        page.context.new_page().goto(studio.address)
        page.locator("#lost").wait_for(state="hidden")
        train.locator("#lost").wait_for(state="hidden")
    assert at_train == []


@pytest.mark.long
def test_what_can_be_done_after_a_run_is_said_without_a_reload(tmp_path, running, opened):
    project = write_project(tmp_path / "cats", {"a": "cat"})
    holder = run_at_a_terminal(project)
    studio = running(project)
    page = opened(studio)
    at(page, studio, "train")
    page.locator("#status", has_text="at a terminal").wait_for()
    checkpoint = project / "runs" / "cat" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter.safetensors").write_bytes(b"")
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Go on").wait_for()
    assert holder.wait(20) != 0 and page.problems == []


@pytest.mark.slow
def test_a_run_from_its_start_to_the_exported_file(tmp_path, running, opened):
    """A demo run is started, seen without a reload, stopped, gone on with after an edit, compared and exported."""
    project = tmp_path / "star"
    for path, data in write_files(project, steps=200).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    studio = running(project)
    page = opened(studio)
    page.set_default_timeout(600_000)
    at(page, studio, "train")
    page.get_by_role("button", name="Start").click()
    page.locator("#shots img").first.wait_for()  # samples at step 0
    until(page, "Number(document.querySelector('#train').dataset.steps) >= 3")
    assert page.locator("#loss svg.chart").count() == 1
    page.get_by_role("button", name="Stop").click()
    page.locator("#status", has_text="stopped").wait_for()
    stopped_at = int(page.eval_on_selector("#train", "one => one.dataset.steps"))
    assert stopped_at < 200

    at(page, studio, "pictures")
    box = page.get_by_label("caption of wubble-00.png")
    box.fill("another caption")
    box.press("Control+Enter")
    page.get_by_text("encode-text will make 1 row of").wait_for()
    at(page, studio, "train")
    page.get_by_role("button", name="Go on").click()
    page.get_by_text("with the new rows").click()
    page.locator("#status", has_text="done").wait_for()
    log = page.locator("#log").text_content()
    assert "encode-text: 76 reused, 1 encoded" in log
    assert stopped_at <= int(re.search(r"from step (\d+)\)", log)[1]) < 200  # the page heard of some of its steps later

    at(page, studio, "compare")
    page.locator(".matrix img").nth(0).click()
    page.locator(".matrix img").nth(1).click()
    assert page.locator("#wiper").is_visible()
    page.locator("select[name=checkpoint]").select_option("100")
    page.get_by_role("button", name="Export").click()
    page.get_by_text("Copy the path").wait_for()
    file = Path(page.locator("#exported code").text_content())
    from safetensors.numpy import load_file

    assert file.name == "wubble-step00000100.safetensors" and load_file(file)
    assert page.problems == []


@pytest.mark.slow
def test_a_queue_of_two_survives_the_end_of_the_studio(tmp_path, running, opened):
    projects = []
    for name in ("one", "two"):
        projects.append(tmp_path / name)
        for path, data in write_files(projects[-1], steps=6).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    studio = running(*projects)
    page = opened(studio)
    for project in projects:
        page.goto(studio.root)
        page.get_by_role("link", name=project.name, exact=True).click()
        page.slug = page.url.split("/")[4]
        at(page, studio, "train")
        page.get_by_role("button", name="Start").click()
        page.get_by_role("button", name="Stop").wait_for()
    studio.kill()
    time.sleep(1)
    studio.start()
    page.set_default_timeout(600_000)
    page.goto(studio.address.replace("/?", "/queue?"))
    page.locator(".state-done").nth(1).wait_for()
    assert all((project / "runs" / "wubble" / "final").is_dir() for project in projects)
