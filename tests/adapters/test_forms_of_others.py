"""Forms that other programs write: each acts as its closed form says, or is refused as what it is."""

# I in features, O out features

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from support.comparing import relative_error
from support.random_adapters import random_delta
from support.tiny_mmdit import tiny_mmdit
from torch.nn import functional

from sd3pipe.adapters.algebra import merge, resize
from sd3pipe.adapters.apart import Apart
from sd3pipe.adapters.files import read_adapter
from sd3pipe.adapters.forms import parse, prepared
from sd3pipe.adapters.full import FullDelta
from sd3pipe.adapters.fusing import rows_of_part
from sd3pipe.adapters.lora import LoRADelta
from sd3pipe.adapters.network import attach_deltas, merge_into
from sd3pipe.errors import InputError, ParameterError

QKV, PROJ, PATCHES = "joint_blocks.0.x_block.attn.qkv", "joint_blocks.0.x_block.attn.proj", "x_embedder.proj"
NAMES = {"q": "attn_to_q", "k": "attn_to_k", "v": "attn_to_v", "proj": "attn_to_out_0"}
WIDTH = 192
EXACT = 1e-6  # of fp32 factors against a closed form in fp64


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def named(layer, tensors, prefix="lycoris_"):
    """Tensors of one of diffusers' layers under LyCORIS' names, or OneTrainer's."""
    return {f"{prefix}transformer_blocks_0_{NAMES[layer]}.{end}": tensor for end, tensor in tensors.items()}


def lora(rank=3, alpha=2.0, seed=0):
    return {"lora_down.weight": draw(rank, WIDTH, seed=seed), "lora_up.weight": draw(WIDTH, rank, seed=seed),
            "alpha": torch.tensor(alpha)}  # fmt: skip


def loha(rank=3, alpha=2.0):
    factors = {f"hada_w{i}_a": draw(WIDTH, rank, seed=i) for i in (1, 2)}
    return factors | {f"hada_w{i}_b": draw(rank, WIDTH, seed=i) for i in (1, 2)} | {"alpha": torch.tensor(alpha)}


def lokr(rows=12, columns=4, rank=2, alpha=1.5, seed=0, whole=False):
    """Factors with a w1 of rows x columns, and a w2 of two thin matrices or of one whole."""
    w2 = draw(WIDTH // rows, WIDTH // columns, seed=seed)
    thin = {"lokr_w2_a": draw(WIDTH // rows, rank, seed=seed), "lokr_w2_b": draw(rank, WIDTH // columns, seed=seed)}
    alpha = {"alpha": torch.tensor(alpha)}
    return {"lokr_w1": 4 * draw(rows, columns, seed=seed)} | alpha | ({"lokr_w2": w2} if whole else thin)


def full():
    return {"diff": 0.3 * draw(WIDTH, WIDTH), "diff_b": draw(WIDTH)}


def change(tensors):
    """The change of a weight as the kinds' papers and LyCORIS define it, in fp64; zero where there is none."""
    t = {end: tensor.double() for end, tensor in tensors.items()}
    if "diff" in t:
        return t["diff"]
    if "lokr_w2" in t:  # no rank, so that alpha does not count
        return torch.kron(t["lokr_w1"], t["lokr_w2"])
    if "lokr_w1" in t:
        return torch.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]) * t["alpha"] / t["lokr_w2_b"].shape[0]
    if "hada_w1_a" in t:
        product = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
        return product * t["alpha"] / t["hada_w1_b"].shape[0]
    return t["lora_up.weight"] @ t["lora_down.weight"] * t["alpha"] / t["lora_down.weight"].shape[0]


def merged(weight_OI, tensors):
    """The weight with the change in it, of the norms in dora_scale where that stands there."""
    weight_OI = weight_OI.double() + change(tensors)
    if "dora_scale" not in tensors:
        return weight_OI
    scale = tensors["dora_scale"].double()
    return weight_OI * scale / weight_OI.norm(dim=0 if scale.shape[0] == 1 else 1, keepdim=True)


def with_norms(tensors, axis):
    shape = (1, WIDTH) if axis == "columns" else (WIDTH, 1)
    return tensors | {"dora_scale": 1.0 + 0.1 * draw(*shape).abs()}


SINGLE = {
    "full": full(),
    "lokr, whole": lokr(whole=True),
    "lokr, thin": lokr(),
    "dora of columns": with_norms(lora(), "columns"),
    "dora of rows": with_norms(lora(), "rows"),
    "dora over loha": with_norms(loha(), "rows"),
    "dora of columns over loha": with_norms(loha(), "columns"),
    "dora over lokr": with_norms(lokr(), "rows"),
    "dora over a whole lokr": with_norms(lokr(whole=True), "columns"),
}
THREE = {
    "lokr of few rows": {"q": lokr(4, 12), "k": lokr(4, 12, alpha=3.0, seed=1), "v": lokr(4, 12, rank=3, seed=2)},
    "lokr of few columns": {"q": lokr(12, 4), "k": lokr(4, 12, seed=1), "v": lokr(8, 8, seed=2)},
    "lokr of q and v": {"q": lokr(), "v": lokr(seed=1)},
    "lokr, whole": {part: lokr(whole=True, seed=i) for i, part in enumerate("qkv")},
    "lokr, one of them whole": {"q": lokr(), "k": lokr(whole=True), "v": lokr(seed=1)},
    "lokr of more ranks than it is worth": {part: lokr(16, 16, rank=8, seed=i) for i, part in enumerate("qkv")},
    "lokr and lora": {"q": lokr(), "k": lora()},
    "full": {"q": full(), "v": full()},
    "full and loha": {"q": full(), "k": loha()},
    "dora of columns": {part: with_norms(lora(seed=i), "columns") for i, part in enumerate("qkv")},
    "dora of rows": {part: with_norms(lora(seed=i), "rows") for i, part in enumerate("qkv")},
    "dora of rows of k": {"k": with_norms(lora(), "rows")},
    "dora over lokr": {part: with_norms(lokr(seed=i), "rows") for i, part in enumerate("qkv")},
    "dora over a whole lokr": {part: with_norms(lokr(whole=True, seed=i), "rows") for i, part in enumerate("qkv")},
}
LAYERS = {f"proj: {name}": {"proj": tensors} for name, tensors in SINGLE.items()} | THREE
EXACT_AS_LORA = {name for name in THREE if name.startswith("lokr")} - {
    "lokr, whole", "lokr, one of them whole", "lokr of more ranks than it is worth",
}  # fmt: skip


def read(name):
    """The adapter of a case; its layer's weight and bias; and what both then are by the closed form."""
    adapter = parse({key: t for layer, tensors in LAYERS[name].items() for key, t in named(layer, tensors).items()})
    (path,) = adapter.adapter
    linear = dict(tiny_mmdit("sd35-medium").linears())[path]
    weight_OI, bias_O = linear.weight.detach(), linear.bias.detach()
    parts = LAYERS[name].get("proj"), *(LAYERS[name].get(part) for part in "qkv")
    parts = parts[:1] if path == PROJ else parts[1:]
    weights, biases = [], []
    for part, weight, bias in zip(parts, weight_OI.chunk(len(parts)), bias_O.chunk(len(parts)), strict=True):
        weights.append(weight.double() if part is None else merged(weight, part))
        biases.append(bias.double() + (part or {}).get("diff_b", torch.zeros(())).double())
    return adapter.adapter, path, torch.cat(weights), torch.cat(biases)


def weights_of(model, path):
    linear = dict(model.linears())[path]
    return linear, linear.weight.detach().double(), linear.bias.detach().double()


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_acts_as_its_closed_form_says(name):
    adapter, path, expected_OI, expected_bias_O = read(name)
    model = tiny_mmdit("sd35-medium")
    linear, weight_OI, bias_O = weights_of(model, path)
    assert relative_error(expected_OI, weight_OI) > 0.05
    assert relative_error(adapter[path].merged(weight_OI.float()).double(), expected_OI) < EXACT
    network = attach_deltas(model, adapter)
    x = draw(5, weight_OI.shape[1])
    expected = functional.linear(x.double(), expected_OI, expected_bias_O)
    assert relative_error(linear(x).double(), expected) < EXACT
    network.set_multiplier(0.5)
    half = (expected + functional.linear(x.double(), weight_OI, bias_O)) / 2
    assert relative_error(linear(x).double(), half) < EXACT
    network.detach()
    merge_into(model, adapter)
    assert relative_error(linear.weight.double(), expected_OI) < EXACT
    assert relative_error(linear.bias.double(), expected_bias_O) < EXACT


@pytest.mark.parametrize("name", THREE)
def test_q_k_and_v_of_a_model_in_parts_change_alike(name):
    adapter, path, expected_OI, _ = read(name)
    _, weight_OI, _ = weights_of(tiny_mmdit("sd35-medium"), path)
    for index in range(3):
        rows = rows_of_part(index)
        part_OI = adapter[path].merged(rows(weight_OI).float(), rows=rows)
        assert relative_error(part_OI.double(), rows(expected_OI)) < EXACT


@pytest.mark.parametrize("name", THREE)
def test_thin_factors_make_one_lora_and_others_stay_apart_until_they_are_resized(name):
    (delta,) = read(name)[0].values()
    assert isinstance(delta, LoRADelta) == (name in EXACT_AS_LORA or name == "lokr and lora")
    if isinstance(delta, LoRADelta):
        assert resize(delta, rank=None, energy=None).kept == 1.0
    elif not delta.needs_base and delta.bias_change() is None:
        approximation = resize(delta, rank=WIDTH, energy=None)
        assert approximation.kept == pytest.approx(1.0)
        assert relative_error(approximation.delta.dense(), delta.dense()) < EXACT
    if isinstance(delta, Apart):
        with pytest.raises(ParameterError, match=r"no form for a .* of each: .*--format checkpoint"):
            prepared({QKV: delta}, "comfyui")
        with pytest.raises(ParameterError, match="only LoRAs add up"):
            merge([{QKV: delta}, {QKV: delta}], [1.0, 1.0])


def test_a_change_of_the_bias_never_becomes_a_lora_in_silence():
    with pytest.raises(ParameterError, match="a full change that has biases cannot be resized"):
        resize(FullDelta.of(draw(8, 8), draw(8)), rank=8, energy=None)
    assert resize(FullDelta.of(draw(8, 8)), rank=8, energy=None).kept == pytest.approx(1.0)


def test_parts_differ_where_one_of_them_does():
    generator = torch.Generator().manual_seed(0)
    parts = {i: random_delta("loha", (64, 64), rank=2, alpha=1.0, generator=generator) for i in range(2)}
    delta = Apart(parts=parts)
    assert delta.difference(Apart(parts=dict(parts))) == 0.0
    assert delta.difference(Apart(parts={**parts, 1: replace(parts[1], alpha=2.0)})) == pytest.approx(1.0)
    assert delta.difference(Apart(parts={1: parts[1]})) > 0.5


def test_columns_of_the_patch_embedder_are_those_of_its_input_channels():
    down, up, scale = draw(2, 16, 2, 2), draw(WIDTH, 2, 1, 1), 1.0 + 0.1 * draw(1, 16, 1, 1)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": scale}
    (delta,) = parse({f"lora_unet_x_embedder_proj.{end}": tensor for end, tensor in tensors.items()}).adapter.values()
    weight = draw(WIDTH, 16, 2, 2)
    changed = weight.double() + torch.einsum("or,rchw->ochw", up[..., 0, 0].double(), down.double())
    expected = changed * scale / torch.linalg.vector_norm(changed, dim=(0, 2, 3), keepdim=True)
    assert relative_error(delta.merged(weight.flatten(1)).double(), expected.flatten(1)) < EXACT


def test_t5_of_diffusers_names_is_read():
    name = "encoder.block.3.layer.0.SelfAttention.q"
    tensors = {f"text_encoder_3.{name}.lora_A.weight": draw(2, 64), f"text_encoder_3.{name}.lora_B.weight": draw(64, 2)}
    (path,) = parse(tensors).adapter
    assert path == f"text_encoders.t5xxl.transformer.{name}"


REFUSED = {
    "an OFT of another form (rescale)": {"oft_blocks": (24, 8, 8), "rescale": (WIDTH, 1)},
    "a BOFT": {"oft_blocks": (3, 24, 8, 8)},
    "a BOFT (boft_R)": {"boft_R": (1, 24, 8, 8), "boft_s": (WIDTH, 1)},
    "a GLoRA (a1.weight)": {f"{end}.weight": (4, 4) for end in ("a1", "a2", "b1", "b2")},
    "an IA3 (on_input)": {"on_input": ()},
    "a LoRA with a bias of its own": {
        "lora_A.weight": (2, WIDTH), "lora_B.weight": (WIDTH, 2), "lora_B.bias": (WIDTH,),
    },
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_read_is_named_as_what_it_is(tmp_path, what):
    tensors = {end: torch.ones(shape) for end, shape in REFUSED[what].items()}
    save_file(named("proj", tensors), tmp_path / "a.safetensors")
    with pytest.raises(InputError) as caught:
        read_adapter(tmp_path / "a.safetensors")
    assert f"it is {what}" in str(caught.value) and "which is not read" in str(caught.value)


CONTRADICTIONS = {
    "q, k and v differ in size": named("q", lora()) | named("k", {"diff": draw(64, WIDTH)}),
    "diff_b, down, up": named("proj", lora() | {"diff_b": draw(WIDTH)}),
    r"diff missing beside diff_b": named("proj", {"diff_b": draw(WIDTH)}),
    r"do not match": named("proj", full() | {"diff_b": draw(2)}),
    "down and up missing beside dora_scale": named("proj", {"dora_scale": draw(WIDTH, 1)}),
    "make no adapter layer of a known kind": named(
        "proj", with_norms(lora(), "rows") | {"lora_magnitude_vector": draw(WIDTH)}
    ),
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_parts_that_make_no_layer_are_refused(message):
    with pytest.raises(InputError, match=message):
        parse(CONTRADICTIONS[message])
