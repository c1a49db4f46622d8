"""`sample`: grids with the base first, pictures that exist are skipped, latents kept and decoded elsewhere."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from support.random_runs import write_base_and_prompts, write_random_checkpoints
from support.tiny_training import fill_prompts

from sd3pipe.commands import sample
from sd3pipe.diffusion.prompts import read_prompts
from sd3pipe.diffusion.sheet import Column, cell_name, read_sheet
from sd3pipe.errors import DeviceMemoryError, InputError, ParameterError
from sd3pipe.fingerprint import hash_file
from sd3pipe.params.sample import SampleParams

STEPS = (100, 200, 300)
PROMPTS = """\
a red circle --n blurry --w 64 --h 32 --s 2 --d 5
a blue square --w 32 --h 32 --s 2 --l 1
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny base, a cache of two prompts, and a run with three random adapters as checkpoints."""
    folder = tmp_path_factory.mktemp("sample")
    model = write_base_and_prompts(folder, PROMPTS, cache="prompts")
    write_random_checkpoints(folder / "runs/r", model, STEPS)
    return folder


def params(made: Path, out: Path, **options) -> SampleParams:
    given = {"model": str(made / "base.safetensors"), "prompts": made / "prompts", "threads": 1, **options}
    return SampleParams(out=out, **given)


def pictures(out: Path) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)) for file in sorted((out / "pictures").glob("*.png"))}


@pytest.fixture(scope="module")
def drawn(made, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "out"
    options = {"adapter": made / "runs/r", "checkpoints": "every:2", "multiplier": "0,1", "seeds": "1,2"}
    sample.main(params(made, out, **options))
    return out


def test_pictures_carry_prompt_seed_and_adapter(made, drawn):
    adapter = hash_file(made / "runs/r/checkpoints/step-00000200/adapter.safetensors")[:16]
    said = {file.name: Image.open(file).info["parameters"] for file in (drawn / "pictures").glob("000-*.png")}
    settings = "a red circle\nNegative prompt: blurry\nSteps: 2, Sampler: Euler, CFG scale: 4.5, Seed: 2, Size: 64x32"
    base, adapted = (
        next(said[name] for name in said if f"-{words}-seed2-" in name) for words in ("base", "step-200-x-1")
    )
    assert base == f"{settings}, Shift: 3"
    assert adapted == f"{settings}, Shift: 3, Adapter: {adapter}, Adapter strength: 1"


def test_one_grid_per_prompt_with_the_base_first(drawn):
    sheet = read_sheet(drawn)
    assert sheet.columns == ("base", "step 200 x 0", "step 200 x 1")
    assert [prompt.rows for prompt in sheet.prompts] == [("seed 1", "seed 2")] * 2
    assert len(pictures(drawn)) == 2 * 2 * 3
    for name in ("000.png", "001.png"):
        assert Image.open(drawn / name).width > 3 * 96


def test_strength_zero_is_the_base_and_strength_one_is_not(drawn):
    found = pictures(drawn)
    for prompt in read_sheet(drawn).prompts:
        for line in prompt.cells:
            base, zero, one = (next(found[name] for name in found if name.startswith(cell)) for cell in line)
            assert (base == zero).all()
            assert (base != one).any()


def test_sizes_and_seeds_are_the_prompts_own_unless_named(made, tmp_path):
    sample.main(params(made, tmp_path / "out"))
    found = pictures(tmp_path / "out")
    assert sorted(picture.shape for picture in found.values()) == [(32, 32, 3), (32, 64, 3)]
    assert [prompt.rows for prompt in read_sheet(tmp_path / "out").prompts] == [("seed 5",), ("seed 42",)]


@pytest.mark.long
def test_pictures_that_exist_are_not_drawn_again_and_others_are(made, drawn, tmp_path, monkeypatch):
    out = shutil.copytree(drawn, tmp_path / "out")
    options = {"adapter": made / "runs/r", "checkpoints": "every:2", "multiplier": "0,1"}
    with monkeypatch.context() as patch:
        patch.setattr(sample, "draw_cells", lambda *_, **__: pytest.fail("nothing is missing"))
        sample.main(params(made, out, **options, seeds="1,2"))
    before = {file: file.stat().st_mtime_ns for file in (out / "latents").iterdir()}
    sample.main(params(made, out, **options, seeds="1,3"))
    after = {file: file.stat().st_mtime_ns for file in (out / "latents").iterdir()}
    assert len(after) == len(before) + 2 * 3
    assert before.items() <= after.items()


@pytest.mark.long
def test_another_adapter_of_the_same_name_is_drawn_anew(made, tmp_path):
    folder = shutil.copytree(made / "runs", tmp_path / "runs")
    options = {"adapter": folder / "r", "checkpoints": "100"}
    sample.main(params(made, tmp_path / "out", **options))
    shutil.copy(
        folder / "r/checkpoints/step-00000300/adapter.safetensors",
        folder / "r/checkpoints/step-00000100/adapter.safetensors",
    )
    sample.main(params(made, tmp_path / "out", **options))
    assert len(pictures(tmp_path / "out")) == 2 * 3  # the base once, two adapters


def test_latents_without_vae_are_decoded_elsewhere_to_the_same_pictures(made, drawn, tmp_path):
    tensors = load_file(made / "base.safetensors")
    mmdit = {key: value for key, value in tensors.items() if key.startswith("model.diffusion_model.")}
    vae = {key: value for key, value in tensors.items() if key.startswith("first_stage_model.")}
    save_file(mmdit, tmp_path / "mmdit.safetensors")
    save_file(vae, tmp_path / "vae.safetensors")
    out = tmp_path / "out"
    sample.main(params(made, out, model=str(tmp_path / "mmdit.safetensors"), seeds="1,2"))
    assert not pictures(out)
    assert len(list((out / "latents").iterdir())) == 4
    moved = out.rename(tmp_path / "moved")
    sample.main(SampleParams(out=moved, decode=True, vae=tmp_path / "vae.safetensors", threads=1))
    expected = {name: picture for name, picture in pictures(drawn).items() if "-base-" in name}
    actual = pictures(moved)
    assert expected.keys() == actual.keys()
    assert all((expected[name] == actual[name]).all() for name in expected)
    assert (moved / "000.png").is_file()


@pytest.mark.parametrize(
    ("checkpoints", "labels"),
    [("all", STEPS), ("every:1", STEPS), ("every:3", STEPS[2:]), ("300,100", (300, 100))],
)
def test_checkpoints_are_chosen(made, tmp_path, checkpoints, labels, monkeypatch):
    monkeypatch.setattr(sample, "draw_cells", lambda *_, **__: None)
    sample.main(params(made, tmp_path / "out", adapter=made / "runs/r", checkpoints=checkpoints))
    assert read_sheet(tmp_path / "out").columns == ("base", *(f"step {step}" for step in labels))


def test_missing_checkpoints_are_named_with_those_that_exist(made, tmp_path):
    with pytest.raises(ParameterError, match="has the steps 100, 200, 300, not 150"):
        sample.main(params(made, tmp_path / "out", adapter=made / "runs/r", checkpoints="100,150"))
    with pytest.raises(InputError, match="has no checkpoints"):
        file = made / "runs/r/checkpoints/step-00000100/adapter.safetensors"
        sample.main(params(made, tmp_path / "out", adapter=file, checkpoints="all"))


def test_decode_without_a_sheet_is_refused(made, tmp_path):
    with pytest.raises(InputError, match=r"no sheet\.json"):
        sample.main(SampleParams(out=tmp_path, decode=True, model=str(made / "base.safetensors")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoints": "all"}, "name it with --adapter"),
        ({"prompts": None}, "--prompts is missing"),
        ({"seeds": "1,1"}, "names a value twice"),
        ({"multiplier": "1,x"}, "pattern"),
    ],
)
def test_options_that_contradict_are_refused(made, tmp_path, options, message):
    with pytest.raises(ValidationError, match=message):
        params(made, tmp_path, **options)


def test_a_cache_of_another_kind_is_refused(made, tmp_path):
    with pytest.raises(InputError, match="holds no finished cache"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda sheet: sheet["prompts"][0].update(name="../outside"),
        lambda sheet: sheet["prompts"][0]["cells"][0].insert(0, "n" * 300),
        lambda sheet: sheet["prompts"][0]["cells"][0].pop(),
        lambda sheet: sheet["prompts"][0].pop("title"),
        lambda sheet: sheet.update(columns=3),
        lambda sheet: sheet.update(prompts={"0": []}),
        lambda sheet: sheet.update(format=2),
    ],
)
def test_a_damaged_sheet_is_refused(drawn, tmp_path, change):
    sheet = json.loads((drawn / "sheet.json").read_text(encoding="utf-8"))
    change(sheet)
    (tmp_path / "sheet.json").write_text(json.dumps(sheet), encoding="utf-8")
    with pytest.raises(InputError, match=r"sheet\.json: .*draw again"):
        read_sheet(tmp_path)


def test_a_long_label_still_gives_a_file_name():
    column = Column(label="n" * 250, adapter=Path("n"))
    assert len(cell_name("000", column, 1, "0" * 64)) < 150


@pytest.mark.parametrize(
    "settings", [{"width": 10**9}, {"height": 8}, {"steps": 0}, {"scale": float("nan")}, {"seed": -1}, {"other": 1}]
)
def test_prompts_with_settings_that_no_encode_writes_are_refused(tmp_path, settings):
    fill_prompts(tmp_path / "prompts", [{}, settings])
    with pytest.raises(InputError, match="settings of prompt 2"):
        read_prompts(tmp_path / "prompts")


def test_a_prompt_whose_name_leads_outside_is_refused(tmp_path):
    fill_prompts(tmp_path / "prompts", [{}], first_name="../outside")
    with pytest.raises(InputError, match="name of a prompt"):
        read_prompts(tmp_path / "prompts")


def test_no_memory_to_decode_keeps_the_latents_and_says_so(made, tmp_path, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("sd3pipe.diffusion.drawing.decode_pictures", no_memory)
        with pytest.raises(DeviceMemoryError, match="device ran out of memory: free some of it") as caught:
            sample.main(params(made, tmp_path / "out", seeds="1", device="cpu"))
    assert caught.value.exit_code == 8
    sample.main(SampleParams(out=tmp_path / "out", model=str(made / "base.safetensors"), decode=True, threads=1))
    assert len(pictures(tmp_path / "out")) == 2
