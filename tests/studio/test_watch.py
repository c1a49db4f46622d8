"""Watching a run: curves by what was added, no point missed or taken twice, all extremes after thinning."""

import asyncio
import json
import math

import pytest

pytest.importorskip("starlette", reason="the studio's extra is not installed")

from support.studios import asked, studio_of, write_project

from sd3pipe.cache.folder import apart_folder
from sd3pipe.config import read_project
from sd3pipe.studio.runs import RunView


def line(step, loss=0.5):
    return json.dumps({"kind": "step", "step": step, "loss": loss, "loss_mean": loss, "seconds": 0.1}) + "\n"


def write_run(run, steps, loss=lambda step: 1 / step):
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(line(step, loss(step)) for step in range(1, steps + 1)))


def test_only_what_was_added_is_read_and_a_half_line_waits(tmp_path):
    write_run(tmp_path, 3)
    run = RunView(tmp_path)
    run.read()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line(4)[:20])
        file.flush()
        run.read()
        assert len(run.curves) == 3
        file.write(line(4)[20:] + "damaged\n" + line(5))
    run.read()
    assert [row[0] for row in run.curves.points()] == [1, 2, 3, 4, 5] and run.curves.generation == 0


def test_a_file_that_begins_anew_makes_the_rest_void(tmp_path):
    write_run(tmp_path, 9)
    run = RunView(tmp_path)
    run.read()
    (tmp_path / "metrics.jsonl").unlink()
    write_run(tmp_path, 2)
    run.read()
    assert len(run.curves) == 2 and run.curves.generation == 1


def test_a_run_that_writes_apart_is_watched_there_until_it_takes_its_place(tmp_path):
    place = tmp_path / "cat"
    write_run(place, 9)
    write_run(apart_folder(place), 2)
    run = RunView(place)
    run.read()
    assert len(run.curves) == 2
    place.rename(tmp_path / "cat.1")
    apart_folder(place).rename(place)
    run.read()
    assert len(run.curves) == 2 and run.folder == place


def test_a_run_that_project_toml_names_since_is_the_one_that_is_shown(tmp_path):
    project = write_project(tmp_path / "cats", {"a": "cat"})
    write_run(project / "runs" / "cat", 9)
    write_run(project / "runs" / "dog", 2)
    studio = studio_of(tmp_path, project)
    slug = studio.projects.listed()[0]["slug"]
    assert asked(studio, "GET", f"/p/{slug}/train/curves").json()["rows"] == 9
    text = (project / "project.toml").read_text()
    (project / "project.toml").write_text(text.replace("runs/cat", "runs/dog"))
    assert asked(studio, "GET", f"/p/{slug}/train/curves").json()["rows"] == 2
    assert 'data-when="rest"' in asked(studio, "GET", f"/p/{slug}/train").text


def test_an_error_of_the_status_is_told_as_text(tmp_path):
    project = write_project(tmp_path / "<b>cats", {"a": "cat"})
    studio = studio_of(tmp_path / "<b>state", project)
    studio.queue.folder.mkdir(parents=True)
    watch = studio.watches.of(read_project(project), "")
    (studio.queue.folder / "queue.json").write_text("{")
    told = watch._news(with_status=True).decode()
    assert "&lt;b&gt;state" in told and "<b>" not in told


def test_thinning_keeps_first_last_and_every_extreme(tmp_path):
    write_run(tmp_path, 20_000, loss=lambda step: 9.0 if step == 7_777 else math.sin(step) + (-9 if step == 123 else 0))
    run = RunView(tmp_path)
    run.read()
    points = run.curves.points(most=1200)
    steps, losses = [row[0] for row in points], [row[1] for row in points]
    assert len(points) <= 1201 and steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (1, 20_000)
    assert max(losses) == 9.0 and 7_777 in steps and 123 in steps


def test_a_loss_that_is_no_number_becomes_a_gap(tmp_path):
    write_run(tmp_path, 3, loss=lambda step: math.nan if step == 2 else 1.0)
    run = RunView(tmp_path)
    run.read()
    assert [row[1] for row in run.curves.points()] == [1.0, None, 1.0]


def events(text: bytes) -> list[tuple[str, object]]:
    found = []
    for block in text.decode().strip().split("\n\n"):
        fields = dict(part.split(": ", 1) for part in block.split("\n") if not part.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


@pytest.mark.long
@pytest.mark.parametrize("watchers", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_no_watcher_misses_a_point_or_takes_one_twice(tmp_path, watchers):
    project = write_project(tmp_path / "cats", {"a": "cat"})
    write_run(project / "runs" / "cat", 5)
    studio = studio_of(tmp_path, project)

    async def watch(delay: float) -> list[float]:
        await asyncio.sleep(delay)
        stream = studio.watches.of(read_project(project), "")
        have, steps = 0, []
        async for part in stream.stream("0:0").body_iterator:
            for kind, value in events(part):
                if kind == "points":
                    fresh = value["points"][max(0, have - value["from"]) :]
                    have += len(fresh)
                    steps += [row[0] for row in fresh]
            if steps and steps[-1] == 60:
                return steps
        return steps

    async def write() -> None:
        for step in range(6, 61):
            with (project / "runs" / "cat" / "metrics.jsonl").open("a") as file:
                file.write(line(step))
            if step % 7 == 0:
                asked_for = studio.watches.of(read_project(project), "").run
                await asyncio.to_thread(asked_for.read)  # as a page that is loaded meanwhile does
            await asyncio.sleep(0.03)

    async def all_of_it() -> list[list[float]]:
        studio.watches.of(read_project(project), "").run.read()
        seen = await asyncio.gather(write(), *(watch(number * 0.2) for number in range(watchers)))
        return [steps for steps in seen if steps]

    seen = asyncio.run(asyncio.wait_for(all_of_it(), 60))
    assert len(seen) == watchers and all(steps == list(range(1, 61)) for steps in seen)


def test_a_page_shows_the_run_and_its_curves(tmp_path):
    project = write_project(tmp_path / "cats", {"a": "cat"})
    write_run(project / "runs" / "cat", 40)
    studio = studio_of(tmp_path, project)
    slug = studio.projects.listed()[0]["slug"]
    assert "nothing is at work" in asked(studio, "GET", f"/p/{slug}/train").text
    curves = asked(studio, "GET", f"/p/{slug}/train/curves").json()
    assert curves["rows"] == 40 and curves["mark"] == "0:40" and curves["points"][0][:2] == [1.0, 1.0]
    assert asked(studio, "GET", f"/p/{slug}/train?run=..").status_code == 422


def test_a_file_that_is_linked_out_of_a_run_is_not_shown(tmp_path):
    from sd3pipe.diffusion.picture_grid import save_picture

    np = pytest.importorskip("numpy")
    project = write_project(tmp_path / "cats", {"a": "cat"})
    write_run(project / "runs" / "cat", 3)
    folder = project / "runs" / "cat" / "samples" / "step-00000003"
    folder.mkdir(parents=True)
    save_picture(folder / "000.png", np.zeros((16, 16, 3), np.uint8), title="a cat")
    save_picture(tmp_path / "secret.png", np.zeros((16, 16, 3), np.uint8))
    (folder / "001.png").symlink_to(tmp_path / "secret.png")
    studio = studio_of(tmp_path, project)
    sample = f"/p/{studio.projects.listed()[0]['slug']}/sample"
    assert asked(studio, "GET", f"{sample}/samples/step-00000003/000.png").headers["content-type"] == "image/png"
    for path in ("samples/step-00000003/001.png", "..%2F..%2Fproject.toml", "metrics.jsonl", "%2Fetc%2Fpasswd"):
        assert asked(studio, "GET", f"{sample}/{path}").status_code == 422, path
