"""fp8 files: a plain cast is cast back, scales are applied, and a scale that is not understood is refused."""

import json

import pytest
import torch
from support.tiny_parts import TINY_T5, random_tensors, save_part, tiny_parts

from sd3pipe.errors import InputError
from sd3pipe.models.checkpoint import load_mmdit
from sd3pipe.models.sources import find_component
from sd3pipe.tensors.reader import read_tensors

FP8 = torch.float8_e4m3fn
WEIGHTS = random_tensors(TINY_T5.shapes(), torch.float32, seed=0)
LINEAR = "encoder.block.1.layer.1.DenseReluDense.wo"


def _is_linear(key, tensor):
    return tensor.dim() == 2 and "shared" not in key and "relative" not in key


def _scaled(suffix, *, per_row=False):
    """T5 as a scaled fp8 file stores it, and what the weights are then."""
    stored, meant = {}, {}
    for key, tensor in WEIGHTS.items():
        if not _is_linear(key, tensor):
            stored[key] = tensor.half()
            meant[key] = stored[key].float()
            continue
        scale = (tensor.abs().amax(dim=1, keepdim=True) if per_row else tensor.abs().max()) / 448
        stored[key] = (tensor / scale).to(FP8)
        stored[key.removesuffix(".weight") + suffix] = scale
        meant[key] = stored[key].float() * scale
    return stored, meant


def _read(tmp_path, stored, dtype=torch.float32):
    file = save_part(tmp_path / "t5xxl_fp8.safetensors", stored)
    return read_tensors(find_component("t5xxl", model=None, file=file).tensors, dtype=dtype)


def test_plain_fp8_is_cast(tmp_path):
    stored = {key: tensor.to(FP8) for key, tensor in WEIGHTS.items()}
    for key, tensor in _read(tmp_path, stored, torch.bfloat16).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, stored[key].to(torch.bfloat16)), key


def test_plain_fp8_mmdit_loads(tmp_path):
    stored = {key: tensor.to(FP8) for key, tensor in tiny_parts()["mmdit"].items()}
    mmdit = load_mmdit(save_part(tmp_path / "mmdit.safetensors", stored), dtype=torch.bfloat16)
    assert all(torch.equal(tensor, stored[key].bfloat16()) for key, tensor in mmdit.state_dict().items())


@pytest.mark.parametrize("per_row", [False, True], ids=["one scale", "one a row"])
@pytest.mark.parametrize("suffix", [".scale_weight", ".weight_scale"])
def test_scales_are_applied(tmp_path, suffix, per_row):
    stored, meant = _scaled(suffix, per_row=per_row)
    found = _read(tmp_path, stored | {"scaled_fp8": torch.zeros(2, dtype=FP8)})
    assert found.keys() == meant.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, meant[key]), key
        assert (tensor - WEIGHTS[key]).norm() < 0.04 * WEIGHTS[key].norm(), "fp8 has a relative error near 2.6 %"


def test_scale_is_applied_in_float32_and_rounded_once(tmp_path):
    stored, meant = _scaled(".scale_weight")
    found = _read(tmp_path, stored, torch.bfloat16)
    assert torch.equal(found[f"{LINEAR}.weight"], meant[f"{LINEAR}.weight"].bfloat16())


def test_pieces_of_a_large_tensor_get_the_scale_of_their_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("sd3pipe.tensors.reader._STAGING_BYTES", 5000)  # ends inside a row
    stored, meant = _scaled(".weight_scale", per_row=True)
    assert all(torch.equal(tensor, meant[key]) for key, tensor in _read(tmp_path, stored).items())


def test_scales_for_multiplying_inputs_change_no_weight(tmp_path):
    stored, meant = _scaled(".weight_scale")
    stored |= {
        f"{LINEAR}.input_scale": torch.tensor(2.0),
        "encoder.block.0.layer.0.SelfAttention.q.scale_input": torch.tensor(3.0),
    }
    assert torch.equal(_read(tmp_path, stored)[f"{LINEAR}.weight"], meant[f"{LINEAR}.weight"])


def _note(value):
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def test_format_note_of_e4m3_is_understood(tmp_path):
    stored, meant = _scaled(".weight_scale")
    stored |= {f"{LINEAR}.comfy_quant": _note({"format": "float8_e4m3fn"})}
    assert torch.equal(_read(tmp_path, stored)[f"{LINEAR}.weight"], meant[f"{LINEAR}.weight"])


REFUSED = {
    "unknown name": ({f"{LINEAR}.scale": torch.tensor(1.0)}, "not understood"),
    "second scale": ({f"{LINEAR}.weight_scale_2": torch.tensor(1.0)}, "not understood"),
    "block scales": ({f"{LINEAR}.weight_scale": torch.ones(64, 3)}, "understood is one float, or one a row"),
    "integer scale": ({f"{LINEAR}.weight_scale": torch.tensor(1)}, "understood is one float, or one a row"),
    "scale of a norm": ({"encoder.final_layer_norm.scale_weight": torch.tensor(1.0)}, "which is F16, not fp8"),
    "scale of nothing": ({"encoder.block.9.weight_scale": torch.tensor(1.0)}, "which is not there"),
    "other format": ({f"{LINEAR}.comfy_quant": _note({"format": "nvfp4"})}, "says the format 'nvfp4'"),
    "damaged note": ({f"{LINEAR}.comfy_quant": torch.zeros(9, dtype=torch.uint8)}, "says the format None"),
    "infinite scale": ({f"{LINEAR}.weight_scale": torch.tensor(torch.inf)}, "not a finite number"),
}


@pytest.mark.parametrize("extra, reason", REFUSED.values(), ids=REFUSED.keys())
def test_scale_that_is_not_understood_is_refused(tmp_path, extra, reason):
    stored, _ = _scaled(".weight_scale")
    with pytest.raises(InputError, match=reason) as error:
        _read(tmp_path, stored | extra)
    assert "t5xxl_fp8.safetensors" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "marker",
    [{"scaled_fp8": torch.zeros(2, dtype=FP8)}, {f"{LINEAR}.comfy_quant": _note({"format": "float8_e4m3fn"})}],
    ids=["marker", "note"],
)
def test_scaled_weight_without_its_scale_is_refused(tmp_path, marker):
    stored, _ = _scaled(".weight_scale")
    del stored[f"{LINEAR}.weight_scale"]
    with pytest.raises(InputError, match=f"without the scale of {LINEAR}.weight"):
        _read(tmp_path, stored | marker)


def test_scale_enters_the_fingerprint(tmp_path):
    stored, _ = _scaled(".scale_weight")
    other = stored | {f"{LINEAR}.scale_weight": stored[f"{LINEAR}.scale_weight"] * 2}
    newer, _ = _scaled(".weight_scale")
    fingerprints = [
        find_component("t5xxl", model=None, file=save_part(tmp_path / f"{name}.safetensors", tensors)).fingerprint()
        for name, tensors in {"one": stored, "other": other, "newer": newer}.items()
    ]
    assert fingerprints[0] != fingerprints[1]
    assert fingerprints[0] == fingerprints[2], "how a scale is called does not change the weights"
