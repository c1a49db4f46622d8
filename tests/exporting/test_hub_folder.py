"""`export --format hub`: a folder that the hub takes as it is, in which nothing tells where it was made."""

import json
import re
import shlex

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from support.command_line import report_of
from support.random_adapters import random_adapter
from support.tiny_mmdit import tiny_architecture
from support.written_files import metadata_of, trained_metadata

from sd3pipe.adapters.files import compare, read_adapter, save_adapter
from sd3pipe.adapters.metadata import PROVENANCE_KEY
from sd3pipe.commands.export import main
from sd3pipe.diffusion.picture_grid import save_picture
from sd3pipe.errors import ParameterError
from sd3pipe.exporting.published import names_a_place, published
from sd3pipe.params.export import ExportParams
from sd3pipe.params.resolve import resolve

ARCHITECTURE = tiny_architecture("sd35-medium")
WEIGHTS = "pytorch_lora_weights.safetensors"
ADAPTER = random_adapter(ARCHITECTURE, seed=3)
PLACES = ("/home/zoe/pictures", "~/secret", "C:\\Users\\zoe", "d:/ada", "\\\\server\\share\\x", "../ada/x", "./ada")
PRIVATE = ("zoe", "secretfolder", "myrun", "private", "comment of mine")


def private_metadata():
    """Metadata of a training in folders whose names are nobody's business, and of a program that writes more."""
    keys = trained_metadata(400) | {
        "modelspec.title": "myrun",
        "ss_output_name": "myrun",
        "ss_sd_model_name": "private.safetensors",
        "ss_training_comment": "comment of mine",
        "ss_dataset_dirs": json.dumps({"10_secretfolder": {"n_repeats": 10, "img_count": 3}}),
        "ss_tag_frequency": json.dumps({"10_secretfolder": {"private": 3}}),
        "ss_datasets": json.dumps([{"subsets": [{"image_dir": "/home/zoe/10_secretfolder"}]}]),
        "ss_optimizer": "/home/zoe/optimizers.py",
        "unknown_key": "private",
    }
    made_from = json.loads(keys[PROVENANCE_KEY])
    made_from["parameters"]["train"] |= {
        "subsets": {"10_secretfolder": {"num_repeats": 10}},
        "training_comment": "comment of mine",
        "optimizer_type": "C:\\Users\\zoe\\optimizer",
        "out": "/home/zoe/runs/myrun",
        "rank_rules": ["joint_blocks\\.[01]\\.=8"],
    }
    made_from["parameters"]["somewhere-else"] = {"path": "/home/zoe"}
    return keys | {PROVENANCE_KEY: json.dumps(made_from)}


@pytest.fixture
def run(tmp_path):
    """A finished run with samples at three steps, one of them past its end."""
    folder = tmp_path / "secretfolder" / "myrun"
    save_adapter(folder / "final" / "adapter.safetensors", ADAPTER, metadata=private_metadata())
    for step in (0, 200, 500):
        for number, prompt in enumerate(("mycat", 'a "chair": red,\n# in a gärden 🐻')):
            save_picture(
                folder / f"samples/step-{step:08d}/{number:03d}.png",
                np.full((16, 16, 3), step // 2, np.uint8),
                title=prompt,
                parameters=f"{prompt}\nSteps: 4, Seed: {number}",
            )
    return folder


def export(adapter, out, **options):
    main(ExportParams(adapter=adapter, out=out, threads=1, device="cpu", format="hub", **options))
    return report_of(out)


def told(out):
    """All that is published, as text: names of files, the card, the metadata, the texts in the pictures."""
    pictures = [json.dumps(Image.open(file).info, ensure_ascii=False) for file in sorted(out.rglob("*.png"))]
    names = [file.relative_to(out).as_posix() for file in sorted(out.rglob("*"))]
    return "\n".join(
        [*names, (out / "README.md").read_text(encoding="utf-8"), str(metadata_of(out / WEIGHTS)), *pictures]
    )


def test_the_card_is_one_by_the_hubs_own_class(run, tmp_path):
    out = tmp_path / "hub"
    export(run, out, metadata_trigger_phrase="mycat: a cat", metadata_tags="cat, lora", metadata_author="Ada L.")
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
    assert (data["license"], data["license_name"]) == ("other", "stabilityai-ai-community")
    assert {"text-to-image", "lora", "template:sd-lora", "cat"} <= set(data["tags"])
    assert len(data["tags"]) == len(set(data["tags"]))
    assert data["instance_prompt"] == "mycat: a cat" and data["library_name"] == "diffusers"
    assert [item["text"] for item in data["widget"]] == ["mycat", 'a "chair": red,\n# in a gärden 🐻']
    assert "| rank | 4 |" in card.text and "| steps | 400 |" in card.text
    assert "\n# mycat: a cat\n" in card.text


def test_pictures_are_the_last_samples_up_to_the_adapters_step(run, tmp_path):
    out = tmp_path / "hub"
    assert export(run, out)["pictures"] == 2
    data = ModelCard.load(out / "README.md").data.to_dict()
    for number, item in enumerate(data["widget"]):
        picture = Image.open(out / item["output"]["url"])
        assert np.asarray(picture).max() == 100 and picture.info["parameters"].endswith(f"Seed: {number}")
    assert "after 200 steps" in (out / "README.md").read_text(encoding="utf-8")


def test_the_weights_are_the_adapter_in_diffusers_form(run, tmp_path):
    export(run, tmp_path / "hub", dtype="fp32")
    assert all(key.startswith("transformer.") for key in load_file(tmp_path / "hub" / WEIGHTS))
    assert compare(ADAPTER, read_adapter(tmp_path / "hub" / WEIGHTS).adapter)[0] < 1e-6


def test_nothing_published_tells_a_path_or_a_name_of_a_folder(run, tmp_path):
    out = tmp_path / "hub"
    export(run, out)
    for key, value in metadata_of(out / WEIGHTS).items():
        assert not names_a_place(key) and not names_a_place(value), key
    text = told(out)
    assert str(tmp_path) not in text
    found = [word for word in PRIVATE if re.search(rf"\b{word}", text)]
    assert not found


def test_the_full_metadata_does_not_reach_the_card(run, tmp_path):
    out = tmp_path / "hub"
    export(run, out, metadata="full")
    assert metadata_of(out / WEIGHTS)["ss_output_name"] == "myrun"
    assert not any(word in (out / "README.md").read_text(encoding="utf-8") for word in PRIVATE)


def test_the_card_holds_the_command_that_trains_again(run, tmp_path):
    export(run, tmp_path / "hub")
    lines = (tmp_path / "hub/README.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith("sd3pipe train ")]
    words = shlex.split(line)
    assert words[words.index("--network-dim") + 1] == "4"
    assert words[words.index("--rank-rules") + 1] == "joint_blocks\\.[01]\\.=8"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("around", ["{}", "model={}", 'a "{}" b', "[{}]", "x, {}"])
def test_no_value_with_a_path_is_published(place, around):
    said = around.format(place)
    keys = dict.fromkeys(private_metadata(), said) | {"modelspec.description": said, "sd3pipe_merged_from": said}
    assert published(keys) == {}


def test_what_only_looks_like_a_path_is_published():
    words = ("https://github.com/Stability-AI/sd3.5", "cats and/or dogs", "1/2", "attn\\.qkv=8", "a: b", "16:9/4:3")
    for word in words:
        assert published({"modelspec.description": word}) == {"modelspec.description": word}


@pytest.mark.parametrize(("given", "data"), [
    ("MIT", {"license": "mit"}),
    ("My Own, v2", {"license": "other", "license_name": "my-own-v2"}),
])  # fmt: skip
def test_licences_are_called_as_the_hub_calls_them(run, tmp_path, given, data):
    export(run, tmp_path / "hub", metadata_license=given)
    found = ModelCard.load(tmp_path / "hub/README.md").data.to_dict()
    assert {key: found[key] for key in found if key.startswith("license")} == data


def test_a_base_that_the_user_names_by_its_repository_stands_in_the_card(run, tmp_path):
    export(run, tmp_path / "hub", model="someone/tuned-sd3@v2")
    found = ModelCard.load(tmp_path / "hub/README.md").data.to_dict()
    assert found["base_model"] == "someone/tuned-sd3" and "license" not in found


def test_one_line_says_how_to_upload(run, tmp_path, capsys):
    export(run, tmp_path / "my cat")
    last = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(last.partition(": ")[2]) == ["hf", "upload", "YOUR-NAME/my-cat", str(tmp_path / "my cat")]


def test_the_same_again_is_nothing_to_do_and_fewer_pictures_leave_none_behind(run, tmp_path, capsys):
    out = tmp_path / "hub"
    export(run, out)
    capsys.readouterr()
    export(run, out)
    assert "nothing to do" in capsys.readouterr().out
    (run / "samples/step-00000200/001.png").unlink()
    assert export(run, out)["pictures"] == 1
    assert [file.name for file in (out / "images").iterdir()] == ["picture-1.png"]


def test_a_card_that_was_edited_stays(run, tmp_path, caplog):
    out = tmp_path / "hub"
    export(run, out)
    (out / "README.md").write_text("my own words")
    for _ in range(2):
        export(run, out, metadata_author="Ada")
    assert (out / "README.md").read_text() == "my own words" and "delete it" in caplog.text
    assert metadata_of(out / WEIGHTS)["modelspec.author"] == "Ada"


def test_a_file_alone_has_a_card_without_pictures(tmp_path, caplog):
    save_adapter(tmp_path / "a.safetensors", ADAPTER)
    export(tmp_path / "a.safetensors", tmp_path / "hub", metadata="none")
    assert "widget" not in ModelCard.load(tmp_path / "hub/README.md").data.to_dict()
    assert "no sample pictures" in caplog.text


@pytest.mark.parametrize(("options", "message"), [
    ({"out": "x.safetensors"}, "writes a folder"),
    ({"checkpoints": "all"}, "makes one at a time"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(run, tmp_path, options, message):
    out = tmp_path / options.pop("out", "hub")
    with pytest.raises(ParameterError, match=message):
        export(run, out, **options)


def test_files_of_projects_may_hold_the_switch(tmp_path):
    for text, amount in (("true", None), ("false", "none"), ('"public"', "public")):
        (tmp_path / "export.toml").write_text(f"metadata = {text}\n")
        given = {"adapter": "a", "out": "b"}
        assert resolve(ExportParams, "export", given, config=tmp_path / "export.toml").metadata == amount
