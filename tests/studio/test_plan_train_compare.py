"""Plan, Train, Compare and Begin as far as they go without training: forms, what is started, what is exported."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette", reason="the studio's extra is not installed")

import numpy as np
from support.studios import asked, run_at_a_terminal, studio_of, write_project

from sd3pipe.cache import staleness
from sd3pipe.child import ChildFailed
from sd3pipe.demo.project import write_files
from sd3pipe.diffusion.picture_grid import save_picture
from sd3pipe.errors import StaleError
from sd3pipe.judgement import JUDGE_FOLDER, SCORES, Judgement, Score, Scores, Suggestion
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.fields import takes_several
from sd3pipe.params.stage_file import belongs
from sd3pipe.studio import queue as queue_module
from sd3pipe.studio.forms import as_text, checked_value, stage_form
from sd3pipe.studio.views import train as train_view
from sd3pipe.training import run_folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setattr(queue_module.Queue, "work", lambda self: None)
    return write_project(tmp_path / "cats", {"a": "cat"})


@pytest.fixture
def studio(tmp_path, project):
    return studio_of(tmp_path, project)


def path(studio, *parts) -> str:
    return "/".join(["/p", studio.projects.listed()[0]["slug"], *parts])


def started(studio) -> list[tuple[str, ...]]:
    return [command for job in studio.queue.jobs() for command in job.commands]


def with_checkpoint(project, step=10):
    folder = project / "runs" / "cat" / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "adapter.safetensors").write_bytes(b"")


@pytest.mark.long
def test_the_table_is_plans_own(tmp_path):
    for file, data in write_files(tmp_path / "star", steps=6).items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    studio = studio_of(tmp_path, tmp_path / "star")
    answer = asked(studio, "POST", path(studio, "plan", "table"), json={"vram": "4GB", "tflops": "1"})
    assert answer.status_code == 200, answer.text
    assert "fits: " in answer.json()["html"] and "Disk for the caches: " in answer.json()["html"]
    before = sorted((tmp_path / "star").rglob("*"))
    shown = asked(
        studio_of(tmp_path, tmp_path / "star", read_only=True),
        "POST",
        path(studio, "plan", "table"),
        json={"vram": "4GB", "tflops": "1"},
    )
    assert shown.json() == answer.json() and sorted((tmp_path / "star").rglob("*")) == before
    wrong = asked(studio, "POST", path(studio, "plan", "table"), json={"vram": "much"})
    assert wrong.status_code == 422 and "vram" in wrong.json()["error"][0]


def test_every_option_of_a_project_has_a_field_with_its_help(studio, project):
    page = asked(studio, "GET", path(studio, "plan")).text
    for name in ("network_dim", "blocks_to_swap", "optimizer_args", "adapter_type"):
        assert f'name="{name}"' in page
    assert 'name="device"' not in page and 'name="model"' not in page


def test_errors_stand_at_their_fields_and_nothing_is_saved(studio, project):
    body = {"stage": "train", "network_dim": "0", "optimizer_type": "AdamW", "seed": "7"}
    answer = asked(studio, "POST", path(studio, "plan", "save"), json=body).json()
    assert set(answer["fields"]) == {"network_dim"} and "greater" in answer["fields"]["network_dim"]
    assert not (project / "stages" / "train.toml").exists()
    together = {"stage": "train", "lr_scheduler": "constant", "lr_warmup_steps": "5"}
    assert asked(studio, "POST", path(studio, "plan", "save"), json=together).json()["fields"]


WORDS = [
    "betas=0.9,0.99",
    "step_rules=1:100,0.5:200,0.1",
    "a{1,2}=8",
    " edge ",
    '"',
    '"a" b',
    "",
    "two\nlines",
    "käse\xa0\u2028",
]


def test_what_a_form_shows_of_an_option_reads_back_as_it_stands_in_the_file():
    seen = set()
    for model in load_stage_models().values():
        for name, field in model.model_fields.items():
            if takes_several(field) and belongs(name, field):
                numbers = name == "base_weights_multiplier"
                value = [0.5, 1.0, 1e-05] if numbers else WORDS
                assert checked_value(field, as_text(field, value)) == value, name
                assert checked_value(field, as_text(field, value).replace("\n", "\r\n")) == value, name
                seen.add(name)
            elif belongs(name, field) and not isinstance(field.default, Mapping | None):
                assert checked_value(field, as_text(field, field.default)) == field.default, name
    assert {"optimizer_args", "network_args", "rank_rules", "lr_scheduler_args", "base_weights_multiplier"} <= seen


def test_several_words_stand_one_a_line_and_keep_their_commas(studio, project):
    file = project / "stages" / "train.toml"
    file.parent.mkdir()
    file.write_text('optimizer_args = ["betas=0.9,0.99"]\nbase_weights = ["a", "b"]\n')
    page = asked(studio, "GET", path(studio, "plan")).text
    assert re.search(r'<textarea [^>]*name="optimizer_args"[^>]*>betas=0.9,0.99</textarea>', page)
    body = {
        "stage": "train",
        "optimizer_args": "betas=0.9,0.99\n weight_decay=0.01 \n",
        "base_weights_multiplier": "0.5 1",
    }
    body |= {
        "lr_scheduler": "piecewise_constant",
        "lr_scheduler_args": "step_rules=1:100,0.5:200,0.1",
    }
    assert "reload" in asked(studio, "POST", path(studio, "plan", "save"), json=body).json()
    assert 'optimizer_args = ["betas=0.9,0.99", "weight_decay=0.01"]' in file.read_text()
    assert 'lr_scheduler_args = ["step_rules=1:100,0.5:200,0.1"]' in file.read_text()
    assert "base_weights_multiplier = [0.5, 1.0]" in file.read_text()


def test_a_text_of_several_lines_has_a_field_that_holds_them(studio, project):
    (project / "stages").mkdir()
    (project / "stages" / "caption.toml").write_text('prompt = "Describe it.\\nIn one line."\n')
    page = asked(studio, "GET", path(studio, "plan?stage=caption")).text
    assert re.search(r'<textarea [^>]*name="prompt"[^>]*>Describe it.\nIn one line.</textarea>', page)


@pytest.mark.parametrize(
    "name, typed, words",
    [
        ("optimizer_args", "betas=0.9,0.99, weight_decay=0.01", "is not a number, True, False, None or a tuple"),
        ("optimizer_args", "betas=0.9\n0.99", "0.99: write key=value"),
        ("network_args", "train_block_indices", "write KEY=VALUE"),
        ("network_args", "train_blocks=0,2-5", "unknown key (did you mean train_block_indices?)"),
        ("rank_rules", "attn=some", "write PATTERN=VALUE"),
        ("lr_rules", "attn", "write PATTERN=VALUE"),
        ("lr_scheduler_args", "steps=1", "step_rules=... belongs to piecewise_constant"),
    ],
)
def test_words_of_the_form_key_value_are_checked_before_they_are_saved(studio, project, name, typed, words):
    body = {"stage": "train", name: typed, "seed": "7"}
    answer = asked(studio, "POST", path(studio, "plan", "save"), json=body).json()
    assert set(answer["fields"]) == {name} and words in answer["fields"][name]
    assert not (project / "stages" / "train.toml").exists()


def test_what_another_window_changed_is_told_and_saved_over_only_when_asked_again(studio, project):
    address, file = path(studio, "plan", "save"), project / "stages" / "train.toml"
    body = {"stage": "train", "network_dim": "8", "was": {"network_dim": ""}}
    assert "reload" in asked(studio, "POST", address, json=body).json()
    body |= {"network_dim": "4", "seed": "7", "was": {"network_dim": "", "seed": ""}}
    told = asked(studio, "POST", address, json=body).json()
    assert set(told["fields"]) == {"network_dim"} and "changed elsewhere, to 8" in told["fields"]["network_dim"]
    assert "seed = 7" not in file.read_text() and told["was"] == {"network_dim": "8"}
    body["was"]["network_dim"] = "8"
    assert "reload" in asked(studio, "POST", address, json=body).json()
    assert "network_dim = 4" in file.read_text() and "seed = 7" in file.read_text()


def test_a_first_run_is_run_itself(studio):
    assert asked(studio, "POST", path(studio, "train", "start"), json={}).json() == {"reload": True}
    assert started(studio) == [("run",)]
    again = asked(studio, "POST", path(studio, "train", "start"), json={})
    assert again.status_code == 422 and "already" in again.json()["error"][0]


def test_going_on_names_the_run_so_that_nothing_begins_afresh(studio, project):
    with_checkpoint(project)
    asked(studio, "POST", path(studio, "train", "start"), json={})
    assert ("train", "--resume", str(project / "runs" / "cat")) in started(studio)


@pytest.mark.parametrize(
    "how, words",
    [("old", "--stale-ok"), ("new", "--allow-changes training_rows"), ("afresh", "--resume never")],
)
def test_after_a_change_it_asks_how_to_go_on(studio, project, monkeypatch, how, words):
    with_checkpoint(project)
    changed = staleness.SourceCheck("changed", ("pictures/a.txt was changed",))
    monkeypatch.setattr(train_view, "check_sources", lambda cache: changed)
    asked_back = asked(studio, "POST", path(studio, "train", "start"), json={}).json()
    assert "afresh" in asked_back["html"] and "a.txt was changed" in asked_back["html"] and not started(studio)
    asked(studio, "POST", path(studio, "train", "start"), json={"how": how})
    assert any(words in " ".join(command) for command in started(studio))
    assert any("encode-text" in command for command in started(studio)) == (how != "old")


def test_going_on_captions_new_pictures_where_the_project_has_a_captioner(studio, project):
    with_checkpoint(project)
    (project / "project.toml").write_text((project / "project.toml").read_text() + 'captioner = "blip"\n')
    asked(studio, "POST", path(studio, "train", "start"), json={"how": "new"})
    assert ("run", "caption", "encode-text", "encode-latents") in started(studio)


def test_a_refused_run_offers_the_ways_on(studio, project):
    with_checkpoint(project)
    asked(studio, "POST", path(studio, "train", "start"), json={})
    job = studio.queue.jobs()[0]
    Path(job.log).write_text("error: --resume runs/cat: this is another run: network_dim was 4, is 8\n")
    studio.queue.update(job.id, lambda job: replace(job, state="failed", exit_code=4, ended=1.0))
    page = asked(studio, "GET", path(studio, "train")).text
    assert "network_dim was 4, is 8" in page and "afresh: from step 0" in page and "all the same" not in page


def test_a_run_that_differs_goes_on_all_the_same_where_that_is_chosen(studio, project, monkeypatch):
    with_checkpoint(project)
    asked(studio, "POST", path(studio, "train", "start"), json={})
    job = studio.queue.jobs()[0]
    saved = SimpleNamespace(can_resume=True, state={"identity": {"total_steps": 4, "seed": 1, "network_dim": 8}})
    monkeypatch.setattr(run_folder, "newest_checkpoint", lambda place: saved)
    wanted = {"total_steps": 8, "seed": 2, "network_dim": 8}
    with pytest.raises(StaleError) as refused:
        run_folder.choose_start(project / "runs" / "cat", "runs/cat", wanted, total_steps=8)
    Path(job.log).write_text(f"error: {refused.value}\n")
    studio.queue.update(job.id, lambda job: replace(job, state="failed", exit_code=4, ended=1.0))
    assert "all the same" in asked(studio, "GET", path(studio, "train")).text
    asked(studio, "POST", path(studio, "train", "start"), json={})
    goes_on = ("train", "--resume", str(project / "runs" / "cat"))
    assert started(studio)[-2] == goes_on  # who has not chosen is refused again
    job = studio.queue.jobs()[-1]
    Path(job.log).write_text(f"error: {refused.value}\n")
    studio.queue.update(job.id, lambda job: replace(job, state="failed", exit_code=4, ended=1.0))
    asked(studio, "POST", path(studio, "train", "start"), json={"how": "differing"})
    assert started(studio)[-2] == (*goes_on, "--allow-changes", "seed,total_steps")


@pytest.mark.parametrize(
    "lines, stage",
    [
        ("", "starting"),
        ("$ sd3pipe encode-text --dataset dataset.toml\n", "encode-text"),
        (
            "$ sd3pipe encode-text --dataset dataset.toml\n$ sd3pipe encode-text --sample-prompts p.txt\n",
            "encode-prompts",
        ),
        ("$ sd3pipe encode-text --sample-prompts p.txt\n$ sd3pipe train\nt5xxl: 1/2 texts\n", "train"),
    ],
)
def test_a_stage_that_has_not_written_yet_is_named_by_the_log(studio, project, lines, stage):
    asked(studio, "POST", path(studio, "train", "start"), json={})
    job = studio.queue.jobs()[0]
    Path(job.log).write_text(lines)
    studio.queue.update(job.id, lambda job: replace(job, state="running"))
    assert f'<b class="state-working">{stage}</b>' in asked(studio, "GET", path(studio, "train")).text


def test_a_run_from_a_terminal_is_shown_and_can_be_stopped(studio, project):
    asked(studio, "POST", path(studio, "train", "start"), json={})  # waits for its turn meanwhile
    holder = run_at_a_terminal(project)
    page = asked(studio, "GET", path(studio, "train")).text
    assert "started at a terminal" in page and "host memory" in page
    assert "at a terminal" in asked(studio, "POST", path(studio, "train", "stop"), json={}).json()["message"]
    assert holder.wait(20) != 0
    assert [job.state for job in studio.queue.jobs()] == ["waiting"]
    assert "waiting in the queue" in asked(studio, "GET", path(studio, "train")).text
    assert asked(studio, "POST", path(studio, "train", "stop"), json={}).json()["message"] == "taken out of the queue"
    assert '<b class="state-stopped">stopped' in asked(studio, "GET", path(studio, "train")).text


def test_nothing_is_at_work_where_nothing_was_started(studio):
    assert "nothing is at work" in asked(studio, "GET", path(studio, "train")).text


def test_the_studio_starts_without_torch_numpy_and_pillow():
    code = "import sd3pipe.commands.studio, sd3pipe.studio.app, sd3pipe.studio.serving, sys; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"torch", "numpy", "PIL", "zarr", "transformers", "httpx", "websockets"}


def test_stopping_what_is_not_there_says_so(studio):
    assert "nothing is at work" in asked(studio, "POST", path(studio, "train", "stop"), json={}).json()["error"][0]


def test_samples_and_judges_scores_are_compared(studio, project):
    run = project / "runs" / "cat"
    for step in (0, 10):
        folder = run / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_picture(folder / "000.png", np.zeros((16, 16, 3), np.uint8), title="a <b>cat</b>")
    scores = dict.fromkeys((*SCORES, "likeness_held_out")) | {"likeness": Score(value=0.5, low=0.4, high=0.6)}
    at_ten = Scores(checkpoint=10, multiplier=0.8, close=False, drifts=False, **scores)
    text = Suggestion(checkpoint=10, multiplier=0.8, sure=0.5, told_apart=False, draws_needed=9, text="cannot tell")
    (run / JUDGE_FOLDER).mkdir()
    Judgement(
        judge_model="m", trigger="", tolerance=0.1, limits={}, draws=4, scores=(at_ten,), suggestion=text, remarks=(),
        drawn=(),
    ).save(run / JUDGE_FOLDER)  # fmt: skip
    page = asked(studio, "GET", path(studio, "compare")).text
    assert "<th>base</th><th>step 10</th>" in page and "a &lt;b&gt;cat" in page
    assert "0.5 (0.4 to 0.6)" in page and "cannot tell" in page and "step 10 x 0.8" in page
    standing = asked(studio, "GET", path(studio, "judgement?run=cat"))
    assert "cannot tell" in standing.text and standing.headers["x-content-type-options"] == "nosniff"
    policy = standing.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-") and "'self'" not in policy
    assert asked(studio, "GET", path(studio, "report?run=cat")).status_code == 422  # nothing was recorded


def test_what_is_missing_is_drawn_by_a_job(studio, project):
    with_checkpoint(project)
    body = {"checkpoints": "all", "strengths": "0.6,1"}
    assert asked(studio, "POST", path(studio, "compare", "draw"), json=body).status_code == 200
    assert started(studio)[0][0] == "sample" and started(studio)[0][-1] == "0.6,1"
    wrong = asked(studio, "POST", path(studio, "compare", "draw"), json={"strengths": "; rm -rf"})
    assert wrong.status_code == 422 and len(started(studio)) == 1


def test_a_judgement_is_a_job_whose_scores_this_page_shows(studio, project):
    with_checkpoint(project)
    nameless = asked(studio, "POST", path(studio, "compare", "judge"), json={"judge_model": " "})
    assert nameless.status_code == 422 and "a folder or a hub id" in nameless.json()["error"][0]
    assert asked(studio, "POST", path(studio, "compare", "judge"), json={"judge_model": "--x"}).status_code == 200
    out = str(project / "runs" / "cat" / JUDGE_FOLDER)
    assert started(studio) == [("judge", "--judge-model=--x", "--out", out)]


def test_captions_are_checked_by_a_job_whose_findings_the_pictures_show(studio, project):
    assert asked(studio, "POST", path(studio, "pictures", "check"), json={}).status_code == 200
    check = ("check-captions", "--out", str(project / "caption-check.json"))
    assert started(studio) == [("run", "encode-text", "encode-latents"), check]  # of the captions as they are now


def ended(studio, state, exit_code, log=""):
    """Ends the job that was put into the queue last."""
    job = studio.queue.jobs()[-1]
    Path(job.log).write_text(log)
    studio.queue.update(job.id, lambda job: replace(job, state=state, exit_code=exit_code, ended=time.time()))


def test_what_other_jobs_came_to_stands_on_their_pages_and_train_keeps_its_own(studio, project):
    with_checkpoint(project)
    asked(studio, "POST", path(studio, "train", "start"), json={})
    ended(studio, "failed", 4, "error: runs/cat: seed was 1: go on all the same with --allow-changes seed\n")
    asked(studio, "POST", path(studio, "compare", "judge"), json={"judge_model": "none"})
    ended(
        studio, "failed", 3, f"error: none: there is no such model\nerror: {ChildFailed('judge', 3, 'sd3pipe run')}\n"
    )
    asked(studio, "POST", path(studio, "pictures", "check"), json={})
    ended(studio, "failed", 3, "error: caches/text: torn\n")
    train = asked(studio, "GET", path(studio, "train")).text
    assert "seed was 1" in train and "all the same" in train and "torn" not in train
    for address in (path(studio, "compare"), "/queue"):
        page = asked(studio, "GET", address).text
        assert "none: there is no such model" in page and "goes on from there" not in page
    assert "caches/text: torn" in asked(studio, "GET", path(studio, "pictures")).text
    asked(studio, "POST", path(studio, "train", "start"), json={"how": "differing"})
    assert started(studio)[-2][-2:] == ("--allow-changes", "seed")


def test_a_job_at_work_is_named_by_the_command_it_is_at(studio, project):
    asked(studio, "POST", path(studio, "pictures", "check"), json={})
    job = studio.queue.jobs()[0]
    Path(job.log).write_text("$ sd3pipe encode-latents\n")
    studio.queue.update(job.id, lambda job: replace(job, state="running", at=1))
    assert '<b class="state-working">check-captions</b>' in asked(studio, "GET", path(studio, "train")).text
    assert '<b class="state-running">running</b> in the' in asked(studio, "GET", path(studio, "pictures")).text


def test_nothing_is_judged_or_drawn_before_there_is_a_checkpoint(studio, project):
    page = asked(studio, "GET", path(studio, "compare")).text
    assert page.count("<button disabled>Put into the queue") == 2 and "start the run" in page
    with_checkpoint(project)
    assert "disabled" not in asked(studio, "GET", path(studio, "compare")).text


@pytest.mark.parametrize(
    "report, words",
    [
        ({"exit_code": 0}, '<b class="state-done">done</b>'),
        ({"exit_code": 75, "error": "stopped"}, '<b class="state-stopped">stopped</b>'),
        ({"exit_code": 3, "error": "caches/text: torn"}, "caches/text: torn"),
    ],
)
def test_how_a_run_at_a_terminal_ended_is_said(studio, project, report, words):
    with_checkpoint(project)
    asked(studio, "POST", path(studio, "train", "start"), json={})
    ended(studio, "failed", 4, "error: an earlier one\n")
    run = project / "runs" / "cat"
    (run / "report.json").write_text(json.dumps({"stage": "train", **report}))
    page = asked(studio, "GET", path(studio, "train")).text
    assert words in page and "train, at a terminal" in page and "an earlier one" not in page
    assert "How to go on" not in page
    os.utime(run / "report.json", (1, 1))  # of a run before that job
    assert "an earlier one" in asked(studio, "GET", path(studio, "train")).text


def test_a_failed_export_shows_the_commands_own_line(studio, project, monkeypatch):
    with_checkpoint(project)
    told = []
    monkeypatch.setattr(
        "sd3pipe.studio.app.run_captured", lambda words, folder: told.append(words) or (3, "error: torn\n")
    )
    body = {"checkpoint": "10", "format": "diffusers"}
    answer = asked(studio, "POST", path(studio, "compare", "use"), json=body)
    assert answer.status_code == 422 and answer.json()["error"] == ["torn"]
    assert told[0][-1] == str(project / "exports" / "cat-step00000010-diffusers.safetensors")
    for wrong in ({"checkpoint": "../x"}, {"checkpoint": "final"}, {"format": "exe"}, {"strength": "0.6; x"}):
        assert asked(studio, "POST", path(studio, "compare", "use"), json={**body, **wrong}).status_code == 422
    assert len(told) == 1
    asked(studio, "POST", path(studio, "compare", "use"), json={**body, "strength": "0.6"})
    assert "--multiplier=0.6" in told[1] and told[1][-1].endswith("cat-step00000010-x0.6-diffusers.safetensors")


@pytest.mark.long
def test_begin_makes_a_project_from_a_command_of_sd_scripts(tmp_path, project):
    studio = studio_of(tmp_path)
    assert "With your pictures and a model" in asked(studio, "GET", "/").text
    text = (
        f"accelerate launch sd3_train_network.py --pretrained_model_name_or_path m.safetensors "
        f"--dataset_config '{project / 'dataset.toml'}' --output_dir out --output_name cat --network_dim 8"
    )
    body = {"folder": str(tmp_path / "new"), "text": text, "name": "train.sh", "base": str(tmp_path)}
    answer = asked(studio, "POST", "/begin/from-kohya", json=body)
    assert answer.status_code == 200, answer.text
    assert (tmp_path / "new" / "project.toml").is_file()
    assert asked(studio, "GET", answer.json()["location"].replace("pictures", "plan")).status_code == 200
    assert studio.queue.projects() == [tmp_path / "new"]


def test_begin_shows_inits_own_errors_and_opens_what_is_there(tmp_path, project):
    studio = studio_of(tmp_path)
    body = {"folder": str(tmp_path / "new"), "model": str(tmp_path / "none.safetensors"), "images": str(project)}
    answer = asked(studio, "POST", "/begin/init", json=body)
    assert set(answer.json()["fields"]) == {"model"} and "no such file" in answer.json()["fields"]["model"]
    body["model"] = body["images"] = str(tmp_path / "none")  # the value is that of two fields
    assert set(asked(studio, "POST", "/begin/init", json=body).json()["fields"]) == {"images"}
    body |= {
        "images": str(project),
        "model": str(project / "pictures" / "a.png"),
        "vram": "lots",
        "loras_dir": str(tmp_path / "none"),
    }
    answer = asked(studio, "POST", "/begin/init", json=body)
    assert answer.json()["fields"]["vram"] == "vram lots: write a size such as 12GB or 24GiB"
    assert asked(studio, "POST", "/begin/init", json={"folder": "relative"}).status_code == 422
    assert asked(studio, "POST", "/begin/init", json={"folder": str(project)}).json()["location"].startswith("/p/cats-")


@pytest.mark.parametrize(
    "address, field, typed, words",
    [
        ("/begin/from-kohya", "base", "{tmp}/typo", "base = {tmp}/typo: there is no such folder"),
        ("/begin/from-kohya", "base", "{tmp}/file", "base = {tmp}/file: is a file, not a folder"),
        ("/begin/from-kohya", "base", "~nobody.here/x", "base = ~nobody.here/x: there is no user of this name"),
        ("/begin/from-kohya", "base", "typo", "base = typo: write the whole path"),
        ("/begin/from-kohya", "folder", "~nobody.here/x", "folder = ~nobody.here/x: there is no user of this name"),
        ("/begin/init", "folder", "~nobody.here/x", "folder = ~nobody.here/x: there is no user of this name"),
        ("/begin/init", "folder", "", "folder: say where"),
        ("/begin/init", "model", "~nobody.here/x", "model = ~nobody.here/x: there is no user of this name"),
    ],
)
def test_begin_says_at_the_field_which_folder_cannot_be_used(tmp_path, address, field, typed, words):
    (tmp_path / "file").write_text("")
    body = {"folder": str(tmp_path / "new"), "text": "accelerate launch sd3_train_network.py"}
    body[field] = typed.format(tmp=tmp_path)
    answer = asked(studio_of(tmp_path), "POST", address, json=body)
    assert answer.status_code == 422 and set(answer.json()["fields"]) == {field}
    assert answer.json()["fields"][field].startswith(words.format(tmp=tmp_path))
    form = (
        asked(studio_of(tmp_path), "GET", "/begin").text.partition(f'data-post="{address}"')[2].partition("</form>")[0]
    )
    assert f'data-errors="{field}"' in form


def test_begin_refuses_a_name_that_no_file_system_takes(tmp_path):
    answer = asked(studio_of(tmp_path), "POST", "/begin/init", json={"folder": str(tmp_path / ("x" * 300))})
    assert answer.status_code == 422 and "the name is too long" in answer.json()["error"][0]


def test_a_broken_project_file_is_told_on_its_page(studio, project):
    (project / "project.toml").write_text("[paths\n")
    answer = asked(studio, "GET", path(studio, "train"))
    assert answer.status_code == 422 and "project.toml" in answer.text


def test_an_unknown_address_has_the_frame_and_a_way_home(studio):
    unknown = (("/nonsense", 404), (path(studio, "nonsense"), 404), ("/begin/init", 404), ("/p/nobody/train", 422))
    for address, status in unknown:
        answer = asked(studio, "GET", address)
        assert answer.status_code == status and 'href="/">To the first page' in answer.text
        assert "/p/nobody" not in answer.text.replace("/p/nobody/train: ", "")
    assert asked(studio, "GET", path(studio, "nonsense"), token="").status_code == 403


def test_ranges_and_choices_come_from_the_option_sets(studio, project):
    fields = {field.name: field for panel in stage_form(read(studio), "train").values() for field in panel}
    assert fields["network_dim"].range == "at least 1" and fields["network_dim"].default == "16"
    assert "dora" in fields["adapter_type"].words and not fields["blocks_to_swap"].words


def read(studio):
    return studio.projects.read(studio.projects.listed()[0]["slug"])
