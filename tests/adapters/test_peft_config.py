"""The strength of peft's files is peft's own, for every kind and setting; what is not understood is refused by name."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import nn

from sd3pipe.adapters.files import read_adapter
from sd3pipe.adapters.find import find_adapter
from sd3pipe.adapters.keymap import find_native_module
from sd3pipe.adapters.peft_config import PeftConfig
from sd3pipe.errors import InputError

WIDTH = 128  # of a model of two blocks
TARGETS = ["to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "pos_embed.proj", "context_embedder"]


def block() -> nn.ModuleDict:
    return nn.ModuleDict({
        "attn": nn.ModuleDict({"to_out": nn.ModuleList([nn.Linear(WIDTH, WIDTH)])}),
        "norm1": nn.ModuleDict({"linear": nn.Linear(WIDTH, 6 * WIDTH)}),
        "ff": nn.ModuleDict({
            "net": nn.ModuleList([
                nn.ModuleDict({"proj": nn.Linear(WIDTH, 4 * WIDTH)}), nn.Identity(), nn.Linear(4 * WIDTH, WIDTH),
            ]),
        }),
    })  # fmt: skip


def model() -> nn.ModuleDict:
    """Layers of two blocks and two others under diffusers' names, one of them a convolution."""
    return nn.ModuleDict({
        "pos_embed": nn.ModuleDict({"proj": nn.Conv2d(16, WIDTH, 2, stride=2)}),
        "context_embedder": nn.Linear(96, WIDTH),
        "transformer_blocks": nn.ModuleList([block(), block()]),
    })  # fmt: skip


PATTERNS = {
    "rank_pattern": {"to_out.0": 3, r"^transformer_blocks\.1\.ff\.net\.2": 2, "linear": 6},
    "alpha_pattern": {"1.attn.to_out.0": 5, r"transformer_blocks\.\d+\.ff\..*proj": 1, "proj": 7, "attn.to_out.0": 2},
}
CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "lora, patterns": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **PATTERNS),
    "lora, rs": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS, **PATTERNS),
    "loha": LoHaConfig(r=4, alpha=6, target_modules=TARGETS),
    "loha, patterns": LoHaConfig(r=4, alpha=6, target_modules=TARGETS, **PATTERNS),
    "lokr": LoKrConfig(r=4, alpha=6, target_modules=TARGETS),
    "lokr, patterns": LoKrConfig(r=4, alpha=6, target_modules=TARGETS, **PATTERNS),
    "lokr, both thin": LoKrConfig(r=2, alpha=6, decompose_both=True, decompose_factor=8, target_modules=TARGETS),
    "lokr, both whole": LoKrConfig(r=64, alpha=6, target_modules=TARGETS),
    "lokr, whole or thin": LoKrConfig(
        r=64, alpha=6, decompose_factor=4, target_modules=TARGETS, rank_pattern={"to_out.0": 2, "net.2": 100}
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_change_is_the_one_that_peft_computes(tmp_path, name):
    tuned = get_peft_model(model(), CONFIGS[name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model(), tmp_path)  # patterns lie in the file in another order than in `tuned`
    adapter = read_adapter(find_adapter(tmp_path)).adapter
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in loaded.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert len(layers) == len(adapter) == 10
    for module, layer in layers.items():
        theirs = layer.get_delta_weight("default").detach().flatten(1)
        place = find_native_module(module)
        assert place is not None
        torch.testing.assert_close(
            adapter[place.path].dense(), theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max())
        )


parts = st.sampled_from(["transformer_blocks", "0", "1", "10", "attn", "to_out", "to_q", "ff", "net", "proj"])
modules = st.lists(parts, min_size=1, max_size=5).map(".".join)
patterns = st.one_of(
    modules,
    modules.map("^{}".format),
    st.sampled_from([r"\d+\.attn.*", "to_(q|k)", ".*net", "a|proj", "tto_q", r".+\.0", "0", "[a-z]+"]),
)


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(module=modules, given_patterns=st.lists(patterns, max_size=4, unique=True))
def test_a_pattern_fits_the_names_that_it_fits_in_peft(module, given_patterns):
    numbers = {pattern: number for number, pattern in enumerate(given_patterns, start=1)}
    config = PeftConfig(r=1, lora_alpha=100, alpha_pattern=dict(numbers))
    expected = numbers.get(get_pattern_key(numbers.keys(), module), 100)
    assert config.scale(module, 1) == expected


NAME = "base_model.model.transformer_blocks.0.attn.to_out.0"
PAIR = {f"{NAME}.lora_A.weight": torch.ones(4, WIDTH), f"{NAME}.lora_B.weight": torch.ones(WIDTH, 4)}

REFUSED = {
    "its peft_type is 'BOFT'": {"peft_type": "BOFT"},
    "its peft_type is 'ADALORA'": {"peft_type": "ADALORA", "r": 4},
    r"its peft_type is '\[\]'": {"peft_type": []},
    "lora_alpha: Input should be": {"r": 4, "lora_alpha": "8"},
    "alpha_pattern: Input should be": {"r": 4, "alpha_pattern": [8]},
    "rank_pattern.x: Input should be": {"r": 4, "rank_pattern": {"x": 0}},
    "repeats too much": {"r": 4, "alpha_pattern": {r"(\w+)+!": 1}},
    "repeats too much ": {"r": 4, "alpha_pattern": {".*a.*b.*c.*d": 1}},
    "no regular expression": {"r": 4, "rank_pattern": {"to_(q": 1}},
    "its configuration, which says 8, is another's": {"r": 8},
    "use_rslora: Input should be": {"r": 4, "use_rslora": "yes"},
    "changed the base model": {"r": 4, "init_lora_weights": "pissa_niter_16"},
    "should be a valid dictionary": [],
    "is not valid JSON": "{",
    "half a surrogate pair": '{"alpha_pattern": {"\\ud800": 1}}',
    "nested too deeply": "[" * 100_000,
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_a_configuration_that_is_not_understood_is_refused(tmp_path, message, place):
    config = REFUSED[message]
    if place == "beside":
        path = tmp_path / "adapter_model.safetensors"
        save_file(PAIR, path)
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "adapter_config.json").write_text(text)
    else:
        path = tmp_path / "a.safetensors"
        prefixed = (
            {f"transformer.{key}": value for key, value in config.items()} if isinstance(config, dict) else config
        )
        tensors = {key.replace("base_model.model", "transformer"): tensor for key, tensor in PAIR.items()}
        text = prefixed if isinstance(prefixed, str) else json.dumps(prefixed)
        save_file(tensors, path, metadata={"lora_adapter_metadata": text.replace('{"alpha', '{"transformer.alpha')})
    with pytest.raises(InputError, match=message.strip()) as refusal:
        read_adapter(path)
    assert "\n" not in str(refusal.value)


def test_without_a_configuration_the_strength_is_one(tmp_path):
    save_file(PAIR, tmp_path / "adapter_model.safetensors")
    assert [delta.scale for delta in read_adapter(find_adapter(tmp_path)).adapter.values()] == [1.0]


def test_what_a_configuration_leaves_out_is_as_in_peft(tmp_path):
    """peft's alpha is 8 where nothing else is said."""
    save_file(PAIR, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "bias": "none"}')
    assert [delta.scale for delta in read_adapter(find_adapter(tmp_path)).adapter.values()] == [2.0]
