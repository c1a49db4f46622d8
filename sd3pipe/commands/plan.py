"""`sd3pipe plan`: memory, copies, seconds and disk of a training run, from headers alone."""

from sd3pipe.console import readable_bytes, say, say_json
from sd3pipe.memory.plan import option_text
from sd3pipe.params.plan import PlanParams
from sd3pipe.project.planning import Plan, Row, make_plan


def main(params: PlanParams) -> None:
    """Prints the plan. Raises InputError, and ParameterError for more blocks than there are."""
    plan = make_plan(params)
    if params.json_output:
        say_json(plan.as_json())
        return
    say(_header(params, plan), *plan.table(), _verdict(params, plan.chosen))
    if plan.disk:
        say("disk: " + ", ".join(f"{name} {readable_bytes(size)}" for name, size in plan.disk.items()))


def _header(params: PlanParams, plan: Plan) -> str:
    width, height = params.size_px
    return (
        f"{plan.variant}: {plan.model.weights / 1e9:.2f} billion weights in {plan.model.depth} blocks; "
        f"{width} x {height} pixels, batch {params.train_batch_size}"
        + (f" x {params.gradient_accumulation_steps}" if params.gradient_accumulation_steps > 1 else "")
        + f", rank {params.network_dim}"
    )


def _verdict(params: PlanParams, chosen: Row | None) -> str:
    if params.vram_bytes is None:
        return "give --vram (and --ram) to see which settings fit, --tflops to see seconds"
    where = readable_bytes(params.vram_bytes)
    if params.ram_bytes is not None:
        where += f" and {readable_bytes(params.ram_bytes)} of host memory"
    if chosen is None:
        return f"nothing fits {where}: try --base-dtype int8 or nf4, a smaller picture or batch"
    settings, prediction = chosen
    return f"fits {where}: {option_text(settings)} (about {readable_bytes(prediction.device_bytes)} on the device)"
