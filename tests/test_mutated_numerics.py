"""Wrong numbers do not pass: each mutation of a sum is caught by the tests that are named for it.

A row says which text of which file is replaced by what, and which tests then have to fail. The package is copied first;
the copy is what changes, and what the tests import. Every named test passes on the unchanged copy.
"""

import os
import shutil
import subprocess
import sys
from compileall import compile_dir
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest

ROOT = Path(__file__).resolve().parent.parent
PASSED, FAILED = 0, 1  # pytest's exit codes; any other means that the tests did not run


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """`tests` are arguments of pytest: a file, or one test in it."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FLOW, RESUME = (
    "tests/training/test_flow.py",
    "tests/training/test_resume.py::test_a_stopped_run_goes_on_to_the_same_bits",
)
WEIGHTS = "tests/training/test_trained_weights.py"
MMDIT = "tests/parity/test_mmdit_against_diffusers.py::test_output_and_input_gradients_equal_the_oracles"

MUTATIONS = {
    "velocity points from noise to picture": Mutation(
        file="diffusion/flow.py",
        old="return noise_BChw.float() - latents_BChw.float()",
        new="return latents_BChw.float() - noise_BChw.float()",
        tests=(FLOW, "tests/parity/test_training_against_peft.py"),
    ),
    "noise and picture change places": Mutation(
        file="diffusion/flow.py",
        old="return (1 - sigmas_B111) * latents_BChw.float() + sigmas_B111 * noise_BChw.float()",
        new="return sigmas_B111 * latents_BChw.float() + (1 - sigmas_B111) * noise_BChw.float()",
        tests=(f"{FLOW}::test_noising_and_target_are_fp32_and_consistent",),
    ),
    "sigma in bfloat16": Mutation(
        file="training/flow.py",
        old="return (timesteps_B / NUM_TIMESTEPS).float()",
        new="return (timesteps_B / NUM_TIMESTEPS).bfloat16().float()",
        tests=(FLOW, "tests/training/test_training_feed.py::test_noise_levels_are_float32_and_finer_than_bfloat16"),
    ),
    "timestep in bfloat16": Mutation(
        file="models/mmdit.py",
        old="angles = timesteps_B.float()[:, None] * frequencies",
        new="angles = timesteps_B.bfloat16().float()[:, None] * frequencies",
        tests=("tests/models/test_mmdit.py::test_timesteps_keep_float32_in_every_mode",),
    ),
    "training shift towards the picture": Mutation(
        file="diffusion/flow.py",
        old="return shift * sigmas_B / (1 + (shift - 1) * sigmas_B)",
        new="return sigmas_B / (shift + (1 - shift) * sigmas_B)",
        tests=(FLOW,),
    ),
    "x0 form without its sigma^2": Mutation(
        file="training/flow.py",
        old="    return ones_B, sigmas_B\n",
        new="    return ones_B, ones_B\n",
        tests=(f"{FLOW}::test_loss_equals_its_definition_in_fp64",),
    ),
    "sigma_sqrt infinite at sigma 0": Mutation(
        file="training/flow.py",
        old="sigmas_B = sigmas_B.clamp(min=_SMALLEST_SIGMA)",
        new="sigmas_B = sigmas_B.clamp(min=0)",
        tests=(f"{FLOW}::test_loss_and_gradient_are_finite_at_the_ends",),
    ),
    "masks ignored": Mutation(
        file="training/flow.py",
        old="if mask_Bhw is None:",
        new="if mask_Bhw is None or True:",
        tests=(f"{FLOW}::test_masked_loss_is_the_mean_over_the_masked_area",),
    ),
    "pooled L and G swapped": Mutation(
        file="models/conditioning.py",
        old="return context_BLD, pooled_BP",
        new='return context_BLD, pooled_BP.roll(rows[0]["pooled_g"].shape[0], dims=1)',
        tests=("tests/models/test_conditioning.py",),
    ),
    "T5 before the CLIPs": Mutation(
        file="models/conditioning.py",
        old="return context_BLD, pooled_BP",
        new="return context_BLD.roll(t5_length, dims=1), pooled_BP",
        tests=("tests/models/test_conditioning.py",),
    ),
    "second attention with 64 heads instead of heads of 64": Mutation(
        file="models/joint_block.py",
        old="own_BLD = attend(*self.attn2.heads(modulate(x_BLD, shift2, scale2)))",
        new="own_BLD = attend(*(part.transpose(1, 2).flatten(2).unflatten(-1, (HEAD_WIDTH, -1)).transpose(1, 2)"
        " for part in self.attn2.heads(modulate(x_BLD, shift2, scale2))))",
        tests=(MMDIT,),
    ),
    "alpha / rank dropped": Mutation(
        file="adapters/kind.py",
        old="return self.alpha / self.rank\n\n    def parameter(",
        new="return 1.0\n\n    def parameter(",
        tests=("tests/adapters/test_layers.py::test_lora_acts_at_alpha_over_rank",),
    ),
    "split_qkv at a third of its strength": Mutation(
        file="adapters/lora.py",
        old="alpha=QKV_PARTS * self.setup.alpha)",
        new="alpha=self.setup.alpha)",
        tests=("tests/adapters/test_layers.py::test_split_layer_as_one_lora_has_three_times_rank_and_alpha",),
    ),
    "OFT turns the other way": Mutation(
        file="adapters/oft.py",
        old="return blocks_KNN - blocks_KNN.mT",
        new="return blocks_KNN.mT - blocks_KNN",
        tests=("tests/adapters/test_rotations.py::test_blocks_turn_outputs_as_comfyui_does",),
    ),
    "peft's exact rotation turns as its series does": Mutation(
        file="adapters/oftv2.py",
        old="return cayley(-skew_KNN)",
        new="return cayley(skew_KNN)",
        tests=("tests/adapters/test_rotations.py::test_a_layer_that_turns_inputs_equals_pefts",),
    ),
    "T-LoRA rounds its ranks": Mutation(
        file="adapters/tlora.py",
        old="more_B.floor()",
        new="more_B.round()",
        tests=("tests/adapters/test_tlora.py::test_mask_is_the_papers_at_every_timestep",),
    ),
    "dropout alive outside training": Mutation(
        file="adapters/kind.py",
        old="if self.training and dropout.neuron:",
        new="if dropout.neuron:",
        tests=("tests/adapters/test_layers.py::test_dropout_acts_in_training_only_and_the_same_way_again",),
    ),
    "dropout alive in validation": Mutation(
        file="training/validation.py",
        old="network.eval()\n        network.set_dropout_keys(None)",
        new="network.train()",
        tests=("tests/training/test_validation_and_samples.py::test_validation_changes_nothing_and_drops_nothing",),
    ),
    "LoRA+ on down": Mutation(
        file="adapters/network.py",
        old='loraplus_lr_ratio if name == "up" else 1.0',
        new='loraplus_lr_ratio if name == "down" else 1.0',
        tests=("tests/adapters/test_network.py::test_parameter_groups_follow_rules_and_loraplus",),
    ),
    "latents drawn with the variance as deviation": Mutation(
        file="models/vae.py",
        old="return mean + torch.exp(0.5 * logvar) * noise",
        new="return mean + torch.exp(logvar) * noise",
        tests=("tests/training/test_training_feed.py::test_latents_are_drawn_anew_from_mean_and_variance",),
    ),
    "gradient summed over accumulation": Mutation(
        file="training/step_runner.py",
        old="(losses_B * forward_pass.batch.weights).mean() / len(batches)",
        new="(losses_B * forward_pass.batch.weights).mean()",
        tests=("tests/training/test_step_runner.py::test_accumulated_batches_make_the_step_of_one_large_batch",),
    ),
    "gradient summed over processes": Mutation(
        file="training/processes.py",
        old="self.sum(flat).div_(self.count)",
        new="self.sum(flat)",
        tests=("tests/training/test_processes.py::test_gradients_are_averaged_over_processes",),
    ),
    "ranks train on the same samples": Mutation(
        file="training/batches.py",
        old="micro_batches=tuple(pending[rank::num_ranks])",
        new="micro_batches=tuple(pending[:accumulation])",
        tests=("tests/training/test_batches.py::test_ranks_share_what_one_process_would_see",),
    ),
    "sample weights ignored": Mutation(
        file="training/step_runner.py",
        old="(losses_B * forward_pass.batch.weights).mean()",
        new="losses_B.mean()",
        tests=("tests/training/test_options.py::test_subsets_are_weighed_and_repeated",),
    ),
    "the preserved output is the adapter's own": Mutation(
        file="training/objective.py",
        old="with self.network.detached(), torch.no_grad()",
        new="with torch.no_grad()",
        tests=("tests/training/test_step_runner.py::test_preserved_samples_aim_at_the_base_model_itself",),
    ),
    "resume forgets where the epoch stood": Mutation(
        file="training/state_file.py",
        old="Position(epoch=epoch, index=index)",
        new="Position(epoch=epoch, index=0)",
        tests=(f"{RESUME}[adamw]",),
    ),
    "resume forgets the optimizer's numbers": Mutation(
        file="training/optimizers.py",
        old="for path, value in {**tensors, **values}.items():",
        new="for path, value in tensors.items():",
        tests=(f"{RESUME}[schedule-free]",),
    ),
    "resume forgets the loss scale": Mutation(
        file="training/saving.py",
        old='scaler.load_state_dict(dict(checkpoint.state["loss_scale"]))',
        new="pass",
        tests=(f"{RESUME}[fp16]",),
    ),
    "EMA with the weights of old and new exchanged": Mutation(
        file="training/trained_weights.py",
        old="weight = 1 - min(self._decay,",
        new="weight = min(self._decay,",
        tests=(f"{WEIGHTS}::test_the_average_is_delivered_and_the_training_weights_return",),
    ),
    "bfloat16 rounded towards zero": Mutation(
        file="training/trained_weights.py",
        old="((bits + noise) & -(1 << 16))",
        new="(bits & -(1 << 16))",
        tests=(f"{WEIGHTS}::test_bf16_weights_take_steps_smaller_than_half_a_bit",),
    ),
    "warm-up begins at 0": Mutation(
        file="training/schedules.py",
        old="return (step + 1) / (self.warmup_steps + 1)",
        new="return step / (self.warmup_steps + 1)",
        tests=("tests/training/test_schedules.py",),
    ),
    "guidance on top of the prompt": Mutation(
        file="diffusion/sampler.py",
        old="uncond + settings.scale * (cond - uncond)",
        new="cond + settings.scale * (cond - uncond)",
        tests=("tests/parity/test_sampling_against_diffusers.py::test_latents_equal_the_pipelines",),
    ),
    "guidance towards the negative prompt": Mutation(
        file="diffusion/sampler.py",
        old="uncond + settings.scale * (cond - uncond)",
        new="uncond + settings.scale * (uncond - cond)",
        tests=("tests/parity/test_sampling_against_diffusers.py::test_latents_equal_the_pipelines",),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A copy of the package, on which every named test passes."""
    folder = tmp_path_factory.mktemp("mutated")
    shutil.copytree(ROOT / "sd3pipe", folder / "sd3pipe", ignore=shutil.ignore_patterns("__pycache__"))
    # by their content, so that no change within a second is missed
    compile_dir(folder / "sd3pipe", quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    named = sorted({name for mutation in MUTATIONS.values() for name in mutation.tests})
    code, said = run(folder, *named)
    assert code == PASSED, said
    return folder / "sd3pipe"


def run(folder: Path, *tests: str) -> tuple[int, str]:
    """Runs tests of this repository with the package in `folder`; returns pytest's exit code and words."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-x", "-p", "no:xdist", "--basetemp", str(folder / "tests"), *tests],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_text_to_replace_stands_there_once(name):
    text = (ROOT / "sd3pipe" / MUTATIONS[name].file).read_text(encoding="utf-8")
    assert text.count(MUTATIONS[name].old) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_mutation_is_caught(package, name):
    mutation = MUTATIONS[name]
    file = package / mutation.file
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        for test in mutation.tests:
            code, said = run(package.parent, test)
            assert code == FAILED, f"{test} ended with {code}\n{said}"
    finally:
        file.write_text(text, encoding="utf-8")
