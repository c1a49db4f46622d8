"""Captions that a person wrote or touched are never lost: any sequence of what people do, against a dict."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from PIL import Image

from sd3pipe.captioning import slots
from sd3pipe.captioning.slots import WrittenNotes, choose, slots_of, take_back, write_captions
from sd3pipe.data.dataset_file import folder_dataset, load_dataset
from sd3pipe.data.scan import scan
from sd3pipe.file_stamps import FileStamps
from sd3pipe.words import WrittenCaptions

NAMES = ("a", "b", "c", "d")


def captioned(dataset, notes_file: Path, words: str, write: WrittenCaptions) -> list[str]:
    """Writes the same words for every picture that is to be captioned; returns the places."""
    notes = WrittenNotes(notes_file)
    there = slots_of(scan(dataset, FileStamps(notes_file.with_name("stat.json")), with_cached=False).pictures)
    chosen = choose(there, [notes], write).written
    return [
        slot.where
        for slot in write_captions([(slot, f"{words} {slot.picture.image_hash[:4]}") for slot in chosen], notes)
    ]


def undone(folder: Path) -> list[str]:
    """Takes back what was written beside the pictures of a folder; returns the places."""
    notes = WrittenNotes(folder / "n.json")
    found = scan(folder_dataset(str(folder)), FileStamps(folder / "s.json"), with_cached=False)
    return [slot.where for slot in take_back(slots_of(found.pictures), notes)]


class Captions(RuleBasedStateMachine):
    """People edit, rename, add and remove; sd3pipe captions and takes back."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.folder, self.notes = self.root / "pictures", self.root / "notes" / "written.json"
        self.folder.mkdir()
        self.colours = 0
        self.by_hand: dict[str, str] = {}  # name of a picture -> the words of a person beside it
        self.replaced: dict[str, str] = {}  # words of a person that `all` wrote over
        self.add("a")

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def picture(self, name: str) -> Path:
        return self.folder / f"{name}.png"

    def text(self, name: str) -> Path:
        return self.folder / f"{name}.txt"

    @rule(name=st.sampled_from(NAMES))
    def add(self, name: str) -> None:
        if not self.picture(name).exists():
            self.colours += 1
            Image.new("RGB", (8, 8), (self.colours, 0, 0)).save(self.picture(name))
            self.text(name).unlink(missing_ok=True)

    @rule(name=st.sampled_from(NAMES), words=st.text(min_size=1, max_size=5).filter(lambda text: text.isprintable()))
    def edit(self, name: str, words: str) -> None:
        if self.picture(name).exists():
            self.text(name).write_text(words, encoding="utf-8")
            self.by_hand[name] = words
            self.replaced.pop(name, None)

    @rule(name=st.sampled_from(NAMES))
    def touch_ours(self, name: str) -> None:
        if self.text(name).exists():
            self.edit(name, self.text(name).read_text(encoding="utf-8") + "!")

    @rule(name=st.sampled_from(NAMES))
    def remove_caption(self, name: str) -> None:
        self.text(name).unlink(missing_ok=True)
        self.by_hand.pop(name, None)
        self.replaced.pop(name, None)

    @rule(name=st.sampled_from(NAMES[1:]))
    def remove(self, name: str) -> None:
        self.remove_caption(name)
        self.picture(name).unlink(missing_ok=True)

    @rule(old=st.sampled_from(NAMES[1:]), new=st.sampled_from(NAMES[1:]))
    def rename(self, old: str, new: str) -> None:
        if not self.picture(old).exists() or self.picture(new).exists():
            return
        self.text(new).unlink(missing_ok=True)
        self.picture(old).rename(self.picture(new))
        if self.text(old).exists():
            self.text(old).rename(self.text(new))
        for kept in (self.by_hand, self.replaced):
            if old in kept:
                kept[new] = kept.pop(old)

    @rule(words=st.sampled_from(["one", "two"]), write=st.sampled_from(["own", "missing"]))
    def caption(self, words: str, write: WrittenCaptions) -> None:
        captioned(folder_dataset(str(self.folder)), self.notes, words, write)
        assert all(self.text(name).exists() for name in NAMES if self.picture(name).exists())

    @rule(words=st.sampled_from(["one", "two"]))
    def caption_all(self, words: str) -> None:
        captioned(folder_dataset(str(self.folder)), self.notes, words, "all")
        self.replaced |= self.by_hand
        self.by_hand = {}

    @rule()
    def undo(self) -> None:
        notes = WrittenNotes(self.notes)
        take_back(slots_of(scan(folder_dataset(str(self.folder)), FileStamps(self.root / "s.json")).pictures), notes)
        self.by_hand |= self.replaced
        self.replaced = {}
        left = {name for name in NAMES if self.text(name).exists() and self.picture(name).exists()}
        assert left == set(self.by_hand)

    @invariant()
    def words_of_people_stand(self) -> None:
        assert {name: self.text(name).read_text(encoding="utf-8") for name in self.by_hand} == self.by_hand


TestCaptions = pytest.mark.long(Captions.TestCase)
TestCaptions.settings = settings(
    max_examples=50,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.fixture
def listed(tmp_path):
    for number, name in enumerate(NAMES):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{name}.png")
    (tmp_path / "d.toml").write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{tmp_path}'\nmetadata_file = 'm.jsonl'\n"
    )
    return tmp_path


RECORDS = [
    {"file_name": "a.png", "text": "a person's", "score": 1.5},
    {"file_name": "b.png", "text": ""},
    {"file_name": "c.png", "tags": ["one", "two"]},
    {"file_name": "d.png", "text": "", "tags": "three"},
]


def test_captions_go_into_a_metadata_file_and_back(listed):
    file = listed / "m.jsonl"
    before = "".join(json.dumps(record) + "\n" for record in RECORDS)
    file.write_text(before)
    assert len(captioned(load_dataset(listed / "d.toml"), listed / "n.json", "words", "own")) == 1
    after = [json.loads(line) for line in file.read_text().splitlines()]
    assert after[0] == RECORDS[0] and after[2:] == RECORDS[2:]
    assert after[1]["text"].startswith("words ")
    assert len(captioned(load_dataset(listed / "d.toml"), listed / "n.json", "others", "all")) == 4
    after = [json.loads(line) for line in file.read_text().splitlines()]
    said = [record.get("text", record.get("tags")) for record in after]
    assert all(text.startswith("others ") for text in said) and after[0]["score"] == 1.5
    notes = WrittenNotes(listed / "n.json")
    take_back(slots_of(scan(load_dataset(listed / "d.toml"), FileStamps(listed / "s.json")).pictures), notes)
    assert [json.loads(line) for line in file.read_text().splitlines()] == RECORDS


def test_captions_go_into_a_table_of_sd_scripts(listed):
    (listed / "d.toml").write_text((listed / "d.toml").read_text().replace("m.jsonl", "m.json"))
    (listed / "m.json").write_text(json.dumps({"a": {"caption": ""}, "b": {"caption": "kept"}}))
    captioned(load_dataset(listed / "d.toml"), listed / "n.json", "words", "own")
    table = json.loads((listed / "m.json").read_text())
    assert table["a"]["caption"].startswith("words ") and table["b"] == {"caption": "kept"}


def test_captions_go_into_a_table_of_columns(listed):
    (listed / "d.toml").write_text((listed / "d.toml").read_text().replace("m.jsonl", "m.csv"))
    (listed / "m.csv").write_text("file_name,text,by\na.png,kept,me\nb.png,,you\n")
    captioned(load_dataset(listed / "d.toml"), listed / "n.json", "words", "own")
    first, second = (listed / "m.csv").read_text().splitlines()[1:]
    assert first == "a.png,kept,me" and second.startswith("b.png,words ") and second.endswith(",you")


def test_a_metadata_file_is_read_once_for_all_its_pictures(listed, monkeypatch):
    (listed / "m.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{name}.png", "text": ""}) + "\n" for name in NAMES)
    )
    reads = []
    read = slots.read_metadata
    monkeypatch.setattr(slots, "read_metadata", lambda file: reads.append(file) or read(file))
    assert len(captioned(load_dataset(listed / "d.toml"), listed / "n.json", "words", "own")) == len(NAMES)
    assert len(reads) == 3  # to see where captions belong, whether they are as they were, and to put others in


def copied_with_its_caption(folder, words):
    """Has a caption written, and copies it together with its picture."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    if words is not None:
        (folder / "a.txt").write_text(words)
    captioned(folder_dataset(str(folder)), folder / "n.json", "words", "all")
    for ending in ("png", "txt"):
        shutil.copy(folder / f"a.{ending}", folder / f"b.{ending}")


@pytest.mark.parametrize("words", [None, "a person's"])
@pytest.mark.parametrize("again", [False, True])
def test_a_caption_that_was_copied_with_its_picture_is_taken_back_too(tmp_path, words, again):
    copied_with_its_caption(tmp_path, words)
    if again:
        assert len(captioned(folder_dataset(str(tmp_path)), tmp_path / "n.json", "others", "own")) == 2
    assert len(undone(tmp_path)) == 2
    left = [path.read_text() for name in "ab" if (path := tmp_path / f"{name}.txt").exists()]
    assert left == ([words] * 2 if words else [])
    assert json.loads((tmp_path / "n.json").read_text())["captions"] == []
    assert undone(tmp_path) == []


def test_a_kill_before_captions_are_written_leaves_the_old_ones_ours(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a person's")
    captioned(folder_dataset(str(tmp_path)), tmp_path / "n.json", "words", "all")
    with monkeypatch.context() as killed:
        killed.setattr(slots, "_apply", lambda changes: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            captioned(folder_dataset(str(tmp_path)), tmp_path / "n.json", "others", "own")
        with pytest.raises(KeyboardInterrupt):
            undone(tmp_path)
    assert len(undone(tmp_path)) == 1 and (tmp_path / "a.txt").read_text() == "a person's"


def test_a_caption_that_changes_meanwhile_is_kept(tmp_path, caplog):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    notes = WrittenNotes(tmp_path / "n.json")
    (slot,) = slots_of(scan(folder_dataset(str(tmp_path)), FileStamps(tmp_path / "s.json")).pictures)
    (tmp_path / "a.txt").write_text("a person's")
    assert write_captions([(slot, "words")], notes) == []
    assert (tmp_path / "a.txt").read_text() == "a person's"
    assert "changed while captions were made" in caplog.text


def test_pictures_that_share_a_caption_file_have_one_caption(tmp_path, caplog):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.webp")
    assert len(captioned(folder_dataset(str(tmp_path)), tmp_path / "n.json", "words", "own")) == 1
    assert "a.webp" in caplog.text


def test_a_picture_whose_caption_file_is_a_folder_is_left_out(tmp_path, caplog):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").mkdir()
    (written,) = captioned(folder_dataset(str(tmp_path)), tmp_path / "n.json", "words", "all")
    assert written.endswith("b.txt") and str(tmp_path / "a.txt") in caplog.text


def test_no_caption_of_a_person_has_its_bytes_changed_by_undo(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    odd = b"\xef\xbb\xbfa cat\r\nand more\r\n\r\n"
    (tmp_path / "a.txt").write_bytes(odd)
    captioned(folder_dataset(str(tmp_path)), tmp_path / "n.json", "words", "all")
    assert (tmp_path / "a.txt").read_bytes() != odd
    undone(tmp_path)
    assert (tmp_path / "a.txt").read_bytes() == odd
