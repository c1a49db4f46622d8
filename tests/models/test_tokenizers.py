"""Token ids against transformers and sentencepiece, identities over file formats, and the places of tokenizers."""

import json
import logging
import shutil

import pytest
from support.tiny_tokenizers import train_tokenizers

from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.models.text_architecture import ENCODERS
from sd3pipe.models.tokenizer_folders import find_tokenizers, tokenizers_identity
from sd3pipe.models.tokenizers import load_tokenizer, tokenize_texts
from sd3pipe.models.vocabularies import (
    GENUINE_IDENTITIES,
    VOCABULARY_KINDS,
    read_t5_vocabulary,
    vocabulary_identity,
)

TEXTS = [
    "",
    "a cat",
    "A photo of  a CAT,\nsitting; on\ta mat (very:1.2), don't stop",
    "é 漢字 emoji 😀 ﬁ Ⅳ ½ \uff41\uff42",
    "line\r\nbreak \u00a0 nbsp\u200b zero",
    "x" * 500,
    "1girl, solo, long_hair, looking_at_viewer, " * 20,
    " leading and trailing  ",
    "café naïve Ångström İstanbul ẞ",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    train_tokenizers(folder)
    return folder


@pytest.fixture(params=["real", "small"])
def folder(request, small):
    return small if request.param == "small" else request.getfixturevalue("shared_dir") / "tokenizers"


@pytest.mark.parametrize("encoder", ENCODERS)
def test_ids_equal_those_of_transformers(folder, encoder):
    from transformers import AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    theirs = AutoTokenizer.from_pretrained(folder / encoder)
    for text, ids in zip(TEXTS, load_tokenizer(encoder, folder / encoder).encode(TEXTS), strict=True):
        assert ids == theirs(text).input_ids, text


def test_t5_ids_equal_those_of_sentencepiece(folder):
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(folder / "t5xxl" / "spiece.model"))
    for text, ids in zip(TEXTS, load_tokenizer("t5xxl", folder / "t5xxl").encode(TEXTS), strict=True):
        assert ids == [*processor.encode(text), 1], text


def test_known_ids_of_the_genuine_tokenizers(shared_dir):
    folder = shared_dir / "tokenizers"
    clip_l, clip_g, t5xxl = (load_tokenizer(name, folder / name) for name in ENCODERS)
    (ids,) = clip_l.encode(["a cat"])
    assert clip_l.pad([ids], 6).ids.tolist() == [[49406, 320, 2368, 49407, 49407, 49407]]
    assert clip_g.pad([ids], 6).ids.tolist() == [[49406, 320, 2368, 49407, 0, 0]]
    assert clip_g.pad([ids], 6).mask.tolist() == [[1, 1, 1, 1, 0, 0]]
    assert t5xxl.pad(t5xxl.encode(["a cat"]), 6).ids.tolist() == [[3, 9, 1712, 1, 0, 0]]


@pytest.mark.long
def test_an_exclamation_mark_is_no_padding(shared_dir):
    """transformers makes padding (id 0) of it, because CLIP-G's own folder declares "!" as its special pad token."""
    folder = shared_dir / "tokenizers"
    from_own_folder = load_tokenizer("clip_g", folder / "clip_g").encode(["wow! hm!!"])
    assert from_own_folder == load_tokenizer("clip_g", folder / "clip_l").encode(["wow! hm!!"])
    assert from_own_folder == [[49406, 2781, 256, 7631, 748, 49407]]


def test_long_texts_are_cut_before_the_end_token(small):
    tokenizer = load_tokenizer("clip_l", small / "clip_l")
    tokens = tokenize_texts(tokenizer, ["cat " * 100, "a cat"], max_length=10, pad_to=10)
    assert tokens.is_cut(0)
    assert not tokens.is_cut(1)
    assert len(tokens.ids[0]) == 10
    assert tokens.ids[0][-1] == tokenizer.end_id
    assert tokens.counts[0] > 100
    assert tokens.batch([0, 1]).mask.sum(axis=1).tolist() == [10, len(tokens.ids[1])]


@pytest.mark.long
def test_genuine_vocabularies_have_the_known_identities(shared_dir):
    for name in ENCODERS:
        kind = VOCABULARY_KINDS[name]
        assert vocabulary_identity(shared_dir / "tokenizers" / name, kind) == GENUINE_IDENTITIES[kind]


@pytest.mark.long
def test_identity_does_not_depend_on_the_file_format(folder, tmp_path):
    for name in ("spiece.model", "tokenizer.json"):
        (tmp_path / name).mkdir()
        shutil.copyfile(folder / "t5xxl" / name, tmp_path / name / name)
    assert vocabulary_identity(tmp_path / "spiece.model", "t5") == vocabulary_identity(
        tmp_path / "tokenizer.json", "t5"
    )
    ids = json.loads((folder / "clip_l" / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "clip_l" / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
    content = {"model": {"vocab": ids, "merges": [merge for merge in merges if merge]}}
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert vocabulary_identity(tmp_path / "clip", "clip") == vocabulary_identity(folder / "clip_l", "clip")


def test_both_t5_formats_hold_the_same_vocabulary(folder, tmp_path):
    shutil.copyfile(folder / "t5xxl" / "tokenizer.json", tmp_path / "tokenizer.json")
    assert read_t5_vocabulary(tmp_path) == read_t5_vocabulary(folder / "t5xxl")


def test_identity_changes_with_one_merge(small, tmp_path):
    shutil.copytree(small, tmp_path / "t")
    before = tokenizers_identity(find_tokenizers(folder=tmp_path / "t"))
    merges = tmp_path / "t" / "clip_g" / "merges.txt"
    lines = merges.read_text(encoding="utf-8").split("\n")
    merges.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]), encoding="utf-8")
    assert tokenizers_identity(find_tokenizers(folder=tmp_path / "t")) != before


def test_a_changed_vocabulary_is_not_remembered_as_the_old_one(small, tmp_path):
    shutil.copytree(small, tmp_path / "t")
    for name in ("merges.txt", "vocab.json"):
        stamps = FileStamps(tmp_path / "memory.json")
        before = vocabulary_identity(tmp_path / "t" / "clip_l", "clip", stamps)
        file = tmp_path / "t" / "clip_l" / name
        text = file.read_text(encoding="utf-8")
        changed = text.replace(": 300,", ": 99999,") if name == "vocab.json" else text.rsplit("\n", 2)[0] + "\n"
        assert changed != text
        file.write_text(changed, encoding="utf-8")
        assert vocabulary_identity(tmp_path / "t" / "clip_l", "clip", FileStamps(tmp_path / "memory.json")) != before
        assert vocabulary_identity(tmp_path / "t" / "clip_l", "clip", stamps) != before


def test_training_again_gives_equal_files(small, tmp_path):
    train_tokenizers(tmp_path)
    files = sorted(path.relative_to(small) for path in small.rglob("*") if path.is_file())
    assert len(files) == 12
    assert all((tmp_path / file).read_bytes() == (small / file).read_bytes() for file in files)


@pytest.fixture
def no_places(tmp_path, monkeypatch):
    """Takes away every place in which a developer's machine may have tokenizers."""
    import huggingface_hub.constants

    monkeypatch.delenv("SD3PIPE_TOKENIZERS", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_places_are_searched_in_order(no_places, small, monkeypatch):
    model = no_places / "models" / "sd3.safetensors"
    model.parent.mkdir()
    model.touch()
    with pytest.raises(InputError, match="sd3pipe tokenizers DIR"):
        find_tokenizers(folder=None, model=model)
    places = {}
    shutil.copytree(small, model.parent / "tokenizers")
    places["beside"] = find_tokenizers(folder=None, model=model)["t5xxl"]
    monkeypatch.setenv("SD3PIPE_TOKENIZERS", str(shutil.copytree(small, no_places / "environment")))
    places["environment"] = find_tokenizers(folder=None, model=model)["t5xxl"]
    places["option"] = find_tokenizers(folder=small, model=model)["t5xxl"]
    assert places == {
        "beside": model.parent / "tokenizers" / "t5xxl",
        "environment": no_places / "environment" / "t5xxl",
        "option": small / "t5xxl",
    }


def test_the_hub_cache_is_the_last_place(no_places, small):
    for name, repository in (("clip_l", "openai--clip-vit-large-patch14"), ("t5xxl", "google--t5-v1_1-xxl")):
        home = no_places / "hub" / f"models--{repository}"
        shutil.copytree(small / name, home / "snapshots" / ("0" * 40))
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("0" * 40)
    found = find_tokenizers(folder=None, model=no_places / "none.safetensors")
    assert found["clip_g"] == found["clip_l"]
    assert tokenizers_identity(found) == tokenizers_identity(find_tokenizers(folder=small))


def test_clip_g_may_come_from_the_folder_of_clip_l(no_places, small):
    shutil.copytree(small / "clip_l", no_places / "t" / "clip_l")
    shutil.copytree(small / "t5xxl", no_places / "t" / "t5xxl")
    found = find_tokenizers(folder=no_places / "t")
    assert found["clip_g"] == no_places / "t" / "clip_l"
    assert load_tokenizer("clip_g", found["clip_g"]).pad_id == 0


def test_a_diffusers_folder_brings_its_own(no_places, small):
    names = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5xxl": "tokenizer_3"}
    for name, theirs in names.items():
        shutil.copytree(small / name, no_places / "model" / theirs)
    found = find_tokenizers(folder=None, model=no_places / "model")
    assert {name: path.name for name, path in found.items()} == names


def test_a_named_folder_must_have_all(no_places, small):
    shutil.copytree(small / "clip_l", no_places / "t" / "clip_l")
    with pytest.raises(InputError, match=r"no tokenizer for t5xxl .*sd3pipe tokenizers"):
        find_tokenizers(folder=no_places / "t")


@pytest.mark.parametrize(
    ("encoder", "name", "content"),
    [
        ("clip_l", "vocab.json", b"{"),
        ("clip_l", "vocab.json", b'{"a": 1}'),
        ("clip_l", "vocab.json", b"[1]"),
        ("clip_l", "vocab.json", b'{"a": Infinity}'),
        ("clip_l", "vocab.json", b'{"a": -1}'),
        ("clip_l", "merges.txt", b"#version: 0.2\na b c\n"),
        ("clip_l", "merges.txt", b"\xff"),
        ("clip_l", "merges.txt", b"#version: 0.2\nw er</w>\n\0\0 \0\n"),
        ("t5xxl", "spiece.model", b"\x0a\xff\xff\xff\xff\x0f"),
        ("t5xxl", "spiece.model", b"\x80"),
        ("t5xxl", "spiece.model", b""),
    ],
)
def test_damaged_files_are_named(small, tmp_path, encoder, name, content):
    shutil.copytree(small / encoder, tmp_path / encoder)
    (tmp_path / encoder / name).write_bytes(content)
    with pytest.raises(InputError, match=str(tmp_path / encoder)) as caught:
        load_tokenizer(encoder, tmp_path / encoder)
    assert "\n" not in str(caught.value)
