"""`sd3pipe adapter`: what comes out of convert, resize, merge, extract and inspect."""

import json
import shlex
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import forked
from support.comparing import relative_error
from support.random_adapters import random_adapter
from support.tiny_mmdit import random_inputs, random_weights, tiny_architecture
from support.written_files import metadata_of, single_file, trained_metadata

from sd3pipe.adapters.algebra import approximate, merge, resize
from sd3pipe.adapters.files import compare, read_adapter, save_adapter
from sd3pipe.adapters.inspection import norms_by_part
from sd3pipe.adapters.lora import LoRADelta
from sd3pipe.adapters.metadata import Provenance
from sd3pipe.adapters.network import attach_deltas
from sd3pipe.commands import adapter as commands
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.exporting.reproduction import reproduction
from sd3pipe.models.checkpoint import load_mmdit
from sd3pipe.params import adapter as options
from sd3pipe.params.fields import takes_several
from sd3pipe.params.resolve import resolve
from sd3pipe.params.train import TrainParams

ARCHITECTURE = tiny_architecture("sd35-medium")


def lora(path, seed=0, kind="lora", every=2, **metadata):
    save_adapter(path, random_adapter(ARCHITECTURE, kind, seed=seed, every=every), metadata=metadata or None)
    return path


def dense(adapter):
    return {path: delta.dense() for path, delta in adapter.items()}


@pytest.mark.parametrize("form", ["comfyui", "comfyui-generic", "diffusers"])
def test_convert_keeps_number_format_metadata_and_change(tmp_path, capsys, form):
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_adapter(source, random_adapter(ARCHITECTURE), dtype="bf16", metadata={"ss_seed": "7"})
    commands.convert(options.AdapterConvertParams(adapter=source, out=out, format=form))
    assert compare(read_adapter(source).adapter, read_adapter(out).adapter)[0] < (
        1e-6 if form == "diffusers" else 1e-30
    )
    assert metadata_of(out)["ss_seed"] == "7"
    assert form != "comfyui" or "read back, every change is equal" in capsys.readouterr().out


def test_convert_lists_unknown_keys_or_leaves_them_out(tmp_path, caplog):
    source, out = lora(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    save_file(load_file(source) | {"strange": torch.ones(1)}, source)
    with pytest.raises(InputError, match="strange"):
        commands.convert(options.AdapterConvertParams(adapter=source, out=out))
    commands.convert(options.AdapterConvertParams(adapter=source, out=out, ignore_unknown=True))
    assert "strange" in caplog.text and "strange" not in load_file(out)


def test_convert_refuses_what_a_form_cannot_hold(tmp_path):
    with pytest.raises(ParameterError, match="no form for lokr"):
        commands.convert(
            options.AdapterConvertParams(
                adapter=lora(tmp_path / "a.safetensors", kind="lokr"),
                out=tmp_path / "b.safetensors",
                format="diffusers",
            )
        )


def test_resize_to_its_own_rank_changes_nothing_and_below_is_the_nearest():
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(6, 40, generator=generator), torch.randn(50, 6, generator=generator)
    delta = LoRADelta(down=down, up=up, alpha=3.0)
    whole = resize(delta, rank=6, energy=None)
    assert delta.difference(whole.delta) < 1e-6 and whole.kept == pytest.approx(1.0)
    half = resize(delta, rank=3, energy=None)
    values = torch.linalg.svdvals(delta.dense().double())
    assert delta.difference(half.delta) == pytest.approx((values[3:].norm() / values.norm()).item(), rel=1e-4)
    assert half.kept == pytest.approx((values[:3].square().sum() / values.square().sum()).item(), rel=1e-5)
    assert half.delta.alpha == half.delta.rank == 3
    assert resize(delta, rank=20, energy=None).delta.rank == 6


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.99])
def test_resize_by_energy_takes_the_least_rank_that_keeps_it(energy):
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, 8)
    down, up = torch.randn(8, 40, generator=generator) * scales[:, None], torch.randn(50, 8, generator=generator)
    delta = LoRADelta(down=down, up=up, alpha=8.0)
    found = resize(delta, rank=None, energy=energy)
    assert found.kept >= energy
    if found.delta.rank > 1:
        assert resize(delta, rank=found.delta.rank - 1, energy=None).kept < energy


def test_large_matrices_are_decomposed_nearly_as_well_as_exactly():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(1500, 12, generator=generator), torch.randn(12, 1100, generator=generator)
    matrix = left @ (torch.logspace(0, -1, 12)[:, None] * right) + 0.01 * torch.randn(1500, 1100, generator=generator)
    found = approximate(matrix, rank=8)
    values = torch.linalg.svdvals(matrix)
    assert found.kept == pytest.approx((values[:8].square().sum() / values.square().sum()).item(), rel=1e-4)
    assert torch.equal(found.delta.up, approximate(matrix, rank=8).delta.up)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_resize_turns_other_kinds_into_loras(tmp_path, capsys, kind):
    source, out = lora(tmp_path / "a.safetensors", kind=kind), tmp_path / "b.safetensors"
    resized = options.AdapterResizeParams(adapter=source, out=out, rank=150, dtype="fp32", format="diffusers")
    commands.resize(resized)
    assert "100.00% of the squared norm kept" in capsys.readouterr().out
    before, after = dense(read_adapter(source).adapter), dense(read_adapter(out).adapter)
    for path, change in before.items():
        torch.testing.assert_close(after[path], change, rtol=1e-3, atol=1e-4)


def test_a_dora_is_not_resized_nor_added_up(tmp_path):
    source = lora(tmp_path / "a.safetensors", kind="dora")
    with pytest.raises(ParameterError, match="DoRA that depends on the base cannot be resized"):
        commands.resize(options.AdapterResizeParams(adapter=source, out=tmp_path / "b.safetensors", rank=2))
    with pytest.raises(ParameterError, match="only LoRAs add up: export it with --format checkpoint"):
        merge([read_adapter(source).adapter] * 2, [1.0, 1.0])


def test_merge_is_the_weighted_sum(tmp_path):
    first, second = lora(tmp_path / "a.safetensors", 1), lora(tmp_path / "b.safetensors", 2, every=3)
    out = tmp_path / "c.safetensors"
    params = options.AdapterMergeParams(adapters=(first, second), weights=(0.7, -0.5), out=out, dtype="fp32")
    commands.merge(params)
    ours, a, b = (dense(read_adapter(path).adapter) for path in (out, first, second))
    assert ours.keys() == a.keys() | b.keys()
    for path, change in ours.items():
        expected = 0.7 * a.get(path, torch.zeros(1)) - 0.5 * b.get(path, torch.zeros(1))
        torch.testing.assert_close(change, expected.expand_as(change), rtol=1e-4, atol=1e-5)
    parts = json.loads(metadata_of(out)["sd3pipe_merged_from"])
    assert [part["weight"] for part in parts] == [0.7, -0.5]


def test_merged_model_predicts_as_the_sum(tmp_path):
    first, second = random_adapter(ARCHITECTURE, seed=1), random_adapter(ARCHITECTURE, seed=2)
    base = single_file(tmp_path / "base.safetensors", "sd35-medium")
    together, apart = load_mmdit(base), load_mmdit(base)
    attach_deltas(together, merge([first, second], [0.5, 0.25]))
    for (path, linear), delta_1, delta_2 in zip(apart.linears(), first.values(), second.values(), strict=True):
        assert path in first
        change = 0.5 * delta_1.dense() + 0.25 * delta_2.dense()
        linear.weight.data += change.view_as(linear.weight)
    assert relative_error(together(**random_inputs()), apart(**random_inputs())) < 1e-4


def test_merge_to_a_rank_and_with_wrong_weights(tmp_path, capsys):
    files = (lora(tmp_path / "a.safetensors", 1), lora(tmp_path / "b.safetensors", 2))
    commands.merge(options.AdapterMergeParams(adapters=files, out=tmp_path / "c.safetensors", rank=2))
    assert "squared norm kept" in capsys.readouterr().out
    assert {delta.rank for delta in read_adapter(tmp_path / "c.safetensors").adapter.values()} == {2}
    with pytest.raises(ParameterError, match="1 weight for 2 adapters"):
        commands.merge(options.AdapterMergeParams(adapters=files, out=tmp_path / "c.safetensors", weights=(1.0,)))


def test_adapters_of_different_models_are_not_merged(tmp_path):
    files = (lora(tmp_path / "a.safetensors", every=1), tmp_path / "b.safetensors")
    save_adapter(files[1], random_adapter(tiny_architecture("sd3-medium")))
    with pytest.raises(InputError, match=r"different models: joint_blocks\.0\.x_block\.adaLN.* has two sizes"):
        commands.merge(options.AdapterMergeParams(adapters=files, out=tmp_path / "c.safetensors"))
    save_adapter(files[1], random_adapter(tiny_architecture("sd3-medium", depth=2), every=50))
    save_adapter(files[0], dict([*random_adapter(ARCHITECTURE).items()][-1:]))
    with pytest.raises(InputError, match="models of 3 and 2 blocks"):
        commands.merge(options.AdapterMergeParams(adapters=files, out=tmp_path / "c.safetensors"))


def test_no_command_writes_over_what_it_reads(tmp_path):
    source = lora(tmp_path / "a.safetensors")
    before = source.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(source)
    for out in (source, tmp_path / "link.safetensors"):
        with pytest.raises(ParameterError, match="choose another name"):
            commands.convert(options.AdapterConvertParams(adapter=source, out=out))
        with pytest.raises(ParameterError, match="choose another name"):
            commands.resize(options.AdapterResizeParams(adapter=source, out=out, rank=1))
        with pytest.raises(ParameterError, match="choose another name"):
            commands.merge(options.AdapterMergeParams(adapters=(source, source), out=out))
    assert source.read_bytes() == before


@pytest.mark.long
def test_extract_finds_the_adapter_that_was_merged(tmp_path, capsys):
    adapter = random_adapter(ARCHITECTURE, seed=3, embedders=False, every=2)
    weights = random_weights(ARCHITECTURE)
    save_file(weights, tmp_path / "base.safetensors")
    tuned = {key: tensor.clone() for key, tensor in weights.items()}
    for path, delta in adapter.items():
        tuned[f"{path}.weight"] += delta.dense()
    tuned["joint_blocks.0.x_block.attn.qkv.bias"] += 0.01
    save_file(tuned, tmp_path / "tuned.safetensors")
    out = tmp_path / "lora.safetensors"
    commands.extract(
        options.AdapterExtractParams(
            tuned=str(tmp_path / "tuned.safetensors"), base=str(tmp_path / "base.safetensors"), rank=5, out=out,
            dtype="fp32",
        )
    )  # fmt: skip
    assert "100.00% of the squared difference of these layers kept" in capsys.readouterr().out
    assert compare(adapter, read_adapter(out).adapter)[0] < 1e-4
    assert metadata_of(out)["modelspec.architecture"] == "stable-diffusion-3-5-medium/lora"


def test_extract_refuses_models_that_do_not_belong_together(tmp_path):
    single_file(tmp_path / "a.safetensors", "sd35-medium")
    single_file(tmp_path / "b.safetensors", "sd35-large")
    for tuned, message in (("b", "was not tuned from"), ("a", "do not differ")):
        with pytest.raises(InputError, match=message):
            commands.extract(
                options.AdapterExtractParams(
                    tuned=str(tmp_path / f"{tuned}.safetensors"), base=str(tmp_path / "a.safetensors"), rank=2,
                    out=tmp_path / "x.safetensors",
                )
            )  # fmt: skip


def test_inspect_shows_norms_as_text_json_and_picture(tmp_path, capsys):
    path = lora(tmp_path / "a.safetensors", every=1, ss_output_name="cat")
    commands.inspect(options.AdapterInspectParams(adapter=path, picture=tmp_path / "a.svg"))
    text = capsys.readouterr().out
    assert "a model of 3 blocks" in text and "x_embedder.proj" in text and "ss_output_name: cat" in text
    commands.inspect(options.AdapterInspectParams(adapter=path, as_json=True))
    found = json.loads(capsys.readouterr().out)
    adapter = read_adapter(path).adapter
    assert found["norms"] == pytest.approx({name: delta.norm() for name, delta in adapter.items()})
    assert found["forms"] == ["comfyui"] and sum(found["ranks"].values()) == len(adapter)
    cells = [cell for row in norms_by_part(found["norms"], 3) for cell in row]
    inside = sum(norm**2 for name, norm in found["norms"].items() if name.startswith("joint_blocks"))
    assert sum(cell**2 for cell in cells if cell is not None) == pytest.approx(inside)
    with pytest.raises(ParameterError, match=r"name it a\.svg"):
        commands.inspect(options.AdapterInspectParams(adapter=path, picture=tmp_path / "a.png"))
    picture = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}title"))) == 18


def test_reproduce_prints_commands_and_hashes(tmp_path, capsys):
    path = lora(tmp_path / "a.safetensors", **trained_metadata())
    small = tmp_path / "small.safetensors"
    commands.resize(options.AdapterResizeParams(adapter=path, out=small, rank=1))
    capsys.readouterr()
    commands.inspect(options.AdapterInspectParams(adapter=small, reproduce=True))
    printed = capsys.readouterr().out
    assert "ab" * 32 in printed and "after step 20, seed 42" in printed
    assert "sd3pipe train --model MODEL" in printed
    assert "--learning-rate 0.0001 --network-dim 4" in printed
    assert printed.splitlines()[-1] == "sd3pipe adapter resize ADAPTER --rank 1 --out OUT"
    with pytest.raises(InputError, match="does not say how it was made"):
        commands.inspect(options.AdapterInspectParams(adapter=lora(tmp_path / "b.safetensors"), reproduce=True))


@pytest.mark.parametrize(
    "provenance",
    [
        "3", "[]", "{", "null", '{"format": 2}', '{"format": 1, "step": "x"}', '{"format": 1, "fingerprints": []}',
        '{"format": 1, "parameters": {"train": []}}', '{"format": 1, "version": "\\ud800"}', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_provenance_is_refused_in_a_line(tmp_path, provenance):
    path = lora(tmp_path / "a.safetensors", sd3pipe=provenance)
    with pytest.raises(InputError, match="its provenance") as refusal:
        commands.inspect(options.AdapterInspectParams(adapter=path, reproduce=True))
    assert "\n" not in str(refusal.value)
    commands.inspect(options.AdapterInspectParams(adapter=path))  # what else the file says is shown


def test_a_strangers_provenance_prints_no_command_of_its_own(tmp_path, capsys):
    """The lines are there to be pasted."""
    evil = "x\nrm -rf ~\n\x1b[2J"
    made_from = {
        "format": 1, "version": evil, "versions": {evil: evil}, "fingerprints": {evil: evil},
        "parameters": {"train": {evil: evil, "training_comment": evil}, "encode-text": {}},
    }  # fmt: skip
    later = ["rm -rf ~", "sd3pipe adapter resize ADAPTER; rm -rf ~", "sd3pipe adapter 'open", evil]
    path = lora(
        tmp_path / "a.safetensors", sd3pipe=json.dumps(made_from), sd3pipe_later_steps=json.dumps(later[:2])
    )  # fmt: skip
    commands.inspect(options.AdapterInspectParams(adapter=path, reproduce=True))
    printed = capsys.readouterr().out
    assert all(line.startswith(("# ", "sd3pipe ")) for line in printed.splitlines()) and "\x1b" not in printed
    assert printed.splitlines()[-1] == 'sd3pipe adapter resize "ADAPTER;" rm -rf "~"'
    for steps in (json.dumps(later), "3", "[3]", "{"):
        again = lora(tmp_path / "b.safetensors", sd3pipe=json.dumps(made_from), sd3pipe_later_steps=steps)
        commands.inspect(options.AdapterInspectParams(adapter=again, reproduce=True))
        assert capsys.readouterr().out.splitlines()[-1].startswith("sd3pipe train --model")


def given_on(line):
    """The options of a printed command as the command line's parser hands them on."""
    words, given = shlex.split(line)[2:], {}
    while words:
        name = words.pop(0).removeprefix("--").replace("-", "_")
        if not words or words[0].startswith("--"):
            given[name.removeprefix("no_") if name.startswith("no_") else name] = not name.startswith("no_")
        elif takes_several(TrainParams.model_fields[name]):
            given.setdefault(name, []).append(words.pop(0))
        else:
            given[name] = words.pop(0)
    return given


def test_the_printed_command_means_the_options_that_were_used():
    used = TrainParams(
        model="MODEL", text="caches/text", latents="caches/latents", out="runs/NAME",
        network_dim=4, lr_rules=("mlp=1e-5",), network_args=("split_qkv=True", "x_mlp_dim=8"), full_bf16=True,
        training_shift=3.0, lr_warmup_steps=0.1, subsets={"cats": {"num_repeats": 2}},
    )  # fmt: skip
    printed = reproduction(Provenance(format=1, parameters={"train": used.with_role("identity")}))
    line = next(line for line in printed if line.startswith("sd3pipe train"))
    again = resolve(TrainParams, "train", given_on(line))
    assert again.with_role("identity") == used.with_role("identity") | {"subsets": {}}
    assert any(line.startswith('# train: subsets = {"cats"') for line in printed)


def test_the_command_line_reaches_every_command(tmp_path):
    path = lora(tmp_path / "a.safetensors", every=5)
    assert "rank" in forked("adapter", "inspect", path, "--json").stdout
    forked("adapter", "merge", path, path, "--weights", "0.5", "0.5", "--out", tmp_path / "b.safetensors")
    assert compare(read_adapter(path).adapter, read_adapter(tmp_path / "b.safetensors").adapter)[0] < 1e-3
