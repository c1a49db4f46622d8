"""Runs of `train` on random rows: what they leave behind, and that a fresh adapter changes nothing."""

import itertools
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import pytest
import torch
from support.tiny_training import Inputs, equal, make_inputs, pictures

from sd3pipe.adapters.files import read_adapter
from sd3pipe.cache.staleness import remember_sources, sources_seen
from sd3pipe.commands.train import _set_numerics
from sd3pipe.errors import DeviceMemoryError, ParameterError, Sd3pipeError, StaleError, StorageError
from sd3pipe.files import lock_file
from sd3pipe.fingerprint import hash_file
from sd3pipe.training.compiling import compile_blocks
from sd3pipe.training.objective import ForwardPass, Objective


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("train"), pictures(6))


def test_a_run_leaves_what_the_design_says(inputs):
    run = inputs.train("layout", loras_dir=inputs.folder / "loras", output_name="mine", max_train_steps=3)
    assert run.steps() == [2, 3]
    assert {path.name for path in run.checkpoint(2).iterdir()} == {
        "adapter.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    assert {path.name for path in (run.folder / "final").iterdir()} == {"adapter.safetensors", "inputs.json"}
    assert {path.name for path in (inputs.folder / "loras").iterdir()} == {
        "mine-step00000002.safetensors",
        "mine-step00000003.safetensors",
        "mine.safetensors",
    }
    assert equal(run.adapter(), run.adapter(3))
    assert len(run.losses()) == 3
    report = run.report()
    assert report["steps"] == 3
    assert report["exit_code"] == 0
    assert report["loss_last"] == run.losses()[-1]
    assert report["peak_rss_bytes"] > 0
    assert json.loads((run.folder / "metrics.json").read_text())["loss_last"] == run.losses()[-1]
    assert (run.folder / "plots" / "loss.csv").read_text().startswith("step,epoch,loss,")


def test_rows_that_another_program_encoded_are_trained_on_and_told(tmp_path, caplog):
    """Caches from the time when sd-scripts' rows could be taken over; such latents are one frozen draw."""
    inputs = make_inputs(tmp_path, pictures(2), latent_tensor="sample", encoded_by="sd-scripts")
    with caplog.at_level("INFO"):
        assert len(inputs.train("theirs", max_train_steps=1).losses()) == 1
    assert "holds rows that sd-scripts encoded" in caplog.text


def test_a_run_notes_what_the_encode_stages_had_counted(inputs):
    report = Path(f"{inputs.text}.report.json")
    captions = {"captions": 6, "most_frequent": {"picture": 6}}
    try:
        report.write_text(json.dumps({"exit_code": 0, "seconds": 2.5, "captions": captions, "cut": [{"used_by": "a"}]}))
        run = inputs.train("noted", max_train_steps=1)
        for other in ({"exit_code": 5, "seconds": 1.0}, []):
            report.write_text(json.dumps(other))
            assert inputs.train("unnoted", max_train_steps=1).report()["encoded"] == {}
    finally:
        report.unlink()
    assert run.report()["encoded"] == {"text": {"seconds": 2.5, "captions": captions, "cut": 1}}


def test_a_run_is_set_aside_only_once_the_new_one_can_begin(inputs):
    run = inputs.train("kept", max_train_steps=1)
    for wrong, problem in (
        ({"optimizer_type": "AdamX"}, "AdamX"),
        ({"prompts": inputs.text}, "not prompts"),
    ):
        with pytest.raises(Sd3pipeError, match=problem):
            inputs.train("kept", max_train_steps=1, seed=7, **wrong)
    assert run.steps() == [1] and not run.folder.with_name("kept.1").exists()


def test_a_second_process_is_kept_out_of_a_run_and_a_file_is_no_folder(inputs):
    lock = inputs.folder / "runs" / ".sd3pipe" / "taken.lock"
    with lock_file(lock), pytest.raises(StorageError, match=r"another process trains into .*taken"):
        inputs.train("taken", max_train_steps=1)
    assert not (inputs.folder / "runs" / "taken").exists()
    (inputs.folder / "runs" / "file").write_text("")
    with pytest.raises(StorageError, match="file is a file, not a folder"):
        inputs.train("file", max_train_steps=1)


def test_final_holds_no_path_and_no_time(inputs):
    run = inputs.train("timeless", max_train_steps=1)
    again = inputs.train("timeless-2", max_train_steps=1, output_name="timeless")
    for name in ("adapter.safetensors", "inputs.json"):
        first = (run.folder / "final" / name).read_bytes()
        assert first == (again.folder / "final" / name).read_bytes()
        assert str(inputs.folder).encode() not in first


def test_the_adapter_carries_its_provenance(inputs):
    run = inputs.train("provenance", max_train_steps=1, metadata_author="A. Painter")
    metadata = read_adapter(run.folder / "final" / "adapter.safetensors").metadata
    assert metadata["modelspec.author"] == "A. Painter"
    made_from = json.loads(metadata["sd3pipe"])
    assert made_from["fingerprints"]["vae"] == "vae-1"
    state = json.loads((run.checkpoint(1) / "state.json").read_text())
    assert made_from["fingerprints"]["dataset"] == state["identity"]["training_rows"]
    assert made_from["step"] == 1


def test_a_fresh_adapter_changes_nothing_bit_for_bit(inputs, monkeypatch):
    """The first step's loss over six micro-batches is that of the base alone."""
    options = {"max_train_steps": 1, "gradient_accumulation_steps": 6}
    trained = inputs.train("fresh", **options)

    def base_prediction(self: Objective, forward_pass: ForwardPass) -> torch.Tensor:
        with self.network.detached():
            velocity = self.mmdit(**forward_pass.inputs)
        return velocity + 0.0 * sum(parameter.sum() for parameter in self.network.parameters())

    monkeypatch.setattr(Objective, "predict", base_prediction)
    base = inputs.train("base-alone", **options)
    assert trained.losses() == base.losses()


@pytest.mark.long
def test_an_mmdit_in_a_file_of_its_own_beats_the_one_in_the_model(inputs, tmp_path):
    other = make_inputs(tmp_path, pictures(6), variant="sd3-medium")
    plain = inputs.train("plain", max_train_steps=1)
    replaced = inputs.train("replaced", max_train_steps=1, mmdit=other.model)
    assert replaced.losses() != plain.losses()
    assert replaced.losses() == inputs.train("other", max_train_steps=1, model=str(other.model)).losses()


@pytest.mark.long
def test_rows_older_than_their_pictures_stop_a_run_unless_that_is_fine(tmp_path, capsys):
    inputs = make_inputs(tmp_path, pictures(2))
    dataset, caption = tmp_path / "dataset.toml", tmp_path / "captions" / "a.txt"
    dataset.write_text("[[datasets]]")
    caption.parent.mkdir()
    caption.write_text("a mug")
    for cache, suffix in ((inputs.text, ".txt"), (inputs.latents, ".png")):
        remember_sources(
            cache,
            sources_seen(
                dataset_file=dataset,
                files={caption: hash_file(caption)} if suffix == ".txt" else {},
                folders={caption.parent: (suffix,)},
                scan_started=time.time(),
            ),
        )
    assert inputs.train("fresh", max_train_steps=1).report()["sources_checked"] == "fresh"
    caption.write_text("a cup")
    with pytest.raises(
        StaleError, match=r"text is older than .*a\.txt was changed: encode again, .*--stale-ok"
    ) as caught:
        inputs.train("stale", max_train_steps=1)
    assert caught.value.exit_code == 4 and not (tmp_path / "runs" / "stale" / "final").exists()
    assert inputs.train("stale", max_train_steps=1, stale_ok=True).report()["sources_checked"] == "changed"
    dataset.unlink()
    assert inputs.train("unknown", max_train_steps=1).report()["sources_checked"] == "unknown"
    assert "captions and pictures not checked: they are not here" in capsys.readouterr().out


@pytest.mark.slow  # compiling takes 20 s
def test_compiled_blocks_learn_the_same(inputs, monkeypatch):
    """With dynamo and AOT autograd, but without inductor, which wants a compiler of C++."""
    compiled = []

    def compile_without_inductor(mmdit, **options) -> None:
        compiled.extend(mmdit.joint_blocks)
        compile_blocks(mmdit, backend="aot_eager", **options)

    monkeypatch.setattr("sd3pipe.training.compiling.compile_blocks", compile_without_inductor)
    run = inputs.train("compiled", torch_compile=True)
    assert len(compiled) == 2
    assert run.losses() == pytest.approx(inputs.train("interpreted").losses(), rel=1e-5)


@pytest.mark.slow
def test_many_sizes_and_text_lengths_stay_compiled(tmp_path, monkeypatch):
    """In training and in validation: fewer graphs than kinds of blocks times sizes, and never beyond torch's limit."""
    torch._dynamo.reset()  # what other tests compiled counts, too
    graphs = []

    def count(graph, _examples):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("sd3pipe.training.compiling.compile_blocks", partial(compile_blocks, backend=count))
    monkeypatch.setattr("torch._dynamo.config.fail_on_recompile_limit_hit", True)
    sizes = itertools.product(((8, 8), (8, 12), (12, 8), (10, 10)), (6, 12))
    rows = [
        replace(picture, name=f"{size}-{tokens}-{picture.name}", split="train" if number < 3 else "validation")
        for size, tokens in sizes
        for number, picture in enumerate(pictures(4, size=size, tokens=tokens))
    ]
    inputs = make_inputs(tmp_path, rows, depth=4, train_batch_size=2)
    inputs.train("many", torch_compile=True, max_train_steps=12, save_every_n_steps=None, validate_every_n_steps=12)
    assert 0 < len(graphs) < 20


@pytest.mark.long
@pytest.mark.parametrize(
    "base",
    [
        {"mixed_precision": "fp16", "base_dtype": "fp8"},
        *[
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"mixed_precision": "bf16"},
                {"mixed_precision": "fp16"},
                {"mixed_precision": "bf16", "base_dtype": "fp8"},
                {"mixed_precision": "bf16", "base_dtype": "int8"},
                {"mixed_precision": "bf16", "base_dtype": "nf4"},
            )
        ],
    ],
)
def test_every_base_trains_streamed_as_it_does_resident(tmp_path, base):
    inputs = make_inputs(tmp_path, pictures(2), depth=5, max_train_steps=2, output_name="base", **base)
    resident = inputs.train("resident", blocks_to_swap=0)
    streamed = inputs.train("streamed", blocks_to_swap=5)
    assert streamed.report()["memory"]["copied_bytes_per_step"]["measured"] > 0
    assert streamed.losses() == resident.losses()
    assert equal(streamed.adapter(2), resident.adapter(2))


@pytest.mark.slow
@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("matmul_dtype", ["int8", "fp8"])
def test_products_in_eight_bits_stream_and_resume_to_the_bit(tmp_path, matmul_dtype, rotation):
    inputs = make_inputs(tmp_path, pictures(3), depth=5, max_train_steps=4, output_name="base", save_every_n_steps=2)
    options = {"matmul_dtype": matmul_dtype, "matmul_rotation": rotation}
    resident = inputs.train("resident", blocks_to_swap=0, **options)
    dense = inputs.train("dense", blocks_to_swap=0)
    assert resident.losses() != dense.losses()
    assert resident.losses() == pytest.approx(dense.losses(), rel=0.03)  # 1.2 % at most was measured
    streamed = inputs.train("streamed", blocks_to_swap=5, max_train_steps=2, **options)
    copied = streamed.report()["memory"]["copied_bytes_per_step"]
    assert copied["measured"] > 0
    resumed = inputs.train("streamed", blocks_to_swap=5, layer_major=True, gradient_checkpointing="on", **options)
    assert resumed.report()["steps_now"] == 2 and resumed.losses() == resident.losses()
    assert equal(resumed.adapter(4), resident.adapter(4)) and equal(resumed.optimizer(4), resident.optimizer(4))


@pytest.mark.slow
def test_a_rotation_of_the_products_is_part_of_a_run(tmp_path):
    """Other products are another run: they do not go on from its checkpoint."""
    inputs = make_inputs(tmp_path, pictures(2), depth=3, max_train_steps=2, output_name="base", matmul_dtype="int8")
    inputs.train("run", matmul_rotation=True)
    other = inputs.train("run", matmul_rotation=False)
    assert other.report()["steps_now"] == 2 and Path(f"{other.folder}.1").is_dir()


ELSEWHERE = {
    "recomputed": {"gradient_checkpointing": "on", "blocks_to_swap": 0},
    "streamed": {"blocks_to_swap": 5, "gradient_checkpointing": "off"},
    "streamed and recomputed": {"blocks_to_swap": 5, "gradient_checkpointing": "on"},
    "modulation resident": {"blocks_to_swap": 5, "gradient_checkpointing": "on", "modulation": "resident"},
    "modulation ahead": {"blocks_to_swap": 5, "gradient_checkpointing": "on", "modulation": "ahead"},
    "layer by layer": {"blocks_to_swap": 5, "gradient_checkpointing": "on", "layer_major": True},
    "layer by layer, kept": {"blocks_to_swap": 5, "gradient_checkpointing": "off", "layer_major": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("base_dtype", [None, "int8"])
@pytest.mark.parametrize("kind", ["oft", "oftv2", "tlora"])
def test_a_kind_trains_alike_wherever_its_base_is(tmp_path, kind, base_dtype):
    options = {"adapter_type": kind, "network_dim": 8, "train_layers": "attention+modulation", "base_dtype": base_dtype}
    inputs = make_inputs(
        tmp_path, pictures(4), depth=5, max_train_steps=2, output_name="kind", gradient_accumulation_steps=2, **options
    )
    plain = inputs.train("plain", blocks_to_swap=0, gradient_checkpointing="off")
    trained = read_adapter(plain.checkpoint(2) / "adapter.safetensors").adapter
    assert {delta.algorithm for delta in trained.values()} == {kind} and not any("mlp" in path for path in trained)
    assert min(delta.norm() for delta in trained.values()) > 0
    for name, elsewhere in ELSEWHERE.items():
        if (kind, name) == ("oftv2", "modulation ahead"):
            with pytest.raises(ParameterError, match="before an adapter has turned its input"):
                inputs.train(name, **elsewhere)
            continue
        run = inputs.train(name, **elsewhere)
        assert run.losses() == plain.losses(), name
        assert equal(run.adapter(2), plain.adapter(2)), name


@pytest.mark.long
def test_blocks_that_the_host_may_not_hold_are_read_from_the_file(tmp_path):
    inputs = make_inputs(tmp_path, pictures(2), depth=6, max_train_steps=2, output_name="base")
    held = inputs.train("held", blocks_to_swap=6)
    bound = held.report()["memory"]["host_bytes"]["predicted"] - 1
    read = inputs.train("read", blocks_to_swap=6, host_memory=f"{bound / 1e9:.9f}GB")
    assert read.report()["memory"]["file_blocks"] == 4  # three buffers take the place of four blocks
    assert read.report()["memory"]["host_bytes"]["predicted"] <= bound
    assert read.losses() == held.losses()
    assert equal(read.adapter(2), held.adapter(2))
    with pytest.raises(ParameterError, match="DoRA starts from the base's own weights: give --host-memory more"):
        inputs.train("dora", blocks_to_swap=6, host_memory=f"{bound / 1e9:.9f}GB", adapter_type="dora")
    with pytest.raises(DeviceMemoryError, match="of host memory hold too few of the blocks"):
        inputs.train("little", blocks_to_swap=6, host_memory="0.1GB")


@pytest.mark.slow
def test_layers_with_dropout_share_their_graphs_and_drop_the_same(tmp_path, monkeypatch):
    torch._dynamo.reset()
    graphs = []

    def count(graph, _examples):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("sd3pipe.training.compiling.compile_blocks", partial(compile_blocks, backend=count))
    dropout = {"network_dropout": 0.3, "network_args": ("rank_dropout=0.2", "module_dropout=0.1")}
    inputs = make_inputs(tmp_path, pictures(4, size=(8, 8)), variant="sd35-large", depth=6, **dropout)
    compiled = inputs.train("compiled", torch_compile=True)
    assert len(graphs) == 3  # six blocks: the first gets no gradient for its input, the last is of its own kind
    assert compiled.losses() == inputs.train("interpreted", torch_compile=False).losses()


def test_tf32_is_the_users_choice_and_off_where_bits_are_promised(inputs, monkeypatch):
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda on: None)
    seen = {}
    for name, options in {"on": {}, "off": {"tf32": False}, "bits": {"deterministic": True}}.items():
        _set_numerics(inputs.params(name, **options))
        seen[name] = torch.backends.cuda.matmul.allow_tf32
    assert seen == {"on": True, "off": False, "bits": False}


def test_loss_falls_when_four_pictures_are_learnt(tmp_path):
    """Four plain pictures; the factors were measured as 2.6 and 5.4 (mean of ten steps)."""
    inputs = make_inputs(tmp_path, pictures(4, plain=True, size=(8, 8)), variant="sd3-medium", train_batch_size=4)
    losses = inputs.train("quick", max_train_steps=40, network_dim=8, save_every_n_steps=None).losses()
    assert losses[0] / mean(losses[-10:]) > 2


@pytest.mark.slow
def test_loss_falls_far_when_four_pictures_are_over_fitted(tmp_path):
    """With ranks that let noise through, so that the pictures and the noise are both predicted."""
    inputs = make_inputs(tmp_path, pictures(4, plain=True, size=(8, 8)), variant="sd3-medium", train_batch_size=4)
    run = inputs.train(
        "long", max_train_steps=500, learning_rate=5e-3, lr_scheduler="cosine", network_dim=64,
        network_args=("emb_dims=[64,64,64,64,64,64]",), save_every_n_steps=None, gradient_checkpointing="off",
    )  # fmt: skip
    losses = run.losses()
    assert mean(losses[:10]) / mean(losses[-10:]) > 4
