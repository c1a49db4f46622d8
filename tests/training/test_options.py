"""Every option of train moves something: a loss, a weight, a file, or what the test that is named here shows."""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from support.tiny_training import Inputs, Picture, Run, make_inputs

from sd3pipe.adapters.options import _REFUSED
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.params.fields import option_extra
from sd3pipe.params.train import _ACTS_UNDER, TrainParams, idle_options

STEPS = 4

# option -> (value that changes the run, what else has to be set so that it can)
CHANGES_THE_RUN = {
    "network_dim": (3, {}),
    "network_alpha": (1.0, {}),
    "adapter_type": ("loha", {}),
    "train_layers": ("attention", {}),
    "network_dropout": (0.3, {}),
    "network_args": (("train_block_indices=0",), {}),
    "rank_rules": ((r"attn\.qkv=1",), {}),
    "lr_rules": ((r"attn\.qkv=0.1",), {}),
    "scale_weight_norms": (0.01, {}),
    "full_bf16": (True, {}),
    "learning_rate": (0.02, {}),
    "optimizer_type": ("Lion", {}),
    "optimizer_args": (("weight_decay=0.5",), {}),
    "lr_scheduler": ("cosine", {}),
    "lr_warmup_steps": (2.0, {}),
    "lr_decay_steps": (3.0, {"lr_scheduler": "warmup_stable_decay", "#lr_decay_steps": 1.0}),
    "lr_scheduler_num_cycles": (2, {"lr_scheduler": "cosine_with_restarts"}),
    "lr_scheduler_power": (2.0, {"lr_scheduler": "polynomial"}),
    "lr_scheduler_min_lr_ratio": (0.5, {"lr_scheduler": "cosine_with_min_lr"}),
    "lr_scheduler_timescale": (2, {"lr_scheduler": "inverse_sqrt"}),
    "lr_scheduler_args": (
        ("step_rules=1:2,0.1",),
        {"lr_scheduler": "piecewise_constant", "#lr_scheduler_args": ("step_rules=1:3,0.1",)},
    ),
    "max_train_steps": (3, {}),
    "max_train_epochs": (2, {}),
    "train_batch_size": (2, {}),
    "gradient_accumulation_steps": (2, {}),
    "max_grad_norm": (0.01, {"optimizer_type": "SGD"}),
    "ema_decay": (0.5, {}),
    "seed": (7, {}),
    "loss_form": ("x0", {}),
    "weighting_scheme": ("uniform", {}),
    "training_shift": (2.0, {}),
    "logit_mean": (0.5, {}),
    "logit_std": (0.5, {}),
    "mode_scale": (0.5, {"weighting_scheme": "mode"}),
    "min_timestep": (500, {}),
    "max_timestep": (500, {}),
    "loss_type": ("l1", {}),
    "huber_schedule": ("constant", {"loss_type": "huber"}),
    "huber_c": (0.5, {"loss_type": "huber"}),
    "huber_scale": (0.5, {"loss_type": "smooth_l1"}),
    "masked_loss": ("sum", {}),
    "prior_loss_weight": (0.1, {}),
    "clip_l_dropout_rate": (1.0, {}),
    "clip_g_dropout_rate": (1.0, {}),
    "t5_dropout_rate": (1.0, {}),
    "pos_emb_random_crop_rate": (1.0, {}),
    "enable_scaled_pos_embed": (True, {}),
    "subsets": ({"photos": {"caption_dropout_rate": 1.0}}, {}),
    "mixed_precision": ("bf16", {}),
    "base_dtype": ("int8", {}),
    "matmul_dtype": ("int8", {}),
    "matmul_rotation": (False, {"matmul_dtype": "int8"}),
}

# option -> value that must leave every loss and weight as it is
CHANGES_NO_NUMBER = {
    "gradient_checkpointing": 1,
    "blocks_to_swap": 1,
    "modulation": "resident",
    "layer_major": True,
    "max_data_loader_n_workers": 1,
    "verify_reads": "always",
    "deterministic": True,
    "stale_ok": True,
    "verify_weights": True,
    "sample_at_first": False,
    "activation_offload": True,
}

# option -> string that then stands in the adapter's metadata
IN_THE_METADATA = {
    "training_comment": "a comment",
    "metadata_title": "a title",
    "metadata_author": "an author",
    "metadata_description": "a description",
    "metadata_license": "a licence",
    "metadata_tags": "a tag",
    "metadata_trigger_phrase": "a trigger",
    "metadata_usage_hint": "a hint",
    "output_name": "a-name",
}

SHOWN_ELSEWHERE = {
    "test_resume.py": ["resume", "allow_changes", "time_limit", "network_weights", "dim_from_weights"],
    "test_validation_and_samples.py": [
        "prompts", "vae", "variant", "sample_every_n_steps", "sample_every_n_epochs", "validate_every_n_steps",
        "validate_every_n_epochs", "max_validation_steps", "validation_seed", "log_with", "logging_dir",
        "log_tracker_name", "wandb_run_name", "on_bad_loss", "loss_spike_factor", "save_every_n_steps",
        "save_every_n_epochs", "save_last_n_steps", "save_last_n_steps_state", "save_last_n_epochs",
        "save_last_n_epochs_state", "save_precision",
    ],
    "test_shared_samples.py": ["max_sample_prompts"],
    "../support/tiny_training.py": ["model", "text", "latents", "out", "threads", "device"],  # every run
    "test_train_command.py": ["host_memory", "mmdit", "loras_dir", "torch_compile", "tf32"],
    "test_adapter_options.py": ["base_weights", "base_weights_multiplier"],
    "test_numerics.py": ["sdpa_backend"],
    "../cli/test_resolve.py": ["allow_code"],
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    """Photos with and without masks, in three variants, a few regularisation pictures."""
    common = {"size": (8, 8), "captions": ("one", "two")}
    dataset = [
        Picture(name="a.png", masked=True, **common),
        Picture(name="b.png", **common),
        Picture(name="c.png", subset="class", **common),
    ]
    subsets = {"class": {"is_reg": True}}
    folder = tmp_path_factory.mktemp("options")
    return make_inputs(
        folder, dataset, subsets=subsets, max_train_steps=STEPS, save_every_n_steps=None, max_grad_norm=0.0
    )


@pytest.fixture(scope="module")
def outcomes(inputs) -> dict[str, tuple]:
    """The outcome of each run so far, by its options."""
    return {}


def outcome(inputs: Inputs, outcomes: dict[str, tuple], options: dict) -> tuple:
    """Returns losses and final weights of a run; equal options run once."""
    name = repr(sorted(options.items()))
    if name not in outcomes:
        run = inputs.train(f"run-{len(outcomes)}", **options)
        outcomes[name] = (run.losses(), {key: tensor.tolist() for key, tensor in run.adapter().items()})
    return outcomes[name]


def test_every_option_is_accounted_for():
    elsewhere = [name for names in SHOWN_ELSEWHERE.values() for name in names]
    known = [*CHANGES_THE_RUN, *CHANGES_NO_NUMBER, *IN_THE_METADATA, *elsewhere]
    assert sorted(known) == sorted(TrainParams.model_fields)


@pytest.mark.parametrize("file", SHOWN_ELSEWHERE)
def test_the_named_files_set_what_they_are_said_to_show(file):
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    assert [name for name in SHOWN_ELSEWHERE[file] if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("name", _ACTS_UNDER)
def test_an_option_that_cannot_act_is_named(name):
    """Every row of that table but the switches whose own test needs a file is in the tables above, too."""
    other, values = _ACTS_UNDER[name]
    states = {"lr_scheduler": "constant", "weighting_scheme": "uniform", "loss_type": "l2", "dim_from_weights": True}
    states |= {"gradient_checkpointing": "off", "log_with": None, "matmul_dtype": None}
    settings = {"log_tracker_name": "n", "wandb_run_name": "n", "logging_dir": Path("l"), "activation_offload": True}
    value = settings.get(name) or CHANGES_THE_RUN[name][0]
    common = {"model": "m", "text": "t", "latents": "l", "out": "o", "lr_warmup_steps": 0.0, "network_weights": "w"}
    (line,) = idle_options(TrainParams(**common, **{other: states[other], name: value}))
    assert line.startswith(f"{name} has no effect here: it acts under {other} = {str(values[0]).lower()}")
    assert idle_options(TrainParams(**common, **{other: values[0], name: value})) == []


def test_options_that_change_a_run_are_part_of_its_identity():
    derived = {"max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "mixed_precision"}  # as resolved
    roles = {name: option_extra(field)["role"] for name, field in TrainParams.model_fields.items()}
    assert {name for name in CHANGES_THE_RUN if roles[name] != "identity"} == derived
    assert {roles[name] for name in CHANGES_NO_NUMBER} == {"free"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES_THE_RUN)
def test_the_option_changes_the_run(inputs, outcomes, name):
    value, needed = CHANGES_THE_RUN[name]
    base = {key.removeprefix("#"): given for key, given in needed.items()}
    changed = {key: given for key, given in base.items() if key != name} | {name: value}
    assert outcome(inputs, outcomes, changed) != outcome(inputs, outcomes, base)


@pytest.mark.parametrize("name", CHANGES_NO_NUMBER)
def test_the_option_changes_no_number(inputs, outcomes, name):
    assert outcome(inputs, outcomes, {name: CHANGES_NO_NUMBER[name]}) == outcome(inputs, outcomes, {})


def test_words_stand_in_the_metadata(inputs):
    run = inputs.train("words", **IN_THE_METADATA)
    with safe_open(run.folder / "final" / "adapter.safetensors", framework="pt") as file:
        metadata = file.metadata()
    values = set(metadata.values())
    assert set(IN_THE_METADATA.values()) <= values
    assert json.loads(metadata["ss_dataset_dirs"]) == {"photos": {"n_repeats": 1, "img_count": 2}}
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {"class": {"n_repeats": 1, "img_count": 1}}
    assert (metadata["ss_num_train_images"], metadata["ss_num_reg_images"]) == ("2", "2")
    assert metadata["ss_sd_model_name"] == inputs.model.name
    assert json.loads(metadata["ss_tag_frequency"]) == {"class": {"tiny": 1}, "photos": {"tiny": 1}}


def test_network_args_say_what_is_unknown_and_what_is_refused(inputs):
    with pytest.raises(ParameterError) as caught:
        inputs.train(
            "wrong",
            network_args=("x_atn_dim=4", "train_t5xxl=True", "split_qkv=maybe", "module_dropout=2", "rank_dropout"),
        )
    lines = str(caught.value).splitlines()
    assert lines == [
        "network_args: x_atn_dim: unknown key (did you mean x_attn_dim?)",
        f"network_args: train_t5xxl: not supported: {_REFUSED['train_t5xxl']}",
        "network_args: split_qkv = 'maybe': must be a valid boolean, unable to interpret input",
        "network_args: module_dropout = '2': must be less than 1",
        "network_args: rank_dropout: write KEY=VALUE",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer_type": "AdamX"}, "unknown: use a class of torch.optim"),
        ({"optimizer_type": "os.system"}, "unknown: use a class of torch.optim"),
        ({"optimizer_type": "torch.optim.lr_scheduler.StepLR"}, "unknown: use a class of torch.optim"),
        ({"optimizer_type": "torchless.Adam"}, "the package torchless cannot be imported"),
        ({"optimizer_args": ("lr=3",)}, "set learning_rate instead"),
        ({"optimizer_args": ("weight_decoy=3",)}, "does not know weight_decoy"),
        ({"lr_scheduler": "warmup_stable_decay"}, "needs lr_decay_steps"),
        ({"lr_scheduler": "piecewise_constant"}, "step_rules"),
        ({"subsets": {"fotos": {"num_repeats": 2}}}, "has no such subset; it has class, photos"),
        ({"weighting_scheme": "sigma_sqrt"}, "choose loss_form = x0"),
        ({"blocks_to_swap": 9}, "blocks"),
        ({"gradient_checkpointing": 9}, "--gradient-checkpointing 9: the model has . blocks"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(inputs, options, message):
    with pytest.raises(ParameterError, match=message):
        inputs.train("refused", **options)


def test_a_base_has_one_format(inputs):
    with pytest.raises(ValueError, match="leave base_dtype out"):
        inputs.train("refused", matmul_dtype="int8", base_dtype="nf4")


@pytest.mark.long
def test_subsets_are_weighed_and_repeated(inputs):
    repeated = inputs.train("repeated", subsets={"photos": {"num_repeats": 3}}, max_train_epochs=1)
    assert repeated.report()["steps"] == 12  # two photos three times, and as many regularisation pictures
    weighed = inputs.train("weighed", subsets={"photos": {"loss_weight": 0.0}})
    losses = {tuple(record["subset_loss"]): record["loss"] for record in weighed.records()}
    assert losses[("photos",)] == 0.0
    assert losses[("class",)] > 0.0


@pytest.mark.parametrize(
    "change", [lambda subsets: subsets.pop("class"), lambda subsets: subsets["class"].pop("num_repeats")]
)
def test_a_manifest_that_lacks_a_subset_of_its_pictures_is_refused(inputs, tmp_path, change):
    latents = shutil.copytree(inputs.folder / "caches" / "latents", tmp_path / "latents")
    manifest = json.loads((latents / "manifest.json").read_text(encoding="utf-8"))
    change(manifest["subsets"])
    (latents / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(InputError, match="how often the pictures of class are seen"):
        inputs.train("refused", latents=latents)


def test_losses_are_told_by_subset(inputs):
    run = inputs.train("subsets", gradient_accumulation_steps=4, max_train_steps=2)
    records = run.records()
    assert records[0]["subset_loss"].keys() == records[0]["subset_samples"].keys() == {"photos", "class"}
    told = run.report()["subsets"]
    assert {name: figures["samples_seen"] for name, figures in told.items()} == {"photos": 4, "class": 4}
    losses = [record["subset_loss"]["photos"] * record["subset_samples"]["photos"] for record in records[:2]]
    assert told["photos"]["loss_mean"] == pytest.approx(sum(losses) / 4)


def test_the_report_lists_every_option(inputs):
    run = Run(inputs.train("listed", max_train_steps=1).folder)
    assert set(json.loads((run.folder / "report.json").read_text())["options"]) == set(TrainParams.model_fields)
