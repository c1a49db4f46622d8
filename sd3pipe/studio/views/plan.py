"""Plan: what fits the card, and the parameters of each stage as a form."""

from typing import Any

from sd3pipe.console import readable_bytes
from sd3pipe.encoding.cache_sizes import cache_sizes
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.memory.plan import option_text
from sd3pipe.params.command_line import STAGE_MODULES
from sd3pipe.params.encode_latents import EncodeLatentsParams
from sd3pipe.params.encode_text import EncodeTextParams
from sd3pipe.params.plan import PlanParams
from sd3pipe.params.resolve import resolve
from sd3pipe.project.amounts import read_amounts
from sd3pipe.project.card import card_bytes
from sd3pipe.project.inputs import stage_options
from sd3pipe.project.planning import make_plan, with_options_of_training
from sd3pipe.stages import STAGES_BY_NAME
from sd3pipe.studio.app import Ask
from sd3pipe.studio.forms import changed_elsewhere, save_stage, stage_form
from sd3pipe.studio.gallery import option_values

_CARD = {"vram": "card's memory", "ram": "host memory", "tflops": "TFLOP/s, for seconds"}
_AGAIN = "save again to put yours in its place"


def page(ask: Ask) -> str:
    module = ask.query.get("stage", "train")
    if module not in STAGE_MODULES:
        module = "train"
    card = card_bytes()
    return ask.page(
        "plan",
        title="Plan",
        paths=list(ask.project.paths.items()),
        card={name: (label, f"{card / 1e9:.0f}GB" if name == "vram" and card else "") for name, label in _CARD.items()},
        stages=list(STAGE_MODULES),
        module=module,
        panels=stage_form(ask.project, module),
        file=ask.project.stage_file(module),
    )


def table(ask: Ask) -> dict[str, Any]:
    """Returns plan's own table for a card, with what the stages' files say of a step."""
    given = {name: ask.text(name) for name in _CARD if ask.text(name)}
    read_amounts.cache_clear()  # for a command's life; here files change
    params, adapter = with_options_of_training(resolve(PlanParams, "plan", given, project=ask.project), ask.project)
    t5_tokens = option_values(ask.project, "encode-text")["t5xxl_max_token_length"]
    sizes, advice = _disk(ask)
    plan = make_plan(params, adapter, t5_tokens=t5_tokens, disk=sizes)
    chosen = plan.chosen[0] if plan.chosen else None
    rows = [(*cells, settings == chosen) for cells, (settings, _) in zip(plan.cells(), plan.rows, strict=True)]
    verdict = ""
    if given.get("vram"):
        fits = f"fits: {option_text(chosen, plan.model.depth)}" if chosen else None
        verdict = fits or "nothing fits: try base_dtype int8 or nf4"
    disk = ", ".join(f"{name} {readable_bytes(size)}" for name, size in plan.disk.items())
    disk = f"{disk}; {advice}" if advice else disk
    return {"html": ask.page("plan_table", rows=rows, verdict=verdict, disk=disk, variant=plan.variant)}


def _disk(ask: Ask) -> tuple[dict[str, int], str | None]:
    """Returns the bytes of the caches, none where the encode stages lack an input, and how they would be fewer."""
    try:
        text, latents = (stage_options(ask.project, STAGES_BY_NAME[name]) for name in ("encode-text", "encode-latents"))
        assert isinstance(text, EncodeTextParams) and isinstance(latents, EncodeLatentsParams)
        return cache_sizes(latents, text)
    except (InputError, ParameterError):
        return {}, None


def save(ask: Ask) -> dict[str, Any]:
    """Writes a stage's file, or says at each field what is wrong; what another window changed is told first."""
    module = ask.text("stage")
    if module not in STAGE_MODULES:
        raise ParameterError(f"stage: one of {', '.join(STAGE_MODULES)}")
    given = {name: value for name, value in ask.values.items() if name not in ("stage", "was")}
    was = ask.values.get("was")
    elsewhere = changed_elsewhere(ask.project, module, was if isinstance(was, dict) else {}, given)
    if elsewhere:
        said = {name: f"changed elsewhere, to {text or 'the default'}: {_AGAIN}" for name, text in elsewhere.items()}
        return {"fields": said, "was": elsewhere, "message": "nothing was saved: see the marked fields"}
    if wrong := save_stage(ask.project, module, given):
        return {"fields": wrong, "message": "nothing was saved: see the marked fields"}
    return {"message": f"saved in {ask.project.stage_file(module)}", "reload": True}
