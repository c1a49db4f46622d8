"""`sd3pipe train`: caches and a frozen MMDiT to an adapter, resumable to the bit."""

import contextlib
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from sd3pipe import stopping
from sd3pipe.cache.folder import machine_folder
from sd3pipe.cache.staleness import check_sources
from sd3pipe.console import StageReport, count, listed
from sd3pipe.device_memory import memory_errors, peak_device_bytes, peak_rss_bytes
from sd3pipe.diffusion.precision import BASE_DTYPES, resolve_precision
from sd3pipe.errors import ParameterError, StaleError, StorageError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.files import lock_file
from sd3pipe.models.architecture import mmdit_architecture
from sd3pipe.models.sources import find_component
from sd3pipe.params.train import TrainParams, idle_options
from sd3pipe.rules.memory import NumericsRules
from sd3pipe.training.belonging import misfits
from sd3pipe.training.checkpoints import checkpoint_paths, mark_best, named_step, set_aside_later
from sd3pipe.training.compiling import compilations
from sd3pipe.training.loop import Loop
from sd3pipe.training.memory_plan import MemoryPlan, run_memory
from sd3pipe.training.optimizers import check_optimizer
from sd3pipe.training.processes import Processes, join_processes
from sd3pipe.training.records import check_trackers, forget_after, subset_figures
from sd3pipe.training.run import Run, RunInputs, resolve_inputs, run_identity
from sd3pipe.training.run_folder import RunFolder, Start, choose_start, is_finished
from sd3pipe.training.setup import build_loop, check_options
from sd3pipe.training.state_file import Progressed
from sd3pipe.training.training_data import data_summary, encode_summary, open_data
from sd3pipe.training.validation import verdict
from sd3pipe.watched import Look
from sd3pipe.words import CLIP_TOKENS

log = logging.getLogger(__name__)

_NO_KERNEL = ("No available kernel", "No viable backend")
_ATTENTION_SWITCHES: dict[str, Callable[[bool], None]] = {
    "flash": torch.backends.cuda.enable_flash_sdp,
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
}


def main(params: TrainParams) -> None:
    """Trains, or goes on training, until the last step. Raises Stopped when asked to stop on the way."""
    processes = join_processes(params.device, params.threads)
    _set_numerics(params.numerics)
    inputs = params.as_inputs("model", "text", "latents")
    report = StageReport("train", path=params.out / "report.json", inputs=inputs)
    folder = RunFolder(params.out)
    with contextlib.ExitStack() as main_only:
        if processes.is_main:
            main_only.enter_context(_only_writer(folder))
            main_only.enter_context(report)
        _train(params, processes, report, folder)
    processes.leave()


@contextlib.contextmanager
def _only_writer(folder: RunFolder) -> Iterator[None]:
    """Keeps other processes from training into the same folder. Raises StorageError where one does, or it is none."""
    run = folder.place
    if run.is_file():
        raise StorageError(f"{run} is a file, not a folder: choose another --out")
    with lock_file(machine_folder(run).parent / f"{run.resolve().name}.lock") as free:
        if not free:
            raise StorageError(f"another process trains into {run}: wait for it, stop it, or choose another --out")
        folder.recover()
        yield


def _train(params: TrainParams, processes: Processes, report: StageReport, folder: RunFolder) -> None:
    started = time.monotonic()
    for line in idle_options(params) if processes.is_main else ():
        log.warning("%s", line)
    freshness = _check_freshness(params)
    check_optimizer(params.optimizer.optimizer_type)
    check_trackers(params)
    data = open_data(params)
    source = find_component("mmdit", model=params.model, file=params.mmdit)
    stamps = FileStamps(machine_folder(params.out).parent / "stat.json", trust=not params.reading.verify_weights)
    base = source.fingerprint(stamps)
    stamps.save()
    precision = resolve_precision(params.mixed_precision, processes.device)
    inputs = resolve_inputs(params, data, base=base, precision=precision, num_processes=processes.count)
    identity = run_identity(params, data, inputs)
    start = processes.same(_start(params, identity, inputs) if processes.is_main else None)
    assert start is not None
    run = Run(
        params=params,
        processes=processes,
        data=data,
        source=source,
        inputs=inputs,
        identity=identity,
        start=start,
        folder=folder,
    )
    report.update(options=params.model_dump(mode="json"), identity=identity, sources_checked=freshness)
    report.update(data=data_summary(data), encoded=encode_summary({"text": params.text, "latents": params.latents}))
    if is_finished(params.out, start, identity, inputs.total_steps):
        done = Progressed.from_state(start.checkpoint.state) if start.checkpoint else Progressed()
        report.keep(seconds_per_step=None, peak_rss_bytes=peak_rss_bytes(), peak_device_bytes=0)
        report.update(**_how_far(done), steps_now=0, subsets=subset_figures(params.out))
        report.summary = f"nothing to do, all {count(inputs.total_steps, 'step')} are done"
        return
    check_options(run, mmdit_architecture(source))
    if processes.is_main:
        for line in misfits(params, data, stamps):
            log.warning("%s", line)
        stamps.save()
    report.summary = _run(run, report, started, freshness)


def _run(run: Run, report: StageReport, started: float, freshness: str) -> str:
    """Trains to the last step, and returns the summary; whatever ends it, the report says how far it came."""
    params, processes, folder, total_steps = run.params, run.processes, run.folder, run.inputs.total_steps
    memory = run_memory(
        params,
        mmdit_architecture(run.source),
        resolutions_px=run.data.resolutions,
        text_tokens=CLIP_TOKENS + int(run.data.train.text_lengths.max()),
        device=processes.device,
        dtype=BASE_DTYPES[run.inputs.precision],
        files=run.source.paths,
    )
    stopping.check()
    if run.start.aside and processes.is_main:
        folder.keep_apart(run.start.aside)
    with memory_errors(lambda: memory.advice(processes.device)), _kernel_errors(params):
        loop = build_loop(run, memory)
        steps_before = loop.progressed.step
        loop.seconds_by_phase["preparing"] = time.monotonic() - started
        try:
            if processes.is_main:
                _begin_at(loop.progressed, params, folder)
                if steps_before:
                    log.info("going on from step %s of %s", f"{steps_before:,}", f"{total_steps:,}")
            loop.train()
        finally:
            loop.close()
            report.update(**_figures(loop, memory, processes, steps_before), subsets=subset_figures(folder.path))
            if loop.progressed.step != steps_before:
                if folder.is_in_place:
                    report.begin()
            elif processes.is_main:
                folder.forget()
        # last: nothing is missing once it is there
        loop.saver.finish()
    says = verdict(params.out)
    if says:
        log.info("%s", says)
    report.update(validation=says)
    went_on = f" (from step {steps_before})" if steps_before else ""
    unchecked = ", captions and pictures not checked: they are not here" if freshness == "unknown" else ""
    steps, loss = loop.progressed.step, loop.progressed.loss_mean
    return f"{count(steps, 'step')}{went_on}, loss {loss:.4f}{unchecked}"


def _start(params: TrainParams, identity: dict[str, object], run: RunInputs) -> Start:
    allowed = [name.strip() for text in params.allow_changes for name in text.split(",") if name.strip()]
    return choose_start(params.out, params.resume, identity, allow_changes=allowed, total_steps=run.total_steps)


def _begin_at(state: Progressed, params: TrainParams, folder: RunFolder) -> None:
    """Lets what the run recorded go that is done again; only once nothing can be refused any more."""
    if params.resume not in ("auto", "never"):
        set_aside_later(folder.path, state.step)
    is_here = any(named_step(path) == state.best_step for path in checkpoint_paths(folder.path))
    mark_best(folder.path, state.best_step if is_here else None, state.best_loss)
    forget_after(folder.path, state.step, state.owed if state.step else ("validation",))


def _check_freshness(params: TrainParams) -> str:
    """Returns what the check of the encoded files said. Raises StaleError if they changed, unless that is fine."""
    states, look = [], Look()
    for cache in (params.text, params.latents):
        check = check_sources(cache, look)
        states.append(check.state)
        if check.state == "changed":
            message = f"{cache} is older than what it was encoded from: {listed(check.changes, separator='; ')}"
            if not params.stale_ok:
                raise StaleError(f"{message}: encode again, or train all the same with --stale-ok")
            log.warning("%s", message)
    return "changed" if "changed" in states else "fresh" if set(states) == {"fresh"} else "unknown"


def _figures(loop: Loop, memory: MemoryPlan, processes: Processes, steps_before: int) -> dict[str, object]:
    """Returns what the report says about the run; the time of a step is the median, for the first one warms up."""
    seconds = statistics.median(loop.seconds_per_step) if loop.seconds_per_step else None
    peak = peak_device_bytes(processes.device)
    copied = int(statistics.median(loop.copied_per_step)) if loop.copied_per_step else None
    return {
        **_how_far(loop.progressed),
        "steps_now": loop.progressed.step - steps_before,
        "seconds_per_step": seconds,
        "memory": memory.as_report(peak_device_bytes=peak, seconds_per_step=seconds, copied_bytes_per_step=copied),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak,
        "phases": {name: round(value, 3) for name, value in loop.seconds_by_phase.items()},
        "streamed_bytes": loop.streamer.copied_bytes,
        "compilations": compilations(),
    }


def _how_far(state: Progressed) -> dict[str, object]:
    return {
        "steps": state.step,
        "epochs": state.epochs_done,
        "loss_first": state.loss_first,
        "loss_last": state.loss_last,
        "loss_mean": state.loss_mean,
        "best_step": state.best_step,
        "skipped_steps": list(state.skipped_steps),
    }


@contextlib.contextmanager
def _kernel_errors(params: TrainParams) -> Iterator[None]:
    """Says which option asks for an attention kernel that there is not for this device and number format."""
    try:
        yield
    except RuntimeError as error:
        backend = params.numerics.sdpa_backend
        if backend == "auto" or not any(sign in str(error) for sign in _NO_KERNEL):
            raise
        raise ParameterError(
            f"--sdpa-backend {backend}: torch has no such attention kernel for this device and number format: use auto"
        ) from error


def _set_numerics(rules: NumericsRules) -> None:
    """Switches TF32 and attention kernels on or off, and nondeterministic kernels off where bits are promised."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = rules.tf32 and not rules.deterministic
    for name, enable in _ATTENTION_SWITCHES.items():
        enable(rules.sdpa_backend in ("auto", name))
    if rules.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with a fixed workspace
        torch.use_deterministic_algorithms(True)
