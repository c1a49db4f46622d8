"""Builds a run from its options: base, adapter, optimizer, feed, saver, and the loop that drives them."""

# B batch, C latent channels, h w latent pixels

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sd3pipe.adapters.files import read_adapter
from sd3pipe.adapters.kinds import check_option
from sd3pipe.adapters.network import AdapterNetwork, attach, attach_deltas, check_fit, merge_into
from sd3pipe.adapters.precision import StoredDtype
from sd3pipe.adapters.targets import learning_rates, target_ranks
from sd3pipe.diffusion.base_model import load_base
from sd3pipe.diffusion.precision import BASE_DTYPES
from sd3pipe.files import make_folder
from sd3pipe.memory.layer_major import run_layer_major
from sd3pipe.memory.plan import Settings
from sd3pipe.memory.streaming import BlockStreamer
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.models.pos_embed import ScaledPositions
from sd3pipe.models.sources import ComponentSource
from sd3pipe.params.train import TrainParams
from sd3pipe.training.adapter_options import adapter_spec, loraplus_ratio
from sd3pipe.training.batches import Position, plan_steps
from sd3pipe.training.checkpoints import Retention
from sd3pipe.training.compiling import compile_blocks, compiling_pays
from sd3pipe.training.description import adapter_metadata
from sd3pipe.training.feed import Feed, FeedRules, Step, load_steps, with_modulation
from sd3pipe.training.flow import Huber, SigmaSampling
from sd3pipe.training.identity import RunInputs, continued, make_schedule
from sd3pipe.training.loop import Loop, Plan
from sd3pipe.training.memory_plan import MemoryPlan
from sd3pipe.training.objective import ForwardPass, LossRules, Objective
from sd3pipe.training.optimizers import check_optimizer_args, make_optimizer, parse_args
from sd3pipe.training.processes import Processes
from sd3pipe.training.progressed import Every, Progressed
from sd3pipe.training.records import Records
from sd3pipe.training.run_folder import RunFolder, Start
from sd3pipe.training.sampler import check_prompts, make_sampler
from sd3pipe.training.saving import Saver
from sd3pipe.training.step_runner import LayerMajor, StepRunner
from sd3pipe.training.trackers import start_trackers
from sd3pipe.training.trained_weights import TrainedWeights
from sd3pipe.training.training_data import TrainingData, check_captions
from sd3pipe.training.validation import Validator

log = logging.getLogger(__name__)

_SAVED_DTYPES: Mapping[str | None, StoredDtype] = {None: "fp32", "float": "fp32", "fp16": "fp16", "bf16": "bf16"}


def check_options(params: TrainParams, architecture: MMDiTArchitecture, data: TrainingData, run: RunInputs) -> None:
    """Refuses, before any weights of the base are read, options, adapters and texts that cannot be trained with."""
    check_captions(params, data.text, architecture)
    check_prompts(params, architecture)
    make_schedule(params, run.total_steps)
    spec = adapter_spec(params)
    linears = dict(MMDiT(architecture, device="meta").linears())
    learning_rates(target_ranks(linears, spec), spec, params.learning_rate)
    for option, is_set in {
        "loraplus_lr_ratio": loraplus_ratio(params) != 1.0,
        "scale_weight_norms": params.scale_weight_norms is not None,
    }.items():
        if is_set:
            check_option(spec, option)
    check_optimizer_args(params.optimizer_type, parse_args("optimizer_args", params.optimizer_args))
    for path in (*run.base_weights, *([run.network_weights] if run.network_weights else [])):
        check_fit(linears, read_adapter(path).model_part)
    if params.loras_dir is not None:
        make_folder(params.loras_dir)


def build_loop(
    params: TrainParams,
    processes: Processes,
    data: TrainingData,
    source: ComponentSource,
    run: RunInputs,
    identity: Mapping[str, Any],
    start: Start,
    memory: MemoryPlan,
    folder: RunFolder,
) -> Loop:
    """Returns a loop that is ready to run, from the checkpoint of `start` if there is one."""
    checkpoint = start.checkpoint
    schedule = make_schedule(params, run.total_steps)
    if checkpoint is not None:
        schedule = continued(schedule, checkpoint.state["warmup_steps"])
    mmdit, streamer = _load_base(params, data, source, run, memory.settings, processes.device)
    network = _attach_adapter(params, mmdit, run, processes.device)
    weights = TrainedWeights(network, seed=params.seed, ema_decay=params.ema_decay)
    spec = adapter_spec(params)
    groups = network.parameter_groups(spec, params.learning_rate, loraplus_lr_ratio=loraplus_ratio(params))
    optimizer = make_optimizer(
        params.optimizer_type, weights.optimizer_groups(groups), parse_args("optimizer_args", params.optimizer_args)
    )
    scaler = torch.amp.GradScaler(processes.device.type) if run.precision == "fp16" else None
    saver = Saver(
        run=folder,
        processes=processes,
        network=network,
        weights=weights,
        optimizer=optimizer,
        scaler=scaler,
        state=_state(identity, schedule.warmup_steps, start),
        metadata=lambda progressed: adapter_metadata(
            params, data, run, progressed, variant=mmdit.architecture.variant, spec=spec
        ),
        dtype=_SAVED_DTYPES[params.save_precision],
        retention=_retention(params),
        names=data.train.names,
        output_name=params.output_name or params.out.name,
        loras_dir=params.loras_dir,
        newest=checkpoint,
    )
    progressed = Progressed()
    if checkpoint is not None:
        saver.restore(checkpoint)
        progressed = Progressed.from_state(checkpoint.state)
    objective = Objective(mmdit, network, _loss_rules(params))
    records = _records(params, folder, processes, start, identity)
    runner = StepRunner(
        objective=objective,
        network=network,
        weights=weights,
        optimizer=optimizer,
        schedule=schedule,
        processes=processes,
        subset_names=[rules.name for rules in data.train.rules],
        max_grad_norm=params.max_grad_norm,
        max_weight_norm=params.scale_weight_norms,
        loss_spike_factor=params.loss_spike_factor,
        scaler=scaler,
        layer_major=_layer_major(objective, streamer) if params.layer_major else None,
    )
    sampler = (
        make_sampler(params, folder, objective, weights, optimizer, processes, run.precision)
        if processes.is_main
        else None
    )
    return Loop(
        runner=runner,
        progressed=progressed,
        plan=_plan(params, run.total_steps),
        steps_from=functools.partial(_steps_from, params, data, mmdit, streamer, processes),
        saver=saver,
        records=records,
        validate=_validator(params, folder, data, objective, weights, optimizer, processes, records),
        sample=sampler,
        processes=processes,
        streamer=streamer,
    )


def _validator(
    params: TrainParams,
    folder: RunFolder,
    data: TrainingData,
    objective: Objective,
    weights: TrainedWeights,
    optimizer: Optimizer,
    processes: Processes,
    records: Records | None,
) -> Validator | None:
    """Returns what measures the held-out pictures, or None where there are none."""
    if not len(data.validation):
        return None
    return Validator(
        feed=Feed(data.validation, data.latents, data.text, _validation_rules(params, objective.mmdit)),
        batch_size=params.train_batch_size,
        max_batches=params.max_validation_steps,
        objective=objective,
        weights=weights,
        optimizer=optimizer,
        processes=processes,
        records=records,
        run=folder,
    )


def _load_base(
    params: TrainParams,
    data: TrainingData,
    source: ComponentSource,
    run: RunInputs,
    memory: Settings,
    device: torch.device,
) -> tuple[MMDiT, BlockStreamer]:
    mmdit, streamer = load_base(
        source,
        dtype=BASE_DTYPES[run.precision],
        device=device,
        base_format=params.base_dtype,
        blocks_to_swap=memory.blocks_to_swap,
        modulation=memory.modulation,
        offload_activations=memory.activation_offload,
    )
    mmdit.gradient_checkpointing = params.gradient_checkpointing
    _compile(params, mmdit, run.total_steps, device)
    if params.enable_scaled_pos_embed:
        mmdit.scaled_positions = ScaledPositions(data.resolutions, mmdit.architecture.width)
    multipliers = [*params.base_weights_multiplier, *[1.0] * len(run.base_weights)]
    for path, multiplier in zip(run.base_weights, multipliers, strict=False):
        merge_into(mmdit, read_adapter(path).model_part, multiplier)
        log.info("merged into the base at strength %g: %s", multiplier, path)
    return mmdit, streamer


def _compile(params: TrainParams, mmdit: MMDiT, total_steps: int, device: torch.device) -> None:
    if params.torch_compile:
        compile_blocks(mmdit)
    elif params.torch_compile is None and not params.deterministic and compiling_pays(device, total_steps):
        log.info("compiling the blocks; the first steps take a minute or two longer (--no-torch-compile: not)")
        compile_blocks(mmdit, may_fail=True)


def _layer_major(objective: Objective, streamer: BlockStreamer) -> LayerMajor:
    """Returns what takes all micro-batches of a step through one block after the other."""

    def select(forward_pass: ForwardPass) -> None:
        objective.select(forward_pass)
        streamer.use(forward_pass.batch.modulation)

    def run(forward_passes: list[ForwardPass], weighed: Callable[[ForwardPass, Tensor], Tensor]) -> None:
        run_layer_major(
            objective.mmdit,
            streamer,
            [forward_pass.inputs for forward_pass in forward_passes],
            loss=lambda number, velocity_BChw: weighed(forward_passes[number], velocity_BChw),
            select=lambda number: select(forward_passes[number]),
        )
        streamer.use(None)

    return run


def _attach_adapter(params: TrainParams, mmdit: MMDiT, run: RunInputs, device: torch.device) -> AdapterNetwork:
    """Returns the adapter that will be trained: fresh, or with the weights of another one."""
    spec = adapter_spec(params)
    dtype = torch.bfloat16 if params.full_bf16 else torch.float32
    given = read_adapter(run.network_weights).model_part if run.network_weights else None
    if given is not None and params.dim_from_weights:
        return attach_deltas(mmdit, given, dropout=spec.dropout, device=device, dtype=dtype)
    network = attach(mmdit, spec, device=device, dtype=dtype)
    if given is not None:
        network.load(given)
    return network


def _steps_from(
    params: TrainParams,
    data: TrainingData,
    mmdit: MMDiT,
    streamer: BlockStreamer,
    processes: Processes,
    position: Position,
) -> Iterator[Step]:
    """Returns the tensors of the steps from a position on, for this process."""
    on_gpu = processes.device.type == "cuda"
    workers = params.max_data_loader_n_workers
    plans = plan_steps(
        data.train,
        position,
        seed=params.seed,
        batch_size=params.train_batch_size,
        accumulation=params.gradient_accumulation_steps,
        rank=processes.rank,
        num_ranks=processes.count,
    )
    rules = FeedRules(
        seed=params.seed,
        sampling=_sampling(params),
        use_masks=params.masked_loss != "off",
        encoder_dropout=(params.clip_l_dropout_rate, params.clip_g_dropout_rate, params.t5_dropout_rate),
        context_dtype=mmdit.context_embedder.compute_dtype,
    )
    feed = Feed(data.train, data.latents, data.text, rules)
    workers = (2 if on_gpu else 0) if workers is None else workers
    steps = load_steps(feed, plans, workers=workers, pin_memory=on_gpu)
    return with_modulation(steps, streamer.prepare) if streamer.prepares_modulation else steps


def _validation_rules(params: TrainParams, mmdit: MMDiT) -> FeedRules:
    """Returns the rules for held-out pictures: nothing is dropped, the noise belongs to the picture."""
    return FeedRules(
        seed=params.seed if params.validation_seed is None else params.validation_seed,
        sampling=_sampling(params),
        use_masks=params.masked_loss != "off",
        context_dtype=mmdit.context_embedder.compute_dtype,
    )


def _sampling(params: TrainParams) -> SigmaSampling:
    return SigmaSampling(
        weighting_scheme=params.weighting_scheme,
        loss_form=params.loss_form,
        logit_mean=params.logit_mean,
        logit_std=params.logit_std,
        mode_scale=params.mode_scale,
        training_shift=params.training_shift,
        min_timestep=params.min_timestep,
        max_timestep=params.max_timestep,
    )


def _loss_rules(params: TrainParams) -> LossRules:
    return LossRules(
        weighting_scheme=params.weighting_scheme,
        loss_form=params.loss_form,
        loss_type=params.loss_type,
        huber=Huber(schedule=params.huber_schedule, c=params.huber_c, scale=params.huber_scale),
        mask_normalisation="picture" if params.masked_loss == "sum" else "area",
        position_crop_rate=params.pos_emb_random_crop_rate,
    )


def _plan(params: TrainParams, total_steps: int) -> Plan:
    return Plan(
        total_steps=total_steps,
        save=Every(steps=params.save_every_n_steps, epochs=params.save_every_n_epochs),
        sample=Every(steps=params.sample_every_n_steps, epochs=params.sample_every_n_epochs),
        validate=Every(steps=params.validate_every_n_steps, epochs=params.validate_every_n_epochs),
        sample_at_first=params.sample_at_first,
        roll_back=params.on_bad_loss == "rollback",
    )


def _retention(params: TrainParams) -> Retention:
    return Retention(
        last_steps=params.save_last_n_steps,
        last_steps_state=params.save_last_n_steps_state,
        last_epochs=params.save_last_n_epochs,
        last_epochs_state=params.save_last_n_epochs_state,
    )


def _state(identity: Mapping[str, Any], warmup_steps: int, start: Start) -> dict[str, Any]:
    """Returns what every checkpoint of the run says, wherever it stands."""
    state: dict[str, Any] = {"identity": dict(identity), "warmup_steps": warmup_steps}
    changes: list[dict[str, Any]] = list(start.checkpoint.state.get("changes", [])) if start.checkpoint else []
    if start.checkpoint and start.changes:
        changes.append({"step": start.checkpoint.step, **start.changes})
    return {**state, "changes": changes}


def _records(
    params: TrainParams, folder: RunFolder, processes: Processes, start: Start, identity: Mapping[str, Any]
) -> Records | None:
    """Returns where the main process writes what happens."""
    if not processes.is_main:
        return None
    trackers = functools.partial(start_trackers, params, identity, processes) if params.log_with else None
    return Records(folder, trackers)
