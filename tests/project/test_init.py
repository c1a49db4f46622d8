"""`init` writes a project that the other commands take as it is."""

import tomllib

import pytest
import yaml
from support.command_line import forked
from support.photographs import write_photographs
from support.tiny_base import write_tiny_base

from sd3pipe.config import read_project
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.image_dirs import read_image_dir
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.resolve import resolve
from sd3pipe.project.recipes import fitting_advice
from sd3pipe.stages import stages_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("init")
    base = write_tiny_base(folder / "models", variant="sd35-medium", layout="separate")
    images = write_photographs(folder / "photos", ("chelsea.png", "coffee.png", "rocket.jpg"), 96)
    (images / "rocket.txt").unlink()
    done = forked(
        "init", "mycat", "--model", base.model, "--images", images, "--trigger", "mycat",
        "--tokenizers", base.tokenizers, "--resolution", 256, "--vram", "12GB",
        "--loras-dir", folder / "loras", cwd=folder,
    )  # fmt: skip
    return folder / "mycat", done.stdout


def test_it_counts_what_it_found(made):
    assert "3 pictures, 2 with a caption, 1 without" in made[1]


def test_encoders_beside_the_model_are_found(made):
    paths = tomllib.loads((made[0] / "project.toml").read_text())["paths"]
    assert paths["clip_l"].endswith("clip_l.safetensors") and paths["t5xxl"].endswith("t5xxl_fp16.safetensors")
    assert (paths["caches"], paths["run"], paths["export"]) == ("caches", "runs/mycat", "exports/mycat.safetensors")


def test_dataset_file_has_the_trigger_before_every_caption(made):
    tables = tomllib.loads((made[0] / "dataset.toml").read_text())
    assert tables["general"]["bucket_no_upscale"] is True
    assert tables["datasets"][0]["subsets"][0]["caption_prefix"] == "mycat,"


def test_every_stage_file_is_accepted_by_its_stage(made):
    models = load_stage_models()
    files = {file.stem for file in (made[0] / "stages").glob("*.toml")}
    assert files == {stage.module for stage in stages_of(read_project(made[0]).paths)}
    for stage, model in ((stage, models[stage]) for stage in files):
        given = {name: "x" for name, field in model.model_fields.items() if field.is_required()}
        file = made[0] / "stages" / f"{stage}.toml"
        params = resolve(model, stage, given, config=file)
        written = tomllib.loads(file.read_text())
        assert {name: params.model_dump(mode="json")[name] for name in written} == written


def test_a_captioner_is_a_stage_before_the_captions_are_encoded(made, tmp_path):
    forked(
        "init", "cats", "--model", "owner/model", "--for", "sd35-medium", "--images", made[0].parent / "photos",
        "--caption", "owner/captioner", cwd=tmp_path,
    )  # fmt: skip
    project = tmp_path / "cats"
    assert load_dataset(project / "dataset.toml").subsets[0].caption_cache == project / "caches/captions"
    assert (project / "stages" / "caption.toml").is_file() and not (made[0] / "stages" / "caption.toml").exists()
    stages = yaml.safe_load((project / "dvc.yaml").read_text())["stages"]
    assert list(stages)[:2] == ["caption", "encode_text"]
    assert stages["caption"]["cmd"][0].endswith("--write none")
    assert "${paths.caches}/captions" in stages["encode_text"]["deps"]
    assert "captions" not in stages["encode_text"]["cmd"][0]


def test_chosen_values_say_where_they_come_from(made):
    text = (made[0] / "stages" / "train.toml").read_text()
    assert "Chosen for sd35-medium, object:" in text


def test_a_card_leaves_train_to_choose_what_is_streamed(made):
    train = tomllib.loads((made[0] / "stages" / "train.toml").read_text())
    assert train["blocks_to_swap"] == "auto" and train["optimizer_type"] == "AdamW8bit"
    assert train["gradient_checkpointing"] == "auto" and not {"modulation", "activation_offload"} & set(train)


def test_a_card_too_small_for_dense_blocks_packs_them():
    shapes = MMDiTArchitecture(depth=38, pos_embed_max=192, qk_norm=True).shapes()
    advice = fitting_advice(shapes, vram_bytes=int(3.1e9), resolution=1024)
    assert advice["base_dtype"].value in ("fp8", "nf4") and advice["blocks_to_swap"].value == "auto"


def project_for(tmp_path, pictures, *options, variant="sd35-large"):
    """Returns the values that init writes for train and encode-text, and what it says, for so many pictures."""
    for number in range(pictures):
        path = tmp_path / "photos" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not looked into")
    given = ("--model", "a/b", "--for", variant, "--images", "photos", *options)
    done = forked("init", ".", *given, cwd=tmp_path)
    train, text = ((tmp_path / f"stages/{stage}.toml").read_text() for stage in ("train", "encode_text"))
    return tomllib.loads(train), tomllib.loads(text), train, done.stdout


@pytest.mark.parametrize(("pictures", "options", "steps", "epochs"), [
    (20, (), 2000, 100),
    (20, ("--train-batch-size", 4), 500, 100),
    (2, (), 500, 250),
    (30, ("--goal", "style"), 4000, 133),
])  # fmt: skip
def test_steps_follow_from_pictures_and_batch_and_are_told_as_epochs(tmp_path, pictures, options, steps, epochs):
    train, _, _, said = project_for(tmp_path, pictures, *options)
    assert (train["max_train_steps"], train["train_batch_size"]) == (steps, 4 if "--train-batch-size" in options else 1)
    assert f"{steps:,} steps: about {epochs} epochs of {pictures} pictures" in said


def test_a_person_trains_attention_alone_and_is_told_why(tmp_path):
    train, _, text, _ = project_for(tmp_path, 3, "--goal", "person")
    assert train["train_layers"] == "attention" and "second-hand" in text


@pytest.mark.parametrize(("word", "same"), [("subject", "object"), ("concepts", "concept")])
def test_goals_have_other_words(tmp_path, word, same):
    texts = []
    for goal in (word, same):
        (tmp_path / goal).mkdir()
        texts.append(project_for(tmp_path / goal, 3, "--goal", goal)[2])
    assert texts[0] == texts[1]


def test_what_goes_to_comfyui_is_padded_as_there(tmp_path):
    for name, options in (("a", ("--loras-dir", "loras")), ("b", ())):
        (tmp_path / name).mkdir()
        assert project_for(tmp_path / name, 3, *options)[1].get("t5_pad_to") == (77 if options else None)


def test_steps_to_comfyui_add_up_pictures_whose_captions_differ_in_length(tmp_path):
    options = ("--loras-dir", "loras", "--train-batch-size", 4)
    train, text, _, said = project_for(tmp_path, 20, *options)
    assert text["t5_pad_to"] == 77 and train["max_train_steps"] == 500
    assert (train["train_batch_size"], train["gradient_accumulation_steps"]) == (1, 4)
    assert "gradient_accumulation_steps = 4: as many pictures a step" in said


def test_a_trigger_stands_in_the_adapters_metadata(tmp_path):
    assert project_for(tmp_path, 3, "--trigger", "mycat")[0]["metadata_trigger_phrase"] == "mycat"


@pytest.mark.parametrize(("variant", "clipped"), [("sd3-medium", 1.0), ("sd35-medium", 1.0), ("sd35-large", 0.1)])
def test_where_sources_contradict_each_other_the_file_says_so(tmp_path, variant, clipped):
    train, _, text, _ = project_for(tmp_path, 3, variant=variant)
    assert (train["learning_rate"], train["network_dim"], train["max_grad_norm"]) == (1e-4, 16, clipped)
    assert "nobody has measured" in " ".join(text.replace("#", "").split())


def test_a_second_init_overwrites_nothing(made):
    folder, _ = made
    base = folder.parent / "models" / "sd35-medium.safetensors"
    done = forked("init", "mycat", "--model", base, "--images", folder.parent / "photos", cwd=folder.parent, expect=2)
    assert "are not overwritten" in done.stderr


def test_missing_answers_are_asked_for_by_option(tmp_path):
    assert "--model is missing" in forked("init", "x", cwd=tmp_path, expect=2).stderr


def test_a_folder_without_pictures_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    done = forked("init", "x", "--model", "m", "--for", "sd35-large", "--images", "empty", cwd=tmp_path, expect=3)
    assert "holds no picture" in done.stderr


@pytest.mark.long
def test_paths_with_blanks_are_quoted_where_a_shell_reads_them(tmp_path):
    base = write_tiny_base(tmp_path / "my models", variant="sd35-medium", layout="single")
    write_photographs(tmp_path / "a b" / "photo set", ("chelsea.png",), 96)
    done = forked("init", "a b", "--model", base.model, "--images", tmp_path / "a b" / "photo set", cwd=tmp_path)
    assert 'next: cd "a b" && sd3pipe preview' in done.stdout
    text = (tmp_path / "a b" / "dvc.yaml").read_text()
    assert 'sd3pipe encode-latents --model "${paths.model}" --dataset ${paths.dataset}' in text
    assert "\n      - photo set\n" in text


@pytest.mark.parametrize("folder", ["~x", "s3:x", "C:x"])
def test_a_folder_that_would_be_misread_is_named_whole(tmp_path, folder):
    write_photographs(tmp_path / folder, ("chelsea.png",), 96)
    forked("init", ".", "--model", "a/b", "--for", "sd35-large", "--images", tmp_path / folder, cwd=tmp_path)
    tables = tomllib.loads((tmp_path / "dataset.toml").read_text())
    assert tables["datasets"][0]["subsets"][0]["image_dir"] == str(tmp_path / folder)


def test_a_name_is_no_path(tmp_path):
    write_photographs(tmp_path / "photos", ("chelsea.png",), 96)
    given = ("--model", "a/b", "--for", "sd35-large", "--images", "photos", "--name", "../x")
    assert "--name" in forked("init", "p", *given, cwd=tmp_path, expect=2).stderr


def test_the_same_init_completes_what_is_half_there(tmp_path):
    write_photographs(tmp_path / "photos", ("chelsea.png",), 96)
    given = ("init", "p", "--model", "a/b", "--for", "sd35-large", "--images", "photos")
    forked(*given, cwd=tmp_path)
    before = {file: file.read_bytes() for file in (tmp_path / "p").rglob("*") if file.is_file()}
    for name in ("stages/train.toml", "dvc.yaml"):
        (tmp_path / "p" / name).unlink()
    assert "p: 2 files written" in forked(*given, cwd=tmp_path).stdout
    assert {file: file.read_bytes() for file in (tmp_path / "p").rglob("*") if file.is_file()} == before


@pytest.mark.long
def test_what_was_not_found_is_named(tmp_path):
    base = write_tiny_base(tmp_path / "models", variant="sd35-medium", layout="separate")
    base.tokenizers.rename(tmp_path / "elsewhere")
    next(base.model.parent.rglob("clip_g.safetensors")).unlink()
    write_photographs(tmp_path / "photos", ("chelsea.png",), 96)
    done = forked("init", "p", "--model", base.model, "--images", "photos", cwd=tmp_path)
    told = [line for line in done.stdout.splitlines() if line.startswith("not found")]
    assert [line.split(" in p/project.toml: ")[0] for line in told] == [
        "not found, so fill in paths.clip_g", "not found, so fill in paths.tokenizers",
    ]  # fmt: skip
    assert "holds no CLIP-G" in told[0] and "sd3pipe tokenizers" in told[1]


def test_a_hub_id_is_not_looked_into(tmp_path):
    write_photographs(tmp_path / "photos", ("chelsea.png",), 96)
    done = forked("init", "p", "--model", "a/b", "--for", "sd35-large", "--images", "photos", cwd=tmp_path)
    assert "not found" not in done.stdout


def made_of_folders(tmp_path, names, *options):
    """Returns the subsets that init writes for pictures of these names below photos/, and what it says."""
    for name in names:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a caption") if name.endswith(".txt") else path.write_bytes(b"not looked into")
    given = ("--model", "a/b", "--for", "sd35-large", "--images", "photos", *options)
    done = forked("init", ".", *given, cwd=tmp_path)
    subsets = load_dataset(tmp_path / "dataset.toml").subsets
    return {subset.image_dir.relative_to(tmp_path).as_posix(): subset for subset in subsets}, done.stdout


def test_folders_named_as_sd_scripts_has_them_become_subsets_with_their_repeats(tmp_path):
    names = [
        "10_ohwx cat/a.png",
        "10_ohwx cat/a.txt",
        "10_ohwx cat/g.png",
        "2_dog/b.png",
        "2_dog/more/c.png",
        "sea/d.png",
        "e.png",
        "2024_x/f.png",
    ]
    subsets, said = made_of_folders(tmp_path, names)
    assert {name: (subset.num_repeats, subset.recursive, subset.class_tokens) for name, subset in subsets.items()} == {
        "photos": (1, False, None),
        "photos/10_ohwx cat": (10, False, "ohwx cat"),
        "photos/2024_x": (1, False, None),
        "photos/2_dog": (2, True, "dog"),
        "photos/sea": (1, False, None),
    }
    assert "photos/2_dog: 2 pictures, 0 with a caption, 2 without, each 2 times" in said
    scanned = [entry.name for subset in subsets.values() for entry in read_image_dir(subset, None).entries]
    assert sorted(scanned) == ["a.png", "b.png", "d.png", "e.png", "f.png", "g.png", "more/c.png"]


def test_folders_of_a_gui_project_are_found_below_img(tmp_path):
    subsets, _ = made_of_folders(tmp_path, ["img/20_cat/a.png", "log/x.json", ".thumbs/a.png"])
    assert {name: subset.num_repeats for name, subset in subsets.items()} == {"photos/img/20_cat": 20}


def test_folders_without_repeats_are_one_subset(tmp_path):
    subsets, _ = made_of_folders(tmp_path, ["a/a.png", "b/b.png", ".hidden/c.png"])
    assert {name: subset.recursive for name, subset in subsets.items()} == {"photos": True}


def test_a_trigger_stands_before_captions_and_the_name_of_a_folder(tmp_path):
    names = ["3_dog/a.png", "3_dog/a.txt", "3_dog/b.png", "4_cat/c.png"]
    subsets, _ = made_of_folders(tmp_path, names, "--trigger", "ohwx")
    dog, cat = subsets["photos/3_dog"], subsets["photos/4_cat"]
    assert (dog.captions.caption_prefix, dog.class_tokens) == ("ohwx,", "dog")
    assert (cat.captions.caption_prefix, cat.class_tokens) == ("ohwx,", "cat")
