"""Pictures: captions are saved where they came from, nothing from elsewhere is overwritten, all can be undone."""

import json
import re
import time

import pytest

pytest.importorskip("starlette", reason="the studio's extra is not installed")

from PIL import Image, ImageFilter
from support.studios import asked, studio_of, write_project

from sd3pipe.caption_findings import CaptionFindings, CheckedPicture
from sd3pipe.config import read_project
from sd3pipe.judgement import Score
from sd3pipe.studio.gallery import read_gallery

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
    return {entry.name[:-4]: entry for entry in read_gallery(read_project(project), may_write=False).entries}


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


def test_pictures_that_check_captions_named_are_found_until_their_captions_change(studio, project):
    said = {"subset": "pictures", "held_out": False, "advantage": Score(value=0.0)}
    pictures = tuple(
        CheckedPicture(name=f"{name}.png", suspect=name == "b", changes_nothing=False, **said) for name in CAPTIONS
    )
    findings = CaptionFindings(pictures=pictures, suspects=("pictures/b.png",), change_nothing=(), checkpoints=())
    findings.save(project / "caption-check.json")
    filtered = f"{base(studio)}?warning=check-captions"
    page = asked(studio, "GET", filtered).text
    assert page.count('<figure class="card"') == 1 and "no better than others" in page
    save(studio, entries(project)["b"], "cat, door")
    assert '<figure class="card"' not in asked(studio, "GET", filtered).text


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


def test_a_thumbnail_is_made_once_and_kept_by_content(studio, project):
    entry = entries(project)["a"]
    address = f"{base(studio)}/thumb/{entry.key}-{entry.content}"
    first = asked(studio, "GET", address)
    assert first.content.startswith(b"\xff\xd8") and "immutable" in first.headers["cache-control"]
    (project / "pictures" / "a.png").unlink()
    assert asked(studio, "GET", address).content == first.content
    assert asked(studio, "GET", f"{base(studio)}/thumb/../../project.toml").status_code in (404, 422)


@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_a_caption_in_a_metadata_file_is_edited_there(tmp_path, form):
    text = {
        "json": json.dumps({"a.png": {"caption": "cat"}, "b.png": {"caption": "dog"}}),
        "jsonl": '{"file_name": "a.png", "text": "cat"}\n{"file_name": "b.png", "text": "dog"}\n',
        "csv": "file_name,text,by\na.png,cat,me\nb.png,dog,you\n",
    }[form]
    dataset = (
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir="pictures"\nmetadata_file="meta.{form}"\n'
    )
    project = write_project(tmp_path / "cats", {"a": "", "b": ""}, dataset=dataset)
    (project / f"meta.{form}").write_text(text)
    studio = studio_of(tmp_path, project)
    assert save(studio, entries(project)["a"], 'cat, "big"').status_code == 200
    assert {name: entry.caption for name, entry in entries(project).items()} == {"a": 'cat, "big"', "b": "dog"}
    asked(studio, "POST", f"{base(studio)}/undo", json={})
    assert (project / f"meta.{form}").read_text() == text


def test_read_only_writes_not_even_a_thumbnail(tmp_path, project):
    studio = studio_of(tmp_path, project, read_only=True)
    entry = entries(project)["a"]
    before = {path for path in project.rglob("*") if path.is_file()}
    assert asked(studio, "GET", f"{base(studio)}/thumb/{entry.key}-{entry.content}").status_code == 200
    assert asked(studio, "GET", base(studio)).status_code == 200
    assert save(studio, entry, "mine").status_code == 403
    assert {path for path in project.rglob("*") if path.is_file()} == before
