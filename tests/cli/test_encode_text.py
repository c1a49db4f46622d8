"""encode-text from the command line, on photographs and a tiny base."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file
from support.command_line import report_of, sd3pipe
from support.comparing import folder_bytes
from support.photographs import CAPTIONS, write_dataset_file, write_photographs

from sd3pipe.cache import store
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.rows import layout_bytes, layout_of
from sd3pipe.cache.staleness import check_sources
from sd3pipe.cache.tensors import row_to_torch
from sd3pipe.cli import run
from sd3pipe.console import readable_bytes
from sd3pipe.data.captions import tag_frequency
from sd3pipe.diffusion.prompts import read_prompts
from sd3pipe.encoding import text_encoding
from sd3pipe.errors import StorageError
from sd3pipe.models.text_architecture import ENCODERS
from sd3pipe.models.text_encoder_files import find_text_sizes

SMALL = ("--t5xxl-max-token-length", "16", "--threads", "1")
PICTURES = ("astronaut.png", "chelsea.png", "coffee.png")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("pictures"), PICTURES, longest_side=48)


@pytest.fixture
def project(tmp_path, photographs, monkeypatch):
    """A folder of one's own with pictures, captions and a dataset file; no project.toml of elsewhere acts there."""
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "pictures"
    shutil.copytree(photographs, pictures)
    write_dataset_file(tmp_path / "dataset.toml", pictures)
    return tmp_path


def arguments(base, project, *more):
    model = ("--model", base.model, *base.encoder_options())
    source = () if "--sample-prompts" in more else ("--dataset", project / "dataset.toml")
    out = () if "--out" in more else ("--out", project / "caches" / "text")
    return [str(word) for word in ("encode-text", *model, *source, *out, *SMALL, *more)]


def encode(base, project, *more, expect=0):
    """Runs the command in this process and returns its report."""
    words = arguments(base, project, *more)
    assert run(words) == expect
    return report_of(Path(words[words.index("--out") + 1]))


def loaded_modules(words):
    code = f"import sys\nfrom sd3pipe.cli import run\nassert run({words!r}) == 0\nprint(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_captions_become_rows_and_are_not_encoded_twice(base, project, capsys):
    first = encode(base, project)
    assert (first["encoded"], first["reused"], first["texts"], first["uses"]) == (4, 0, 4, 3)
    before = folder_bytes(project / "caches" / "text")
    second = encode(base, project)
    assert (second["encoded"], second["reused"]) == (0, 4)
    assert folder_bytes(project / "caches" / "text") == before
    assert "encode-text: nothing to do: 4 reused, 0 encoded, 0 quarantined, " in capsys.readouterr().out
    loaded = loaded_modules(arguments(base, project))
    assert not loaded & {"torch", "transformers", "tokenizers", "sentencepiece", "PIL"}


@pytest.mark.long
def test_samples_name_pictures_and_the_empty_caption_is_a_row(base, project):
    encode(base, project)
    reader = CacheReader(project / "caches" / "text")
    samples = reader.samples.to_columns(reader.keys)
    assert samples["name"] == sorted(PICTURES)
    assert samples["subset"] == ["pictures"] * 3
    assert samples["variant"] == [0, 0, 0]
    rows = {name: reader.row(key) for name, key in zip(samples["name"], samples["key"], strict=True)}
    assert rows["coffee.png"]["t5xxl"].shape == (16, 256)
    assert rows["coffee.png"]["t5xxl"].dtype == "BF16"
    empty = reader.row(reader.manifest.extra["empty_caption"])
    assert empty["mask_t5"].numpy().tolist() == [1] + [0] * 15
    assert reader.manifest.subsets["pictures"]["caption_dropout_rate"] == 0.1
    captions = [(project / "pictures" / name).with_suffix(".txt").read_text() for name in PICTURES]
    assert reader.manifest.tags == {"pictures": tag_frequency(caption.lower() for caption in captions)}


@pytest.mark.long
def test_an_edited_caption_is_the_only_one_encoded_and_changing_it_back_costs_nothing(base, project):
    encode(base, project)
    before = folder_bytes(project / "caches" / "text")
    caption = project / "pictures" / "coffee.txt"
    caption.write_text("a mug\n", encoding="utf-8")
    edited = encode(base, project)
    assert (edited["encoded"], edited["reused"]) == (1, 3)
    caption.write_bytes(b"\xef\xbb\xbf" + CAPTIONS["coffee.png"].encode() + b"\r\n")
    back = encode(base, project)
    assert (back["encoded"], back["reused"]) == (0, 4)
    assert folder_bytes(project / "caches" / "text") == before


@pytest.mark.long
def test_equal_captions_are_one_row(base, project):
    for name in ("coffee.txt", "chelsea.txt"):
        (project / "pictures" / name).write_text("the same words", encoding="utf-8")
    report = encode(base, project)
    assert (report["texts"], report["uses"], report["encoded"]) == (3, 3, 3)
    samples = CacheReader(project / "caches" / "text").samples
    assert len(set(samples.numbers("row").tolist())) == 2


@pytest.mark.long
def test_random_captions_are_variants_of_their_own(base, project):
    extra = "shuffle_caption = true\nkeep_tokens = 1"
    write_dataset_file(project / "dataset.toml", project / "pictures", extra=extra)
    (project / "pictures" / "coffee.txt").write_text("a, b, c, d, e, f, g", encoding="utf-8")
    report = encode(base, project, "--caption-variants", "3")
    samples = CacheReader(project / "caches" / "text").samples
    assert sorted(samples.numbers("variant").tolist()).count(2) >= 1
    assert report["texts"] > 4
    again = encode(base, project, "--caption-variants", "3")
    assert again["encoded"] == 0
    other_seed = encode(base, project, "--caption-variants", "3", "--seed", "7")
    assert other_seed["encoded"] > 0


@pytest.mark.long
def test_cut_captions_are_named(base, project, caplog):
    (project / "pictures" / "coffee.txt").write_text("cat " * 100, encoding="utf-8")
    report = encode(base, project)
    (cut,) = [item for item in report["cut"] if item["used_by"].endswith("coffee.png") and "clip_l" in item["tokens"]]
    assert cut["tokens"]["clip_l"] > 100
    assert cut["tokens"]["t5xxl"] > 100
    again = encode(base, project)
    assert again["encoded"] == 0 and again["cut"] == report["cut"]  # nothing is encoded, and it is told all the same
    (project / "pictures" / "coffee.txt").write_text("cat", encoding="utf-8")
    shorter = encode(base, project)["cut"]
    assert shorter == [item for item in report["cut"] if not item["used_by"].endswith("coffee.png")]


@pytest.mark.long
def test_shards_fill_one_cache_that_equals_one_made_at_once(base, project):
    for number in range(12):
        shutil.copyfile(project / "pictures" / "coffee.png", project / "pictures" / f"{number}.png")
        (project / "pictures" / f"{number}.txt").write_text(f"caption number {number}", encoding="utf-8")
    at_once = encode(base, project)
    assert at_once["encoded"] == 16
    parts = [encode(base, project, "--out", project / "sharded", "--shard", f"{part}/2") for part in (0, 1)]
    assert sum(part["encoded"] for part in parts) == 16
    assert folder_bytes(project / "sharded") == folder_bytes(project / "caches" / "text")


@pytest.mark.long
def test_a_dry_run_writes_nothing(base, project, capsys):
    assert run(arguments(base, project, "--dry-run")) == 0
    assert "dry run: 4 rows to encode, 0 there; about " in capsys.readouterr().out
    assert not (project / "caches" / "text").exists()
    assert not (project / "caches" / "text.report.json").exists()


def test_captions_longer_than_the_padding_are_forecast_and_need_room_with_what_lies_beside(
    base, project, capsys, monkeypatch
):
    (project / "pictures" / "coffee.txt").write_text("cat " * 100, encoding="utf-8")
    padded = ("--t5-pad-to", "4")
    assert run(arguments(base, project, "--dry-run", *padded)) == 0
    forecast = capsys.readouterr().out
    sizes = find_text_sizes(str(base.model), {name: getattr(base, name) for name in ENCODERS})
    with monkeypatch.context() as patch:
        patch.setattr(store, "free_bytes", lambda path: 4 * sizes.row_bytes(4, "bfloat16"))
        assert run(arguments(base, project, *padded)) == StorageError.exit_code
    assert " to be written, " in capsys.readouterr().err
    encode(base, project, *padded)
    reader = CacheReader(project / "caches" / "text")
    rows = sum(layout_bytes(layout_of(reader.row(number))) for number in range(len(reader.keys)))
    assert f", {readable_bytes(rows)} to write, " in forecast
    assert f"{readable_bytes(4 * sizes.row_bytes(0, 'bfloat16'))} more meanwhile, " in forecast


@pytest.mark.long
def test_another_recipe_version_says_beforehand_what_it_takes(base, project, monkeypatch, capsys):
    encode(base, project)
    monkeypatch.setattr("sd3pipe.encoding.text_plan.RECIPE_VERSION", 2)
    assert encode(base, project)["encoded"] == 4
    told = "version 1 of its recipe, this sd3pipe has version 2, which makes its rows anew"
    errors = capsys.readouterr().err
    assert told in errors and "4 rows to encode, 0 there; about " in errors
    encode(base, project)
    assert told not in capsys.readouterr().err


def test_sources_are_remembered_for_the_stat_check(base, project):
    encode(base, project)
    assert check_sources(project / "caches" / "text").state == "fresh"
    (project / "pictures" / "coffee.txt").write_text("a mug", encoding="utf-8")
    assert check_sources(project / "caches" / "text").state == "changed"


def test_what_comes_into_other_folders_or_has_two_dots_is_noticed(base, project):
    pictures, masks, dataset = project / "pictures", project / "masks", project / "dataset.toml"
    masks.mkdir()
    keys = f"recursive = true\nconditioning_data_dir = '{masks}'\ncaption_extension = '.wd.txt'\n"
    dataset.write_text(dataset.read_text() + keys)
    for name in ("coffee.png", "astronaut.png"):
        shutil.copy(pictures / name, masks)
    encode(base, project)
    assert check_sources(project / "caches" / "text").state == "fresh"

    (pictures / "new").mkdir()
    changes = {
        pictures / "new" / "chelsea.png": (pictures / "chelsea.png").read_bytes(),
        masks / "chelsea.png": (pictures / "chelsea.png").read_bytes(),
        pictures / "coffee.wd.txt": b"a mug",
    }
    for file, data in changes.items():
        file.write_bytes(data)
        assert check_sources(project / "caches" / "text").state == "changed", file
        encode(base, project)
        assert check_sources(project / "caches" / "text").state == "fresh"


def test_a_dataset_file_that_is_edited_while_captions_are_encoded_counts_as_changed(base, project, monkeypatch):
    file, real = project / "dataset.toml", text_encoding.encoded_texts

    def edited(*given):
        file.write_text(file.read_text() + "caption_prefix = 'sks'\n")
        return real(*given)

    monkeypatch.setattr(text_encoding, "encoded_texts", edited)
    encode(base, project)
    assert check_sources(project / "caches" / "text").changes == (f"{file} was changed",)


def test_an_unreadable_picture_is_listed_and_left_out(base, project):
    (project / "pictures" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (project / "pictures" / "broken.txt").write_text("nothing", encoding="utf-8")
    report = encode(base, project)
    assert (report["quarantined"], report["encoded"]) == (1, 4)
    (entry,) = CacheReader(project / "caches" / "text").manifest.quarantined
    assert entry["name"] == "broken.png"


def test_nothing_is_encoded_where_no_picture_can_be_read(base, project, capsys):
    for picture in (project / "pictures").glob("*.png"):
        picture.write_bytes(b"broken")
    assert run(arguments(base, project)) == 3
    assert "pictures can be used" in last_line(capsys)


def prompts(project, text):
    (project / "prompts.txt").write_text(text, encoding="utf-8")
    return ("--sample-prompts", project / "prompts.txt", "--out", project / "caches" / "prompts")


@pytest.mark.long
def test_prompts_carry_their_settings_outside_the_keys(base, project):
    report = encode(base, project, *prompts(project, "a cat --n blurry --w 128 --d 3 --s 4 --l 2.5\na dog\n"))
    assert (report["encoded"], report["texts"], report["uses"]) == (4, 4, 2)
    reader = CacheReader(project / "caches" / "prompts")
    samples = reader.samples.to_columns(reader.keys)
    assert samples["prompt"] == ["a cat", "a dog"]
    assert samples["negative"] == ["blurry", ""]
    assert json.loads(samples["settings"][0]) == {"width": 128, "seed": 3, "steps": 4, "scale": 2.5}
    assert samples["negative_key"][1] == reader.manifest.extra["empty_caption"]
    resized = encode(base, project, *prompts(project, "a cat --n blurry --w 256\na dog --d 9\n"))
    assert (resized["encoded"], resized["reused"]) == (0, 4)
    added = encode(base, project, *prompts(project, "a cat --n blurry\na dog\na bird\n"))
    assert (added["encoded"], added["reused"]) == (1, 4)


@pytest.mark.long
def test_in_a_project_both_caches_are_filled_without_arguments(base, project, monkeypatch):
    (project / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    paths = {"model": base.model, "clip_l": base.clip_l, "clip_g": base.clip_g, "t5xxl": base.t5xxl}
    paths |= {"tokenizers": base.tokenizers, "dataset": "dataset.toml", "sample_prompts": "prompts.txt"}
    lines = [f'{key} = "{value}"' for key, value in {**paths, "caches": "caches"}.items()]
    (project / "project.toml").write_text("[paths]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(project)
    assert run(["encode-text", *SMALL]) == 0
    assert report_of(project / "caches" / "text")["encoded"] == 4
    assert report_of(project / "caches" / "prompts")["encoded"] == 2
    assert run(["encode-text", *SMALL, "--out", "elsewhere"]) == 0
    assert CacheReader(project / "elsewhere").manifest.kind == "text"


def last_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines, "nothing was said"
    return lines[-1]


def test_a_missing_t5_is_one_line(base, project, capsys):
    words = arguments(base, project)
    at = words.index("--t5xxl")
    assert run(words[:at] + words[at + 2 :]) == 3
    assert "--t5xxl" in (line := last_line(capsys))
    assert str(base.model) in line
    assert "T5" in line


@pytest.mark.long
def test_missing_tokenizers_are_one_line(base, project, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("SD3PIPE_TOKENIZERS", raising=False)
    for name in ("sd35-medium", "clip_l", "clip_g", "t5xxl_fp16"):
        shutil.copyfile(base.folder / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
    alone = type(base)(
        **{name: getattr(base, name) for name in base.__slots__}
        | {"model": tmp_path / "sd35-medium.safetensors"}
        | {name: tmp_path / f"{name}.safetensors" for name in ("clip_l", "clip_g")}
        | {"t5xxl": tmp_path / "t5xxl_fp16.safetensors"}
    )
    words = arguments(alone, project)
    at = words.index("--tokenizers")
    done = sd3pipe(*words[:at], *words[at + 2 :], expect=3, env={"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert "sd3pipe tokenizers DIR" in done.stderr.strip().splitlines()[-1]


def test_a_caption_that_is_not_utf8_is_named(base, project, capsys):
    (project / "pictures" / "coffee.txt").write_bytes(b"caf\xe9")
    assert run(arguments(base, project)) == 3
    assert str(project / "pictures" / "coffee.txt") in last_line(capsys)
    assert report_of(project / "caches" / "text")["exit_code"] == 3


def test_an_empty_dataset_is_one_line(base, project, capsys):
    shutil.rmtree(project / "pictures")
    (project / "pictures").mkdir()
    assert run(arguments(base, project)) == 3
    assert "empty" in last_line(capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--t5-pad-to", "32"), "--t5-pad-to 32 is more than --t5xxl-max-token-length 16"),
        (("--sample-prompts", "p.txt", "--dataset", "d.toml"), "run the command once for each"),
        (("--padding", "trim"), "padding"),
        (("--shard", "2/2"), "no part 2"),
        (("--text-dtype", "float8"), "text-dtype"),
    ],
)
def test_options_that_cannot_be_met_are_refused(base, project, capsys, words, said):
    assert run(arguments(base, project, *words)) == 2
    assert said in capsys.readouterr().err


def test_nothing_to_encode_is_said(base, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(["encode-text", "--model", str(base.model), "--out", "x"]) == 2
    assert "--dataset" in last_line(capsys)


@pytest.mark.long
def test_one_bit_of_t5_makes_every_row_anew(base, project, tmp_path):
    encode(base, project)
    tensors = load_file(base.t5xxl)
    tensors["encoder.final_layer_norm.weight"].view(dtype=torch.int16)[0] ^= 1
    save_file(tensors, tmp_path / "t5.safetensors")
    other = type(base)(
        **{name: getattr(base, name) for name in base.__slots__} | {"t5xxl": tmp_path / "t5.safetensors"}
    )
    assert encode(other, project)["encoded"] == 4


def test_a_refused_encode_leaves_the_report_of_the_last_one(base, project):
    encode(base, project)
    report = project / "caches" / "text.report.json"
    before = report.read_bytes()
    (project / "dataset.toml").write_text("[[datasets]]\ncolour = 3\n")
    encode(base, project, expect=2)
    assert report.read_bytes() == before
    refusal = json.loads((project / "caches" / "text.refused.report.json").read_text())
    assert refusal["exit_code"] == 2 and "colour" in refusal["error"]


@pytest.mark.long
def test_packed_rows_are_rows_of_their_own_that_every_reader_takes(base, project, monkeypatch):
    dense, packed = project / "caches" / "text", project / "caches" / "packed"
    encode(base, project)
    assert encode(base, project, "--out", packed, "--t5xxl-row-dtype", "int8")["encoded"] == 4
    assert encode(base, project, "--out", packed, "--t5xxl-row-dtype", "int8")["encoded"] == 0
    readers = CacheReader(dense), CacheReader(packed)
    assert not {key.tobytes() for key in readers[0].keys} & {key.tobytes() for key in readers[1].keys}
    sizes = [int(reader.index.arrays["row_bytes"][0]) for reader in readers]
    assert sizes[0] - sizes[1] == 16 * (256 - 256 // 64 * 2)  # a byte for each number less, two for each scale more
    for where in readers[0].samples.to_columns(readers[0].keys)["key"]:
        assert readers[0].row(where)["t5xxl"].dtype == "BF16"
    assert run(["cache", "verify", str(packed)]) == 0
    assert run(["cache", "why", str(packed), "coffee.png"]) == 0
    assert run(["cache", "export", str(packed), "--out", str(project / "plain")]) == 0
    root = zarr.open_group(project / "plain", mode="r")
    assert root["rows/0/t5xxl"].dtype == "int8"
    by_hand = root["rows/0/t5xxl"][:] * root["rows/0/t5xxl_scale"][:].repeat(64, axis=2)
    back = [row_to_torch(readers[1].row(number))["t5xxl"].numpy() for number in range(4)]
    assert (by_hand == back).all()
    assert encode(base, project, "--t5xxl-row-dtype", "int8")["encoded"] == 4  # nothing dense is taken for it


@pytest.mark.long
def test_prompts_come_from_packed_rows(base, project):
    (project / "prompts.txt").write_text("a cat --w 64 --h 64\n")
    found = []
    for name, more in (("dense", ()), ("packed", ("--t5xxl-row-dtype", "int8"))):
        out = project / "caches" / name
        encode(base, project, "--sample-prompts", project / "prompts.txt", "--out", out, *more)
        (prompt,) = read_prompts(out)
        found.append(prompt.text.context)
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert 0 < error < 0.01
