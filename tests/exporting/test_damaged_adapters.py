"""A file that is not as it was written is noticed by whatever reads it; what others leave behind is told once."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny_training import Inputs, fill_prompts, make_inputs, pictures

from sd3pipe.adapters.files import read_adapter
from sd3pipe.commands import adapter, export, sample
from sd3pipe.errors import InputError
from sd3pipe.params.adapter import (
    AdapterConvertParams,
    AdapterInspectParams,
    AdapterMergeParams,
    AdapterResizeParams,
)
from sd3pipe.params.export import ExportParams
from sd3pipe.params.sample import SampleParams


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("damage"), pictures(2))


@pytest.fixture(scope="module")
def trained(inputs) -> Path:
    """A finished run of one step."""
    return inputs.train("whole", max_train_steps=1).folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def damage_data(path: Path) -> None:
    flip(path, -9)


def damage_header(path: Path) -> None:
    """Makes the file claim that it was trained by other means: it stays a valid file that differs in nothing else."""
    flip(path, path.read_bytes().index(b"seed") - 4)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


DAMAGE = (damage_data, damage_header, cut_short)


def read_by_sample(inputs: Inputs, path: Path, out: Path) -> None:
    prompts = fill_prompts(out.with_name("prompts"), [{"width": 64, "height": 64, "steps": 1}])
    sample.main(SampleParams(model=str(inputs.model), prompts=prompts, adapter=path, out=out, threads=1, device="cpu"))


READERS = {
    "export": lambda _, path, out: export.main(ExportParams(adapter=path, out=out)),
    "export into the base": lambda inputs, path, out: export.main(
        ExportParams(adapter=path, out=out, format="checkpoint", model=str(inputs.model))
    ),
    "inspect": lambda _, path, out: adapter.inspect(AdapterInspectParams(adapter=path)),
    "convert": lambda _, path, out: adapter.convert(AdapterConvertParams(adapter=path, out=out)),
    "resize": lambda _, path, out: adapter.resize(AdapterResizeParams(adapter=path, out=out, rank=1)),
    "merge": lambda _, path, out: adapter.merge(AdapterMergeParams(adapters=(path,), out=out)),
    "sample": read_by_sample,
    "network_weights": lambda inputs, path, out: inputs.train(out, max_train_steps=1, network_weights=path),
    "base_weights": lambda inputs, path, out: inputs.train(out, max_train_steps=1, base_weights=(path,)),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_takes_the_whole_file_and_refuses_the_damaged(inputs, run, tmp_path, reader):
    path = run / "final" / "adapter.safetensors"
    whole = path.read_bytes()
    READERS[reader](inputs, path, tmp_path / "good.safetensors")
    for number, damage in enumerate(DAMAGE):
        path.write_bytes(whole)
        damage(path)
        with pytest.raises(InputError, match="damaged"):
            READERS[reader](inputs, path, tmp_path / f"out-{number}.safetensors")
        assert not (tmp_path / f"out-{number}.safetensors").is_file()


@pytest.mark.parametrize("damage", DAMAGE)
def test_train_again_mends_the_finished_adapter_from_its_checkpoint(inputs, damage):
    folder = inputs.train("mended", max_train_steps=1).folder
    path = folder / "final" / "adapter.safetensors"
    whole = path.read_bytes()
    damage(path)
    inputs.train("mended", max_train_steps=1)
    assert path.read_bytes() == whole


@pytest.mark.long
@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_refused(trained, place, bit):
    source = trained / "final" / "adapter.safetensors"
    data = bytearray(source.read_bytes())
    start = data.index(b"sd3pipe_digest")  # damage to this name alone leaves a file that says nothing of itself
    number = int(place * len(data))
    if number in range(start, start + len(b"sd3pipe_digest")):
        return
    data[number] ^= 1 << bit
    path = trained.parent / "flipped.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError):
        read_adapter(path)


def rewritten(path: Path, without: str, change: bool) -> None:
    """Saves a file as an older sd3pipe or another program would: without some metadata, with other tensors or not."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key not in without.split()}
    if change:
        name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
        tensors[name] = tensors[name] + 1
    save_file(tensors, path, metadata=metadata)


def test_older_files_are_read_and_checked_by_what_they_have(run):
    """Before files carried their digest there were sd-scripts' hash and, in a checkpoint, state.json."""
    final, checkpoint = run / "final", run / "checkpoints" / "step-00000001"
    for folder in (final, checkpoint):
        rewritten(folder / "adapter.safetensors", "sd3pipe_digest", change=False)
    assert read_adapter(final / "adapter.safetensors").adapter
    with pytest.raises(InputError, match=r"state\.json beside it"):
        read_adapter(checkpoint / "adapter.safetensors")
    (checkpoint / "state.json").unlink()
    assert read_adapter(checkpoint / "adapter.safetensors").adapter
    rewritten(final / "adapter.safetensors", "", change=True)
    with pytest.raises(InputError, match="sshs_model_hash"):
        read_adapter(final / "adapter.safetensors")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {"adapter.safetensors": 3}}', "[" * 100_000])
def test_a_damaged_state_says_nothing_of_the_adapter(run, content):
    path = run / "checkpoints" / "step-00000001" / "adapter.safetensors"
    rewritten(path, "sd3pipe_digest", change=False)
    path.with_name("state.json").write_text(content)
    assert read_adapter(path).adapter


def test_a_stale_hash_of_another_program_is_one_warning(run, caplog):
    path = run / "final" / "adapter.safetensors"
    rewritten(path, "sd3pipe_digest sd3pipe", change=False)
    assert read_adapter(path).adapter and not caplog.records
    rewritten(path, "", change=True)
    assert read_adapter(path).adapter
    assert [record.message for record in caplog.records if "do not match the hash" in record.message]
    assert len(caplog.records) == 1


def test_a_file_without_any_hash_is_read(run):
    path = run / "final" / "adapter.safetensors"
    rewritten(path, "sd3pipe_digest sshs_model_hash", change=True)
    assert read_adapter(path).adapter


def test_the_digest_is_that_of_the_file_with_a_blank_in_its_place(trained):
    """So that any program can check it; and two equal runs still write equal bytes."""
    from blake3 import blake3

    data = (trained / "final" / "adapter.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    digest = header["__metadata__"]["sd3pipe_digest"].encode()
    assert blake3(data.replace(digest, b"0" * 64, 1)).hexdigest().encode() == digest
