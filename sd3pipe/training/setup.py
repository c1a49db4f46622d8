"""Builds a run from its options: base, adapter, optimizer, feed, saver, and the loop that drives them."""

# B batch, C latent channels, h w latent pixels

import functools
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from sd3pipe.adapters.files import read_adapter
from sd3pipe.adapters.kinds import check_option, check_spec
from sd3pipe.adapters.network import AdapterNetwork, attach, attach_deltas, check_fit, merge_into
from sd3pipe.adapters.targets import AdapterSpec, learning_rates, target_ranks
from sd3pipe.adapters.weights import trained_shapes
from sd3pipe.cores import usable_cores
from sd3pipe.diffusion.base_model import load_base
from sd3pipe.diffusion.precision import BASE_DTYPES
from sd3pipe.errors import InputError, ParameterError, StaleError
from sd3pipe.files import make_folder, storage_errors
from sd3pipe.memory.plan import Settings
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.models.pos_embed import ScaledPositions
from sd3pipe.params.train import TrainParams
from sd3pipe.training.adapter_options import adapter_spec, loraplus_ratio
from sd3pipe.training.batches import Position, plan_steps
from sd3pipe.training.compiling import compile_as_wanted
from sd3pipe.training.feed import Feed, FeedRules, Step, load_steps, with_modulation
from sd3pipe.training.key_values import parse_args
from sd3pipe.training.loop import Loop
from sd3pipe.training.memory_plan import MemoryPlan
from sd3pipe.training.objective import Objective
from sd3pipe.training.optimizers import check_optimizer_args, make_optimizer
from sd3pipe.training.picture_losses import picture_ids
from sd3pipe.training.records import Records
from sd3pipe.training.run import Run, RunInputs, TrainedModel
from sd3pipe.training.run_folder import describe
from sd3pipe.training.saving import Saver, loras_file
from sd3pipe.training.schedules import make_schedule
from sd3pipe.training.spilling import SpillWatch, device_is_full
from sd3pipe.training.state_file import Progressed
from sd3pipe.training.step_runner import StepRunner
from sd3pipe.training.step_samples import check_prompts, make_sampler
from sd3pipe.training.trained_weights import TrainedWeights
from sd3pipe.training.training_data import check_captions
from sd3pipe.training.validation import Validator

log = logging.getLogger(__name__)

_LONGEST_NAME = 255  # bytes that a file system takes


def check_options(run: Run, architecture: MMDiTArchitecture) -> None:
    """Refuses, before any weights of the base are read, options, adapters and texts that cannot be trained with."""
    params, inputs = run.params, run.inputs
    check_captions(params, run.data.text, architecture)
    check_prompts(params, architecture)
    make_schedule(params.schedule, inputs.total_steps)
    spec = adapter_spec(params.adapter, seed=params.seed)
    sizes = architecture.linear_sizes()
    learning_rates(target_ranks(sizes, spec), spec, params.optimizer.learning_rate)
    _check_kinds(params, spec, inputs)
    args = parse_args("optimizer_args", params.optimizer.optimizer_args)
    check_optimizer_args(params.optimizer.optimizer_type, args, axes={*map(len, trained_shapes(sizes, spec))})
    for path in (*inputs.base_weights, *([inputs.network_weights] if inputs.network_weights else [])):
        check_fit(sizes, read_adapter(path).model_part)
    if params.loras_dir is not None:
        name = run.output_name
        if len(os.fsencode(loras_file(name, 0))) > _LONGEST_NAME:
            raise ParameterError(
                f"output_name = {name[:40]}...: is too long for the name of a file: choose a shorter one"
            )
        folder = make_folder(params.loras_dir)
        with storage_errors(folder), tempfile.TemporaryFile(dir=folder):
            pass  # adapters go there at the first save, which may be hours away


def _check_kinds(params: TrainParams, spec: AdapterSpec, run: RunInputs) -> None:
    """Refuses to train kinds of layers that only act, and options that the kinds which are trained do not have."""
    kinds: set[str] = {spec.algorithm}
    if run.network_weights is not None:
        given = read_adapter(run.network_weights).model_part
        only_act = [path for path, delta in given.items() if not delta.trainable]
        if only_act:
            raise ParameterError(
                f"{run.network_weights}: {only_act[0]} is changed by a {given[only_act[0]].title} of a form that is "
                "not trained: turn the adapter into a LoRA with `sd3pipe adapter resize`, or merge it into the base "
                "with base_weights"
            )
        kinds = {delta.algorithm for delta in given.values()} if params.dim_from_weights else kinds
    for kind in sorted(kinds):
        check_spec(spec, kind)
        if loraplus_ratio(params.adapter) != 1.0:
            check_option(kind, "loraplus_lr_ratio")
        if params.scale_weight_norms is not None:
            check_option(kind, "scale_weight_norms")


def build_loop(run: Run, memory: MemoryPlan) -> Loop:
    """Returns a loop that is ready to run, from the checkpoint of `run.start` if there is one."""
    params, device, checkpoint = run.params, run.processes.device, run.start.checkpoint
    schedule = make_schedule(params.schedule, run.inputs.total_steps)
    if checkpoint is not None and not run.start.changes.keys() & {"lr_scheduler", "lr_warmup_steps"}:
        # the warm-up of a run that goes on keeps the length it began with
        schedule = replace(schedule, warmup_steps=checkpoint.state["warmup_steps"])
    model = _model(run, memory.settings)
    saver, progressed = Saver(run, model, schedule.warmup_steps), Progressed()
    if checkpoint is not None:
        try:
            saver.restore(checkpoint)
        except InputError as error:
            if not run.start.changes:
                raise
            raise StaleError(
                f"{checkpoint.path} cannot go on with these changes ({describe(run.start.changes)}): {error}: restore "
                "what differs, or let --network-weights begin another run from its adapter"
            ) from error
        progressed = Progressed.from_state(checkpoint.state)
    records = Records(run) if run.processes.is_main else None
    return Loop(
        run=run,
        runner=StepRunner(run, model, schedule),
        progressed=progressed,
        steps_from=functools.partial(_steps_from, run, model),
        saver=saver,
        records=records,
        picture_ids=picture_ids(run.data.train),
        validate=Validator(run, model, records) if len(run.data.validation) else None,
        sample=make_sampler(run, model) if records else None,
        streamer=model.streamer,
        spilling=SpillWatch(functools.partial(device_is_full, device)),
    )


def _model(run: Run, settings: Settings) -> TrainedModel:
    params, device, precision = run.params, run.processes.device, run.inputs.precision
    mmdit, streamer = load_base(run.source, dtype=BASE_DTYPES[precision], device=device, settings=settings)
    sizes = len(set(run.data.resolutions))
    compile_as_wanted(mmdit, params.numerics, device, run.inputs.total_steps, sizes)
    if params.positions.enable_scaled_pos_embed:
        mmdit.scaled_positions = ScaledPositions(run.data.resolutions, mmdit.architecture.width)
    base_weights = run.inputs.base_weights
    multipliers = [*params.base_weights_multiplier, *[1.0] * len(base_weights)]
    for path, multiplier in zip(base_weights, multipliers, strict=False):
        merge_into(mmdit, read_adapter(path).model_part, multiplier)
        log.info("merged into the base at strength %g: %s", multiplier, path)
    spec = adapter_spec(params.adapter, seed=params.seed)
    network = _attach_adapter(params, spec, mmdit, run.inputs.network_weights, device)
    weights = TrainedWeights(network, seed=params.seed, ema_decay=params.ema_decay)
    groups = network.parameter_groups(
        spec, params.optimizer.learning_rate, loraplus_lr_ratio=loraplus_ratio(params.adapter)
    )
    optimizer_args = parse_args("optimizer_args", params.optimizer.optimizer_args)
    return TrainedModel(
        objective=Objective(
            mmdit, network, params.loss, position_crop_rate=params.positions.pos_emb_random_crop_rate
        ),
        streamer=streamer,
        weights=weights,
        optimizer=make_optimizer(params.optimizer.optimizer_type, weights.optimizer_groups(groups), optimizer_args),
        scaler=torch.amp.GradScaler(device.type) if precision == "fp16" else None,
    )  # fmt: skip


def _attach_adapter(
    params: TrainParams, spec: AdapterSpec, mmdit: MMDiT, network_weights: Path | None, device: torch.device
) -> AdapterNetwork:
    """Returns the adapter that will be trained: fresh, or with the weights of another one."""
    dtype = torch.bfloat16 if params.full_bf16 else torch.float32
    given = read_adapter(network_weights).model_part if network_weights else None
    if given is not None and params.dim_from_weights:
        return attach_deltas(mmdit, given, dropout=spec.dropout, device=device, dtype=dtype)
    network = attach(mmdit, spec, device=device, dtype=dtype)
    if given is not None:
        network.load(given)
    return network


def _steps_from(run: Run, model: TrainedModel, position: Position) -> Iterator[Step]:
    """Returns the tensors of the steps from a position on, for this process."""
    params, data, processes = run.params, run.data, run.processes
    on_gpu = processes.device.type == "cuda"
    workers = params.reading.max_data_loader_n_workers
    plans = plan_steps(
        data.train,
        position,
        seed=params.seed,
        batch_size=params.batches.train_batch_size,
        accumulation=params.batches.gradient_accumulation_steps,
        rank=processes.rank,
        num_ranks=processes.count,
    )
    rules = FeedRules.of(params, model.objective.mmdit.context_embedder.compute_dtype)
    workers = (2 if on_gpu else 0) if workers is None else min(workers, usable_cores())
    steps = load_steps(Feed(data.train, data.latents, data.text, rules), plans, workers=workers, pin_memory=on_gpu)
    return with_modulation(steps, model.streamer.prepare) if model.streamer.prepares_modulation else steps
