"""A kind of adapter is one class: a new one, whose change depends on the base, goes all the way by one line."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

import pytest
import torch
from support.random_adapters import random_adapter
from support.tiny_mmdit import random_inputs, tiny_architecture, tiny_mmdit

from sd3pipe.adapters.algebra import merge, resize
from sd3pipe.adapters.files import read_adapter, save_adapter
from sd3pipe.adapters.forms import parse
from sd3pipe.adapters.fusing import rows_of_part
from sd3pipe.adapters.kind import AdapterLayer, Delta, on_cpu
from sd3pipe.adapters.kinds import KINDS, check_spec
from sd3pipe.adapters.network import attach, attach_deltas, merge_into
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.words import Algorithm

QKV = "joint_blocks.0.x_block.attn.qkv"


class Gain(AdapterLayer):
    """W + gain W, rows apart."""

    def __init__(self, setup):
        super().__init__(setup)
        self.gain = setup.parameter(setup.out_features)

    @torch.no_grad()
    def reset(self, generator):
        self.gain.zero_()

    def forward(self, x, linear):
        y = linear.base(x)
        return y + self.acting(self.gain * (y - linear.bias))

    def term(self, x):
        raise AssertionError("forward needs none")

    def delta(self):
        return GainDelta(gain=on_cpu(self.gain), columns=self.setup.in_features, alpha=1.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GainDelta(Delta):
    algorithm: ClassVar[str] = "gain"
    title: ClassVar[str] = "Gain"
    part_names: ClassVar[dict[str, tuple[str, ...]]] = {"gain": (".gain",), "columns": (".columns",)}
    layer_class: ClassVar[type[AdapterLayer]] = Gain
    needs_base: ClassVar[bool] = True

    gain: Any
    columns: int

    @property
    def rank(self):
        return 1

    @property
    def shape(self):
        return len(self.gain), self.columns

    def dense(self, dtype=torch.float32):
        return torch.zeros(self.shape, dtype=dtype)

    def change(self, weight_OI, rows=None):
        return (self.gain if rows is None else rows(self.gain))[:, None] * weight_OI

    def _difference(self, other):
        return float((self.gain - other.gain).norm() / self.gain.norm())

    def with_rows(self, rows):
        return replace(self, gain=rows(self.gain))

    @classmethod
    def join(cls, parts):
        none = torch.zeros_like(next(iter(parts.values())).gain)
        gains = [parts[index].gain if index in parts else none for index in range(3)]
        return replace(next(iter(parts.values())), gain=torch.cat(gains))

    @classmethod
    def read(cls, parts):
        return cls(gain=parts.tensors["gain"], columns=int(parts.tensors["columns"]), alpha=parts.alpha(1))

    def file_tensors(self, form, *, patches):
        return {"gain": self.gain, "columns": torch.tensor(self.columns)}


@pytest.fixture(autouse=True)
def gain(monkeypatch):
    monkeypatch.setitem(KINDS, "gain", GainDelta)


def trained():
    """A model with a trained adapter of the new kind on its blocks, and the adapter's deltas."""
    model = tiny_mmdit("sd35-medium")
    network = attach(model, AdapterSpec(algorithm="gain"))  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model, network, network.deltas()


def test_every_word_for_a_kind_is_in_the_table():
    assert set(KINDS) - {"gain", "full"} == set(get_args(Algorithm))  # full is read and never trained


def test_a_new_kind_trains_attaches_and_merges_as_one_model():
    model, network, deltas = trained()
    inputs = random_inputs()
    expected = model(**inputs)
    network.detach()
    base = model(**inputs)
    assert not torch.allclose(base, expected)
    again = attach_deltas(model, deltas)
    assert torch.equal(model(**inputs), expected)
    again.detach()
    merge_into(model, deltas)
    torch.testing.assert_close(model(**inputs), expected, rtol=1e-4, atol=1e-4)  # fp32 sums in another order


@pytest.mark.parametrize("form", ["comfyui", "comfyui-generic"])
def test_a_new_kind_passes_through_native_files_bit_for_bit(tmp_path, form):
    _, _, deltas = trained()
    saved = save_adapter(tmp_path / "a.safetensors", deltas, form=form)
    assert saved.largest_difference == 0.0
    read = read_adapter(tmp_path / "a.safetensors").adapter
    assert {path: delta.algorithm for path, delta in read.items()} == dict.fromkeys(deltas, "gain")
    halved = {path: replace(delta, gain=delta.gain / 2) for path, delta in deltas.items()}
    assert deltas[QKV].difference(halved[QKV]) == pytest.approx(0.5)
    assert deltas[QKV].difference(random_adapter(tiny_architecture("sd35-medium"))[QKV]) == float("inf")


def test_parts_of_a_fused_layer_join_and_their_weights_change_alike():
    gains = {0: torch.tensor([1.0, 2.0]), 2: torch.tensor([3.0, 4.0])}
    tensors = {
        f"transformer.transformer_blocks.0.attn.to_{'qkv'[index]}.{part}": value
        for index, gain in gains.items()
        for part, value in {"gain": gain.repeat(32), "columns": torch.tensor(64)}.items()
    }
    (delta,) = parse(tensors).adapter.values()
    assert isinstance(delta, GainDelta)
    weight_OI = torch.randn(delta.shape, generator=torch.Generator().manual_seed(0))
    whole = delta.merged(weight_OI)
    for index in range(3):
        rows = rows_of_part(index)
        assert torch.equal(delta.merged(rows(weight_OI), rows=rows), rows(whole))


def test_what_a_kind_cannot_do_is_refused_by_its_name(tmp_path):
    _, _, deltas = trained()
    lora = random_adapter(tiny_architecture("sd35-medium"), embedders=False)
    with pytest.raises(ParameterError, match="no form for gain"):
        save_adapter(tmp_path / "a.safetensors", deltas, form="diffusers")
    with pytest.raises(ParameterError, match="Gain that depends on the base cannot be resized"):
        resize(deltas[QKV], rank=2, energy=None)
    with pytest.raises(ParameterError, match="one of them a Gain, and only LoRAs add up"):
        merge([deltas, lora], [1.0, 1.0])
    with pytest.raises(ParameterError, match="split_qkv is for LoRA alone, not for Gain"):
        check_spec(AdapterSpec(algorithm="gain", split_qkv=True))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="the file has gain of rank 1"):
        attach(tiny_mmdit("sd35-medium"), AdapterSpec()).load(deltas)
