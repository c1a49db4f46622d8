"""Pictures: captions are saved where they came from, nothing from elsewhere is overwritten, all can be undone."""

import json
import os
import re
import time

import pytest

pytest.importorskip("starlette", reason="the studio's extra is not installed")

from PIL import Image, ImageFilter
from support.containers import folder_content, write_parquet, write_tar
from support.studios import asked, studio_of, write_project

from sd3pipe.caption_findings import CaptionFindings, CheckedPicture
from sd3pipe.config import read_project
from sd3pipe.data.scan import scan
from sd3pipe.demo.project import write_files
from sd3pipe.errors import NetworkError, StaleError
from sd3pipe.fingerprint import hash_json
from sd3pipe.judgement import Score
from sd3pipe.studio import gallery
from sd3pipe.studio.captions import save_captions
from sd3pipe.studio.gallery import read_gallery
from sd3pipe.studio.views import pictures
from sd3pipe.tensors import hash as tensors_hash

CAPTIONS = {"a": "cat, sofa", "b": "cat, window", "c": "", "d": "<script>alert(1)</script> & dog"}
HOSTILE = '<img src=x onerror="document.title=1">'


@pytest.fixture
def project(tmp_path):
    return write_project(tmp_path / "cats", CAPTIONS)


@pytest.fixture
def studio(tmp_path, project):
    return studio_of(tmp_path, project)


def base(studio) -> str:
    return f"/p/{studio.projects.listed()[0]['slug']}/pictures"


def entries(project):
    return {entry.name[:-4]: entry for entry in entries_in_order(project)}


def entries_in_order(project):
    return read_gallery(read_project(project), may_write=False).entries


def save(studio, entry, text, was=None):
    body = {"key": entry.key, "was": entry.was if was is None else was, "text": text}
    return asked(studio, "POST", f"{base(studio)}/caption", json=body)


def test_a_page_shows_each_picture_with_its_facts_escaped(studio):
    page = asked(studio, "GET", base(studio)).text
    assert page.count('<figure class="card"') == 4
    assert "96 x 96, reduced to 67%" in page and "no caption" in page
    assert "&lt;script&gt;alert(1)" in page and "<script>alert" not in page
    assert "photo of cat, sofa" in page  # what is encoded stands apart from the file's text


def test_a_caption_that_is_not_utf8_hides_no_other_picture(studio, project):
    (project / "pictures" / "b.txt").write_bytes("käse".encode("latin-1"))
    page = asked(studio, "GET", base(studio)).text
    assert page.count('<figure class="card"') == 3
    assert "Nothing is encoded while this stands" in page
    assert "b.png: left out: " in page and "b.txt: the caption is not UTF-8 text (byte 1): save it as UTF-8" in page
    assert "not UTF-8" in asked(studio, "GET", f"{base(studio)}/rows").json()["message"]
    assert "undo" in save(studio, entries(project)["a"], "cat, bed").json()
    for name in CAPTIONS:
        (project / "pictures" / f"{name}.txt").write_bytes(b"\xff")
    assert asked(studio, "GET", base(studio)).status_code == 422  # nothing is left to show


def write_findings(project, names, suspect):
    said = {"subset": "pictures", "held_out": False, "advantage": Score(value=0.0)}
    found = tuple(CheckedPicture(name=name, suspect=name == suspect, changes_nothing=False, **said) for name in names)
    findings = CaptionFindings(pictures=found, suspects=(f"pictures/{suspect}",), change_nothing=(), checkpoints=())
    findings.save(project / "caption-check.json")


def test_pictures_that_check_captions_named_are_found_until_their_captions_change(studio, project):
    write_findings(project, [f"{name}.png" for name in CAPTIONS], "b.png")
    filtered = f"{base(studio)}?warning=check-captions"
    page = asked(studio, "GET", filtered).text
    assert page.count('<figure class="card"') == 1 and "no better than others" in page
    save(studio, entries(project)["b"], "cat, door")
    assert '<figure class="card"' not in asked(studio, "GET", filtered).text


@pytest.mark.parametrize("write, ending", [(write_tar, "tar"), (write_parquet, "parquet")])
def test_a_picture_in_a_file_of_several_is_named_until_that_file_changes(tmp_path, write, ending):
    dataset = f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nname = "pictures"\nimage_dir = "all.{ending}"\n'
    project = write_project(tmp_path / "cats", {"a": "cat", "b": "dog"}, dataset=dataset)
    file = write(project / f"all.{ending}", folder_content(project / "pictures"))
    name = entries_in_order(project)[1].name
    write_findings(project, [name], name)
    studio = studio_of(tmp_path, project)
    page = asked(studio, "GET", f"{base(studio)}?warning=check-captions").text
    assert page.count('<figure class="card"') == 1 and "no better than others" in page
    os.utime(file, ns=(2**62, 2**62))
    assert not entries_in_order(project)[1].findings


def test_without_the_hub_tokens_alone_are_missing(studio, monkeypatch):
    def refused(**_):
        raise NetworkError("stabilityai/stable-diffusion-3.5-medium: is gated")

    monkeypatch.setattr("sd3pipe.previewing.token_counts.find_tokenizers", refused)
    monkeypatch.setattr("sd3pipe.studio.gallery._tokens", {})
    assert asked(studio, "GET", base(studio)).text.count('<figure class="card"') == 4
    assert "/pictures/thumb/" in asked(studio, "GET", base(studio).replace("pictures", "compare")).text


def test_a_hostile_name_is_text(tmp_path):
    project = write_project(tmp_path / "cats", {HOSTILE.replace("/", ""): HOSTILE})
    page = asked(studio_of(tmp_path, project), "GET", base(studio_of(tmp_path, project))).text
    assert "<img src=x" not in page and "&lt;img src=x" in page


def test_a_caption_is_saved_to_its_file_and_undone(studio, project):
    answer = save(studio, entries(project)["a"], "cat, bed").json()
    assert (project / "pictures" / "a.txt").read_text() == "cat, bed\n"
    assert "cat, bed" in answer["html"] and answer["undo"] == "the caption of a.png"
    assert "undone" in asked(studio, "POST", f"{base(studio)}/undo", json={}).json()["message"]
    assert (project / "pictures" / "a.txt").read_text() == "cat, sofa"


def test_undo_works_after_a_restart_and_removes_what_was_new(tmp_path, studio, project):
    save(studio, entries(project)["c"], "a first caption")
    assert (project / "pictures" / "c.txt").read_text() == "a first caption\n"
    asked(studio_of(tmp_path, project), "POST", f"{base(studio)}/undo", json={})
    assert not (project / "pictures" / "c.txt").exists()


def undo_steps(project):
    return sorted((project / "caches" / ".sd3pipe" / "studio" / "undo").glob("*.json"))


def undo(studio):
    return asked(studio, "POST", f"{base(studio)}/undo", json={})


def test_undo_finds_its_files_from_another_folder_and_in_a_moved_project(tmp_path, studio, project, monkeypatch):
    monkeypatch.chdir(project)
    save(studio, entries(project)["a"], "cat, bed")
    save(studio, entries(project)["b"], "cat, door")
    monkeypatch.chdir(tmp_path)
    assert undo(studio_of(tmp_path, project)).status_code == 200
    assert (project / "pictures" / "b.txt").read_text() == "cat, window"
    moved = project.rename(tmp_path / "moved")
    assert undo(studio_of(tmp_path, moved)).status_code == 200
    assert (moved / "pictures" / "a.txt").read_text() == "cat, sofa"


@pytest.mark.parametrize("damaged", ["", '{"format": 1, "what": "other", "files": []}'])
def test_an_undo_step_that_cannot_be_read_blocks_no_other(studio, project, damaged):
    for name in "ab":
        save(studio, entries(project)[name], "mine")
    newest = undo_steps(project)[-1]
    newest.write_text(damaged)
    assert "Undo <span>the caption of a.png</span>" in asked(studio, "GET", base(studio)).text
    assert undo(studio).json()["message"] == "undone: the caption of a.png, 1 file"
    assert (project / "pictures" / "a.txt").read_text() == "cat, sofa"


def test_a_change_that_was_cut_short_is_undone(studio, project):
    body = {"operation": "add", "tag": "night", "keys": [entry.key for entry in entries(project).values()]}
    was = asked(studio, "POST", f"{base(studio)}/tags", json=body).json()["was"]
    asked(studio, "POST", f"{base(studio)}/tags", json={**body, "apply": True, "was": was})
    (project / "pictures" / "b.txt").write_text("cat, window")  # as if the disk had been full before it was written
    (project / "pictures" / "c.txt").unlink()
    assert undo(studio).status_code == 200
    assert (project / "pictures" / "a.txt").read_text() == "cat, sofa"
    assert not (project / "pictures" / "c.txt").exists()


def write_captions(project, **captions):
    """Writes lists as `caption` leaves them, for a.png and b.png."""
    hashes = {name: entry.item.picture.image_hash for name, entry in entries(project).items()}
    for cache, words in captions.items():
        (project / "caches" / cache).mkdir(parents=True, exist_ok=True)
        lines = [{"image": hashes[name], "subset": "pictures", "caption": f"{words} {name}"} for name in ("a", "b")]
        (project / "caches" / cache / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_captions_of_two_models_stand_in_columns_to_choose_from(studio, project):
    write_captions(project, captions="a <b>sentence</b> about", tags="tags, of")
    page = asked(studio, "GET", base(studio)).text
    assert page.count('class="suggested"') == 2 and page.count('class="take"') == 4
    assert page.index("<small>captions</small>") < page.index("<small>tags</small>")
    assert "a &lt;b&gt;sentence&lt;/b&gt; about a" in page
    taken = save(studio, entries(project)["a"], "tags, of a").json()
    assert (project / "pictures" / "a.txt").read_text() == "tags, of a\n"
    assert taken["html"].count('aria-pressed="true"') == 1 and taken["undo"] == "the caption of a.png"
    write_captions(project, captions="another about", tags="tags, of")
    assert entries(project)["a"].suggested == {"captions": "another about a", "tags": "tags, of a"}


def test_a_lone_caption_that_is_the_pictures_own_is_not_shown_twice(studio, project):
    write_captions(project, captions="words of")
    save(studio, entries(project)["a"], "words of a")
    found = entries(project)
    assert not found["a"].suggested and found["b"].suggested and not found["c"].suggested
    (project / "caches" / "captions" / "captions.jsonl").write_text("no list")
    assert asked(studio, "GET", base(studio)).text.count("suggested") == 0


def test_near_duplicates_and_blur_are_looked_for_beside_the_page(tmp_path, studio, project):
    noise = Image.effect_noise((128, 128), 90).convert("RGB")
    noise.save(project / "pictures" / "e.png")
    noise.save(project / "pictures" / "f.jpg", quality=80)
    noise.filter(ImageFilter.GaussianBlur(9)).save(project / "pictures" / "g.png")
    page = asked(studio, "GET", base(studio)).text
    assert "7 pictures not yet looked at for near-duplicates and blur" in page
    until = time.monotonic() + 60
    while "not yet looked at" in page and time.monotonic() < until:
        time.sleep(0.2)
        page = asked(studio, "GET", base(studio)).text
    assert "nearly the same as another" in page and "not yet looked at" not in page
    shown = asked(studio, "GET", f"{base(studio)}?warning=nearly+the+same").text
    assert shown.count('<figure class="card"') == 2 and "nearly the same as pictures/e.png" in shown
    shown = asked(studio, "GET", f"{base(studio)}?warning=blurred").text
    assert "blurred everywhere" in shown and 'alt="g.png"' in shown and 'alt="e.png"' not in shown


def test_an_edit_from_elsewhere_is_noticed_and_kept(studio, project):
    entry = entries(project)["a"]
    (project / "pictures" / "a.txt").write_text("edited elsewhere")
    answer = save(studio, entry, "mine").json()
    assert answer["conflict"] == "mine" and "edited elsewhere" in answer["html"]
    assert (project / "pictures" / "a.txt").read_text() == "edited elsewhere"


def test_an_edit_from_elsewhere_after_the_pictures_were_listed_is_kept(studio, project, monkeypatch):
    def listed_and_then_edited(*args, **more):
        found = read_gallery(*args, **more)
        (project / "pictures" / "a.txt").write_text("edited elsewhere")
        return found

    entry = entries(project)["a"]
    monkeypatch.setattr(pictures, "read_gallery", listed_and_then_edited)
    answer = save(studio, entry, "mine").json()
    assert (project / "pictures" / "a.txt").read_text() == "edited elsewhere"
    assert answer["conflict"] == "mine" and "edited elsewhere" in answer["html"]


@pytest.mark.parametrize("missing", [False, True])
def test_a_selection_is_not_written_over_what_came_in_between(project, missing):
    edits = [(entry, entry.was, "mine") for entry in entries(project).values()]
    file = project / "pictures" / "b.txt"
    file.unlink() if missing else file.write_text("edited elsewhere")
    with pytest.raises(StaleError, match=r"b\.png: changed elsewhere"):
        save_captions(read_project(project), edits, "all")
    assert (project / "pictures" / "a.txt").read_text() == "cat, sofa"


def test_undo_overwrites_nothing_from_elsewhere(studio, project):
    save(studio, entries(project)["a"], "mine")
    (project / "pictures" / "a.txt").write_text("edited elsewhere")
    answer = asked(studio, "POST", f"{base(studio)}/undo", json={})
    assert answer.status_code == 422 and "a.txt" in answer.json()["error"][0]
    assert (project / "pictures" / "a.txt").read_text() == "edited elsewhere"


def test_a_caption_behind_a_link_that_leads_out_is_not_written(studio, project, tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    (project / "pictures" / "a.txt").unlink()
    (project / "pictures" / "a.txt").symlink_to(outside)
    answer = save(studio, entries(project)["a"], "mine")
    assert answer.status_code == 422 and "leads outside" in answer.json()["error"][0]
    assert outside.read_text() == "secret"


def test_tags_of_a_selection_are_shown_changed_and_undone(studio, project):
    keys = [entry.key for entry in entries(project).values()]
    body = {"operation": "replace", "tag": "cat", "other": "tiger", "keys": keys}
    shown = asked(studio, "POST", f"{base(studio)}/tags", json=body).json()
    assert shown["count"] == 2 and "tiger, sofa" in shown["html"]
    assert (project / "pictures" / "a.txt").read_text() == "cat, sofa"
    saved = asked(studio, "POST", f"{base(studio)}/tags", json={**body, "apply": True, "was": shown["was"]}).json()
    assert saved["saved"] == 2
    assert (project / "pictures" / "b.txt").read_text() == "tiger, window\n"
    asked(studio, "POST", f"{base(studio)}/undo", json={})
    assert [(project / "pictures" / f"{name}.txt").read_text() for name in "ab"] == ["cat, sofa", "cat, window"]


def test_tags_change_nothing_if_one_caption_changed_since_they_were_shown(studio, project):
    keys = [entry.key for entry in entries(project).values()]
    body = {"operation": "add", "tag": "night", "keys": keys}
    was = asked(studio, "POST", f"{base(studio)}/tags", json=body).json()["was"]
    (project / "pictures" / "b.txt").write_text("other")
    answer = asked(studio, "POST", f"{base(studio)}/tags", json={**body, "apply": True, "was": was})
    assert answer.status_code == 422 and "b.png" in answer.json()["error"][0]
    assert (project / "pictures" / "a.txt").read_text() == "cat, sofa"


@pytest.mark.parametrize(
    "query, names",
    [
        ("", "abcd"), ("words=cat", "ab"), ("words=CAT+sofa", "a"), ("warning=no+caption", "c"), ("warning=any", "c"),
        ("bucket=64+x+64", "abcd"), ("bucket=32+x+96", ""), ("subset=pictures&sort=caption", "cdab"),
    ],
)  # fmt: skip
def test_filters(studio, query, names):
    page = asked(studio, "GET", f"{base(studio)}?{query}").text
    assert "".join(re.findall(r"<b>(\w)\.png</b>", page)) == names


def test_where_nothing_is_as_asked_for_the_page_says_so(studio):
    assert "No picture is as asked for" in asked(studio, "GET", f"{base(studio)}?words=zebra").text
    assert "No picture is as asked for" not in asked(studio, "GET", base(studio)).text


def test_more_pictures_come_in_parts(tmp_path):
    studio = studio_of(tmp_path, write_project(tmp_path / "many", {f"{n:03d}": f"tag {n}" for n in range(130)}))
    page = asked(studio, "GET", base(studio)).text
    seen, following = re.findall(r"<b>(\d+)\.png", page), re.search(r'data-more="([^"]+)"', page)
    while following:
        part = asked(studio, "GET", following[1].replace("&amp;", "&")).text
        seen += re.findall(r"<b>(\d+)\.png", part)
        following = re.search(r'data-more="([^"]+)"', part)
    assert seen == [f"{n:03d}" for n in range(130)]


def test_the_parts_of_a_page_do_not_look_through_the_dataset_again(tmp_path, monkeypatch):
    project = write_project(tmp_path / "many", {f"{n:03d}": f"tag {n}" for n in range(70)})
    studio, scans = studio_of(tmp_path, project), []
    monkeypatch.setattr(gallery, "scan", lambda *args, **more: scans.append(args) or scan(*args, **more))
    following = re.search(r'data-more="([^"]+)"', asked(studio, "GET", base(studio)).text)
    while following:
        following = re.search(r'data-more="([^"]+)"', asked(studio, "GET", following[1].replace("&amp;", "&")).text)
    assert asked(studio, "GET", f"{base(studio)}/rows").json()["rows"] == 71  # and the empty caption
    assert len(scans) == 1
    asked(studio, "GET", base(studio))
    assert len(scans) == 2


@pytest.mark.long
def test_weights_are_read_once_to_count_rows(tmp_path, monkeypatch):
    for file, data in write_files(tmp_path / "star", steps=6).items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    cache = tmp_path / "star" / "caches" / "text"
    cache.mkdir(parents=True)
    (cache / "manifest.json").write_text("{}")  # is looked into when the weights are known
    hashed = []
    monkeypatch.setattr(tensors_hash, "_hash", lambda tensors: hashed.append(tensors) or hash_json(list(tensors)))
    for read_only, times in ((True, 1), (True, 1), (False, 2), (False, 2)):
        studio = studio_of(tmp_path, tmp_path / "star", read_only=read_only)
        assert "manifest.json" in asked(studio, "GET", f"{base(studio)}/rows").json()["message"]
        assert len(hashed) == 3 * times  # CLIP-L, CLIP-G and T5
        assert (cache.parent / ".sd3pipe" / "weights.json").is_file() != read_only


def test_a_thumbnail_is_made_once_and_kept_by_content(studio, project):
    entry = entries(project)["a"]
    address = f"{base(studio)}/thumb/{entry.key}-{entry.content}"
    first = asked(studio, "GET", address)
    assert first.content.startswith(b"\xff\xd8") and "immutable" in first.headers["cache-control"]
    (project / "pictures" / "a.png").unlink()
    assert asked(studio, "GET", address).content == first.content
    assert asked(studio, "GET", f"{base(studio)}/thumb/../../project.toml").status_code in (404, 422)


def with_metadata(folder, file, text, subset=""):
    """Writes a project of two pictures whose captions stand in a metadata file."""
    head = f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir="pictures"\nmetadata_file="{file}"\n'
    project = write_project(folder, {"a": "", "b": ""}, dataset=head + subset)
    (project / file).write_text(text)
    return project


METADATA = {
    "json": json.dumps({"a.png": {"caption": "cat"}, "b.png": {"caption": "dog"}}),
    "jsonl": '{"file_name": "a.png", "text": "cat"}\n{"file_name": "b.png", "text": "dog"}\n',
    "csv": "file_name,text,by\na.png,cat,me\nb.png,dog,you\n",
}


@pytest.mark.parametrize("form", METADATA)
def test_a_caption_in_a_metadata_file_is_edited_there(tmp_path, form):
    project = with_metadata(tmp_path / "cats", f"meta.{form}", METADATA[form])
    studio = studio_of(tmp_path, project)
    assert save(studio, entries(project)["a"], 'cat, "big"').status_code == 200
    assert {name: entry.caption for name, entry in entries(project).items()} == {"a": 'cat, "big"', "b": "dog"}
    undo(studio)
    assert (project / f"meta.{form}").read_text() == METADATA[form]


@pytest.mark.parametrize("form", METADATA)
def test_another_caption_in_a_metadata_file_is_not_overwritten(tmp_path, form):
    project = with_metadata(tmp_path / "cats", f"meta.{form}", METADATA[form])
    before = entries(project)
    (project / f"meta.{form}").write_text(changed := METADATA[form].replace("cat", "tiger"))
    with pytest.raises(StaleError, match=r"^a\.png: changed elsewhere"):
        save_captions(read_project(project), [(entry, entry.was, "mine") for entry in before.values()], "all")
    assert (project / f"meta.{form}").read_text() == changed
    save_captions(read_project(project), [(before["b"], before["b"].was, "mine")], "one")  # the file's other record
    assert {name: entry.caption for name, entry in entries(project).items()} == {"a": "tiger", "b": "mine"}


def test_of_a_large_metadata_file_an_undo_step_keeps_what_changed(tmp_path):
    text = METADATA["jsonl"].replace('"dog"', '"dog", "about": "' + "x" * 8_500_000 + '"')
    project = with_metadata(tmp_path / "cats", "meta.jsonl", text)
    studio = studio_of(tmp_path, project)
    assert save(studio, entries(project)["a"], "cat, bed").json()["undo"] == "the caption of a.png"
    assert [file.stat().st_size < 2000 for file in undo_steps(project)] == [True]
    assert undo(studio).status_code == 200
    assert (project / "meta.jsonl").read_text() == text


def test_a_metadata_files_empty_caption_is_none_and_can_be_written(tmp_path):
    text = '{"file_name": "a.png", "text": ""}\n{"file_name": "b.png", "text": "dog"}\n'
    project = with_metadata(tmp_path / "cats", "meta.jsonl", text, 'class_tokens = "animal"\n')
    entry = entries(project)["a"]
    assert entry.caption == "" and "no caption of its own" in entry.warnings
    assert "conflict" not in save(studio_of(tmp_path, project), entry, "cat").json()
    assert entries(project)["a"].caption == "cat"


def test_read_only_writes_not_even_a_thumbnail(tmp_path, project):
    studio = studio_of(tmp_path, project, read_only=True)
    entry = entries(project)["a"]
    before = {path for path in project.rglob("*") if path.is_file()}
    assert asked(studio, "GET", f"{base(studio)}/thumb/{entry.key}-{entry.content}").status_code == 200
    assert asked(studio, "GET", base(studio)).status_code == 200
    assert save(studio, entry, "mine").status_code == 403
    assert {path for path in project.rglob("*") if path.is_file()} == before
