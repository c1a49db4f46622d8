"""Options come from the command line, a file, project.toml and defaults; every problem is named at once."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import model_validator

from sd3pipe.config import Project, find_project, read_project
from sd3pipe.errors import ParameterError
from sd3pipe.params.export import ExportParams
from sd3pipe.params.fields import OptionPath, Params, option
from sd3pipe.params.plan import PlanParams
from sd3pipe.params.resolve import resolve
from sd3pipe.params.train import TrainParams


class ToyParams(Params):
    model: str = option(
        ..., "Model to use.", role="path", paths_key="model", aliases=("pretrained_model_name_or_path",)
    )
    text: OptionPath | None = option(None, "Cache.", role="path", paths_key="caches/text")
    network_dim: int = option(16, "Rank.", ge=1)
    learning_rate: float = option(1e-4, "Step size.", gt=0)
    training_shift: float | Literal["auto"] = option("auto", "Shift.")
    gradient_checkpointing: bool = option(True, "Recompute.")
    optimizer_type: str = option("AdamW", "Optimizer.", trust="code")
    allow_code: bool = option(False, "Import what a file names.", trust="typed")
    optimizer_args: tuple[str, ...] = option((), "Arguments.")
    mixed_precision: Literal["auto", "no", "bf16"] = option("auto", "Precision.")


class OtherStageParams(Params):
    latent_mode: str = option("moments", "What to keep.")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def resolved(given: dict | None = None, **kwargs) -> ToyParams:
    stages = {"encode_latents": OtherStageParams, "train": ToyParams}
    return resolve(ToyParams, "train", {"model": "m", **(given or {})}, stage_models=lambda: stages, **kwargs)


def test_command_line_text_is_parsed():
    params = resolved(
        {
            "network_dim": "8",
            "learning_rate": "1e-3",
            "training_shift": "3",
            "optimizer_args": ["a=1", "b=2"],
            "text": "t",
        }
    )
    assert (params.network_dim, params.learning_rate, params.training_shift) == (8, 1e-3, 3.0)
    assert params.optimizer_args == ("a=1", "b=2")
    assert params.text == Path("t")


def test_precedence_is_option_file_project_default(tmp_path):
    config = write(tmp_path / "c.toml", 'network_dim = 4\nlearning_rate = 2e-4\nmodel = "from-file"\n')
    project = Project(folder=tmp_path, paths={"model": "from-project", "caches": "c"})
    stages = {"train": ToyParams}
    params = resolve(
        ToyParams, "train", {"network_dim": "32"}, config=config, project=project, stage_models=lambda: stages
    )
    assert params.network_dim == 32
    assert params.learning_rate == 2e-4
    assert Path(params.model) == tmp_path / "from-file"
    assert params.text == Path("c/text")
    assert params.gradient_checkpointing is True


def test_the_command_line_beats_what_overrides_it_in_a_file(tmp_path, caplog):
    caplog.set_level("INFO")
    config = write(tmp_path / "train.toml", "max_train_epochs = 10\nmax_train_steps = 500\n")
    paths = {name: str(tmp_path / name) for name in ("model", "text", "latents", "out")}
    in_file = resolve(TrainParams, "train", paths, config=config)
    assert (in_file.max_train_epochs, in_file.max_train_steps) == (10, 500)
    assert not caplog.messages
    typed = resolve(TrainParams, "train", {**paths, "max_train_steps": "100"}, config=config)
    assert (typed.max_train_epochs, typed.max_train_steps) == (None, 100)
    assert caplog.messages == [f"{config}: max_train_epochs = 10: left out for --max-train-steps"]
    both = resolve(TrainParams, "train", {**paths, "max_train_steps": "100", "max_train_epochs": "2"}, config=config)
    assert both.max_train_epochs == 2


def test_table_names_are_headings_only(tmp_path):
    config = write(
        tmp_path / "c.toml", "[network]\nnetwork_dim = 4\n[optimizer]\n[optimizer.deep]\nlearning_rate = 1\n"
    )
    params = resolved(config=config)
    assert (params.network_dim, params.learning_rate) == (4, 1.0)


def test_alias_is_taken_in_a_file(tmp_path):
    config = write(tmp_path / "c.toml", 'pretrained_model_name_or_path = "other"\n')
    params = resolve(ToyParams, "train", {}, config=config)
    assert params.model == "other"


def test_a_key_is_named_as_the_file_has_it(tmp_path):
    config = write(tmp_path / "c.toml", "pretrained_model_name_or_path = 3\n")
    with pytest.raises(ParameterError, match="pretrained_model_name_or_path = 3"):
        resolve(ToyParams, "train", {}, config=config)


def test_a_project_file_is_no_parameter_file(tmp_path):
    config = write(tmp_path / "project.toml", '[paths]\nexport = "e"\nrun = "r"\ncaches = "c"\n')
    with pytest.raises(ParameterError) as caught:
        resolve(ToyParams, "train", {}, config=config)
    assert str(caught.value).endswith(f"options of train stand in {tmp_path / 'stages' / 'train.toml'}")
    assert len(str(caught.value).splitlines()) == 1


def test_every_problem_of_a_file_is_named_at_once(tmp_path):
    config = write(
        tmp_path / "c.toml",
        'network_dmi = 8\nlearning_rate = "fast"\ngradient_checkpointing = 1\nlatent_mode = "mean"\n'
        'noise_offset = 0.1\nmixed_precision = "fp8"\nnetwork_dim = 0\n',
    )
    with pytest.raises(ParameterError) as caught:
        resolved(config=config)
    lines = str(caught.value).splitlines()
    assert len(lines) == 7
    text = "\n".join(lines)
    assert "network_dmi: unknown key (did you mean network_dim?)" in text
    assert "learning_rate = fast" in text
    assert "gradient_checkpointing = 1" in text
    assert "latent_mode: belongs to the stage encode-latents: move it to stages/encode_latents.toml" in text
    assert "noise_offset: not supported" in text
    assert all(str(config) in line for line in lines)


def test_met_wishes_are_taken_with_a_line(tmp_path, caplog):
    config = write(
        tmp_path / "c.toml",
        'sdpa = true\ncache_latents = true\nnetwork_module = "networks.lora_sd3"\nnetwork_dim = 2\n',
    )
    with caplog.at_level("INFO"):
        assert resolved(config=config).network_dim == 2
    assert sum("c.toml" in record.getMessage() for record in caplog.records) == 3


def test_unmet_wish_is_refused(tmp_path):
    config = write(tmp_path / "c.toml", 'network_module = "networks.lora"\n')
    with pytest.raises(ParameterError, match=r"only networks\.lora_sd3"):
        resolved(config=config)


def test_missing_required_option_names_its_places():
    with pytest.raises(ParameterError, match=r"--model is missing.*paths\.model in project\.toml"):
        resolve(ToyParams, "train", {})


def test_project_is_found_in_a_folder_above_and_its_paths_are_its_own(tmp_path, monkeypatch):
    write(tmp_path / "project.toml", '[paths]\nmodel = "models/sd3.safetensors"\njudge_model = "owner/name"\n')
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    project = find_project(Path.cwd())
    assert project is not None and project.folder == tmp_path
    assert Path(project.paths["model"]) == tmp_path / "models" / "sd3.safetensors"
    assert project.paths["judge_model"] == "owner/name"


def test_only_a_model_may_be_a_hub_id(tmp_path, monkeypatch):
    """Nothing lies in runs/ and caches/ yet, and the command is called from another folder."""
    (tmp_path / "star").mkdir()
    (tmp_path / "star" / "project.toml").write_text(
        '[paths]\nmodel = "owner/name"\njudge_model = "owner/looks"\nrun = "runs/star"\nvae = "models/vae"\n'
    )
    monkeypatch.chdir(tmp_path)
    assert read_project(tmp_path / "star").paths == {
        "model": "owner/name",
        "judge_model": "owner/looks",
        "run": "star/runs/star",
        "vae": "star/models/vae",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[paths]\nmodel = 3\n", "must be a string"),
        ("[path]\n", "unknown table"),
        ("a = [\n", "not valid TOML"),
    ],
)
def test_bad_project_file_is_one_line(tmp_path, text, expected):
    write(tmp_path / "project.toml", text)
    with pytest.raises(ParameterError, match=expected):
        find_project(tmp_path)


@pytest.mark.parametrize("stage", ["encode-text", "encode-latents"])
def test_a_project_with_imported_rows_is_told_what_to_do(tmp_path, stage):
    project = Project(folder=tmp_path, paths={"model": "m", "caches": "c", "imported": "c/imported"})
    with pytest.raises(ParameterError, match=r"project\.toml: paths\.imported: not supported: .* remove the key"):
        resolve(ToyParams, stage, {}, project=project)
    assert resolve(ToyParams, "train", {}, project=project).text == Path("c/text")


def test_imported_rows_in_a_stage_file_are_told_what_to_do(tmp_path):
    config = write(tmp_path / "c.toml", 'imported = "caches/imported"\n')
    with pytest.raises(ParameterError, match=r"imported: not supported: .* remove the key"):
        resolved(config=config)


def test_non_utf8_file_is_named(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"network_dim = 1 # \xff\n")
    with pytest.raises(ParameterError, match=r"c\.toml: is not UTF-8"):
        resolved(config=tmp_path / "c.toml")


def test_a_choice_that_is_none_names_the_nearest():
    with pytest.raises(ParameterError) as caught:
        resolved({"mixed_precision": "bf61"})
    assert str(caught.value) == "--mixed-precision bf61: must be 'auto', 'no' or 'bf16' (did you mean bf16?)"


class TogetherParams(Params):
    stages: tuple[Literal["train", "export"], ...] = option((), "Stages.", positional=True)
    first: bool = option(True, "First.")

    @model_validator(mode="after")
    def _check(self) -> "TogetherParams":
        if not self.first:
            raise ValueError("needs first")
        return self


def test_problems_are_told_in_the_users_words():
    with pytest.raises(ParameterError, match=r"^toy: needs first$"):
        resolve(TogetherParams, "toy", {"first": False})
    with pytest.raises(ParameterError, match=r"^STAGES .*must be 'train' or 'export' \(did you mean train\?\)$"):
        resolve(TogetherParams, "toy", {"stages": ["trian"]})


def test_a_path_of_no_letters_is_refused(tmp_path):
    """As a variable leaves it that the shell does not know; it would be the current folder."""
    file = tmp_path / "toy.toml"
    file.write_text('text = ""\n')
    project = Project(folder=tmp_path, paths={})
    with pytest.raises(ParameterError) as raised:
        resolve(ToyParams, "toy", {"model": ""}, config=file, project=project)
    assert str(raised.value).splitlines() == [
        f"{file}: text = '': is empty, and the path of a file or folder is wanted",
        "--model '': is empty, and the path of a file or folder is wanted",
    ]


@pytest.mark.parametrize("number", ["inf", "nan", "-inf"])
def test_a_number_without_end_is_refused(tmp_path, number):
    file = tmp_path / "toy.toml"
    file.write_text(f"learning_rate = {number}\n")
    for given, config in (({"learning_rate": number}, None), ({}, file)):
        with pytest.raises(ParameterError, match=r"learning.rate.*must be a finite number"):
            resolve(ToyParams, "toy", {"model": "m", **given}, config=config)


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_run_is_not_laid_around_the_current_folder(tmp_path, monkeypatch, out):
    """Another run in its place would set all of that aside."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    with pytest.raises(ParameterError, match=f"--out {out}: is the current folder, or holds it"):
        resolve(TrainParams, "train", {"model": "m", "text": "t", "latents": "l", "out": out})


def test_a_form_is_told_in_words():
    """And not as the regular expression that checks it."""
    for value in ("512x", "0", "1024,0"):
        told = f"--resolution {value}: is not of the form that is wanted: .*such as 1024 or 768,512"
        with pytest.raises(ParameterError, match=told):
            resolve(PlanParams, "plan", {"resolution": value})


def test_a_missing_file_names_the_nearest_and_a_folder_is_told(tmp_path):
    write(tmp_path / "train.toml", "")
    with pytest.raises(ParameterError, match=r"no such file \(did you mean .*train\.toml\?\)"):
        resolved(config=tmp_path / "trian.toml")
    with pytest.raises(ParameterError, match="is a folder: name a file"):
        resolved(config=tmp_path)


@pytest.mark.parametrize(
    ("in_file", "given", "out"),
    [
        ("", {}, "exports/cat.safetensors"),
        ("", {"format": "comfyui"}, "exports/cat.safetensors"),
        ("", {"format": "diffusers"}, "exports/cat-diffusers.safetensors"),
        ("", {"format": "diffusers", "out": "mine.safetensors"}, "mine.safetensors"),
        ('format = "diffusers"', {}, "exports/cat.safetensors"),
        ('format = "diffusers"', {"format": "comfyui"}, "exports/cat-comfyui.safetensors"),
    ],
)
def test_an_export_of_another_format_than_the_projects_lies_beside_it(tmp_path, monkeypatch, in_file, given, out):
    write(tmp_path / "project.toml", '[paths]\nrun = "runs/cat"\nexport = "exports/cat.safetensors"\n')
    write(tmp_path / "stages" / "export.toml", in_file)
    monkeypatch.chdir(tmp_path)
    assert resolve(ExportParams, "export", given, project=find_project(tmp_path)).out == Path(out)


@pytest.mark.parametrize("name", ["os.system", "theirs.Optimizer", "torch.hub.load"])
def test_code_that_a_file_names_needs_the_user_s_word(tmp_path, name):
    config = write(tmp_path / "train.toml", f'optimizer_type = "{name}"')
    with pytest.raises(ParameterError) as caught:
        resolved(config=config)
    assert str(caught.value) == (
        f"{config}: optimizer_type = {name}: would be imported and run: pass --allow-code if you trust it, "
        f"or say --optimizer-type {name} yourself"
    )
    assert resolved({"allow_code": True}, config=config).optimizer_type == name
    assert resolved({"optimizer_type": name}).optimizer_type == name


@pytest.mark.parametrize("name", ["AdamW8bit", "prodigy", "torch.optim.NAdam"])
def test_short_names_and_torch_s_own_optimizers_need_none(tmp_path, name):
    assert resolved(config=write(tmp_path / "train.toml", f'optimizer_type = "{name}"')).optimizer_type == name


def test_a_file_cannot_give_that_word_itself(tmp_path):
    config = write(tmp_path / "train.toml", 'allow_code = true\noptimizer_type = "os.system"')
    with pytest.raises(ParameterError) as caught:
        resolved(config=config)
    assert "allow_code: is for the command line alone: --allow-code" in str(caught.value)
    assert "optimizer_type = os.system: would be imported" in str(caught.value)
