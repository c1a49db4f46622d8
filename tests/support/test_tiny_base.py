"""The tiny base: deterministic, in the genuine layouts, with every part where it belongs."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sd3pipe.models.architecture import detect_mmdit
from sd3pipe.models.layouts import COMPONENTS
from sd3pipe.models.sources import find_component
from sd3pipe.models.text_architecture import ENCODERS, detect_clip, detect_t5
from sd3pipe.models.vae_architecture import detect_vae
from support.tiny_base import write_tiny_base

VARIANTS = ("sd3-medium", "sd35-medium", "sd35-large")
LAYOUTS = ("single", "separate", "diffusers")


def sources_of(base):
    files = {name: getattr(base, name) for name in ENCODERS}
    return {name: find_component(name, model=base.model, file=files.get(name)) for name in COMPONENTS}


@pytest.mark.long
@pytest.mark.parametrize(
    "layout, variant",
    [
        *zip(LAYOUTS, VARIANTS, strict=True),
        *(
            pytest.param(layout, variant, marks=pytest.mark.slow)
            for number, layout in enumerate(LAYOUTS)
            for variant in (*VARIANTS[:number], *VARIANTS[number + 1 :])
        ),
    ],
)
def test_every_part_is_found_and_has_its_architecture(tmp_path, variant, layout):
    base = write_tiny_base(tmp_path, variant=variant, layout=layout, depth=3)
    shapes = {name: source.shapes() for name, source in sources_of(base).items()}
    found = detect_mmdit(shapes["mmdit"])
    assert found == base.architecture.mmdit
    assert found.variant == variant
    assert found.dual_attention_blocks == ((0,) if variant == "sd35-medium" else ())
    assert detect_vae(shapes["vae"], "") == base.architecture.vae
    assert detect_clip(shapes["clip_l"], "").projected_width is None
    assert detect_clip(shapes["clip_g"], "") == base.architecture.clip_g
    assert detect_t5(shapes["t5xxl"], "") == base.architecture.t5xxl


@pytest.mark.long
def test_a_part_has_one_fingerprint_in_all_layouts(tmp_path):
    fingerprints = [
        {name: source.fingerprint() for name, source in sources_of(write_tiny_base(tmp_path / x, layout=x)).items()}
        for x in LAYOUTS
    ]
    assert fingerprints[0] == fingerprints[1] == fingerprints[2]


@pytest.mark.long
def test_equal_arguments_give_equal_files(tmp_path):
    files = []
    for name in ("first", "second"):
        base = write_tiny_base(tmp_path / name, layout="separate", t5_storage="fp8_scaled")
        paths = (path for path in base.folder.rglob("*") if path.is_file())
        files.append({str(path.relative_to(base.folder)): path.read_bytes() for path in paths})
    assert files[0] == files[1]
    assert len(files[0]) == 4 + 12


@pytest.mark.long
def test_another_seed_gives_other_weights(tmp_path):
    first, second = (sources_of(write_tiny_base(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    assert all(first[name].fingerprint() != second[name].fingerprint() for name in COMPONENTS)


def test_no_weight_is_zero_throughout(tmp_path):
    tensors = load_file(write_tiny_base(tmp_path).model)
    assert all(tensor.float().std() > 0 for tensor in tensors.values())


def test_separate_files_have_the_strays_of_public_ones(tmp_path):
    base = write_tiny_base(tmp_path, layout="separate", t5_storage="fp8_scaled")
    keys = {}
    for name in ENCODERS:
        with safe_open(getattr(base, name), framework="pt") as file:
            keys[name] = set(file.keys())
    assert "text_model.embeddings.position_ids" in keys["clip_l"]
    assert "text_projection.weight" not in keys["clip_l"]
    assert "logit_scale" in keys["clip_g"]
    assert {"encoder.embed_tokens.weight", "shared.weight", "scaled_fp8"} <= keys["t5xxl"]
    assert sum(key.endswith("scale_weight") for key in keys["t5xxl"]) == 14


def test_bases_are_small(tmp_path):
    base = write_tiny_base(tmp_path)
    assert sum(path.stat().st_size for path in base.folder.rglob("*") if path.is_file()) < 16e6


@pytest.mark.long
def test_diffusers_loads_the_folder(tmp_path):
    from diffusers import StableDiffusion3Pipeline

    base = write_tiny_base(tmp_path, layout="diffusers")
    pipeline = StableDiffusion3Pipeline.from_pretrained(base.model, torch_dtype=torch.float32)
    picture = pipeline("a cat", num_inference_steps=2, height=32, width=32, output_type="np").images
    assert picture.shape == (1, 32, 32, 3)
    assert 0.01 < picture.std() < 1
