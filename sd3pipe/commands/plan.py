"""`sd3pipe plan`: memory, copies, seconds and disk of a training run, from headers alone."""

from pathlib import Path
from typing import Any, TypeVar

from sd3pipe.config import Project, find_project
from sd3pipe.console import readable_bytes, readable_seconds, say, say_json
from sd3pipe.encoding.cache_sizes import cache_sizes
from sd3pipe.memory.choosing import PlanRow
from sd3pipe.memory.plan import option_text
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.encode_latents import EncodeLatentsParams
from sd3pipe.params.encode_text import EncodeTextParams
from sd3pipe.params.plan import PlanParams
from sd3pipe.params.resolve import resolve
from sd3pipe.params.stage import StageParams
from sd3pipe.project.planning import Plan, make_plan, with_options_of_training

StageOptions = TypeVar("StageOptions", bound=StageParams)


def main(params: PlanParams) -> None:
    """Prints the plan. Raises InputError, and ParameterError for more blocks than there are."""
    project = find_project(Path.cwd())
    params, adapter = with_options_of_training(params, project)
    text = _stage_options(EncodeTextParams, "encode-text", params, project)
    disk, advice = {}, None
    if params.dataset is not None:
        disk, advice = cache_sizes(_stage_options(EncodeLatentsParams, "encode-latents", params, project), text)
    plan = make_plan(params, adapter, t5_tokens=text.t5xxl_max_token_length, disk=disk)
    if params.json_output:
        say_json(plan.as_json())
        return
    width, height = plan.size_px
    times = f" x {params.gradient_accumulation_steps}" if params.gradient_accumulation_steps > 1 else ""
    say(
        f"{plan.variant}: {plan.model.weights / 1e9:.2f} billion weights in {plan.model.depth} blocks; "
        f"{width} x {height} pixels, batch {params.train_batch_size}{times}, rank {params.network_dim}"
    )
    if plan.disk:
        say("disk: " + ", ".join(f"{name} {readable_bytes(size)}" for name, size in plan.disk.items()))
    if advice:
        say(f"disk: {advice}")
    say(*plan.table(), _verdict(params, plan), *(f"or, with less: {_told(plan, row)}" for row in plan.others))


def _stage_options(
    model: type[StageOptions], command: str, params: PlanParams, project: Project | None
) -> StageOptions:
    """Returns the options with which an encode stage would run here, but for what this command was given."""
    mine = {name: getattr(params, name) for name in ("model", "dataset", "t5xxl_max_token_length")}
    given: dict[str, Any] = {name: str(value) for name, value in mine.items() if value is not None}
    if project is None or "caches" not in project.paths:
        given["out"] = "caches/latents"  # where nothing is: only the header of each picture is asked
    wanted = {name: value for name, value in given.items() if name in model.model_fields}
    return resolve(model, command, wanted, project=project, stage_models=load_stage_models)


def _verdict(params: PlanParams, plan: Plan) -> str:
    if params.vram_bytes is None:
        return "give --vram (and --ram) to see which settings fit, --tflops to see seconds"
    where = readable_bytes(params.vram_bytes)
    if params.ram_bytes is not None:
        where += f" and {readable_bytes(params.ram_bytes)} of host memory"
    if plan.chosen is None:
        return f"nothing fits {where}: try --base-dtype int8 or nf4, a smaller picture or batch"
    return f"fits {where}: {_told(plan, plan.chosen)}"


def _told(plan: Plan, row: PlanRow) -> str:
    settings, prediction = row
    seconds = "" if prediction.seconds is None else f", {readable_seconds(prediction.seconds)} a step"
    on_device, on_host = readable_bytes(prediction.device_bytes), readable_bytes(prediction.host_bytes)
    return (
        f"{option_text(settings, plan.model.depth)} (about {on_device} on the device, {on_host} on the host{seconds})"
    )
