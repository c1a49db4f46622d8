"""Makes the optimizer that the user named, and turns its state into plain tensors and JSON and back, bit for bit."""

import importlib
import importlib.util
import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeGuard, cast

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.optim import Optimizer

from sd3pipe.errors import InputError, ParameterError

log = logging.getLogger(__name__)

ParameterGroups = Sequence[dict[str, Any]]  # params and lr, as torch's optimizers take them
Args = Mapping[str, object]  # values of Python literals


_CLASSES = {
    "adamw": "torch.optim.AdamW",
    "adam": "torch.optim.Adam",
    "muon": "torch.optim.Muon",
    "adafactor": "sd3pipe.training.adafactor.Adafactor",
    "sgdnesterov": "torch.optim.SGD",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "pagedadamw": "bitsandbytes.optim.PagedAdamW",
    "pagedadamw8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "pagedadamw32bit": "bitsandbytes.optim.PagedAdamW32bit",
    "lion": "bitsandbytes.optim.Lion",
    "lion8bit": "bitsandbytes.optim.Lion8bit",
    "pagedlion8bit": "bitsandbytes.optim.PagedLion8bit",
    "ademamix8bit": "bitsandbytes.optim.AdEMAMix8bit",
    "sgdnesterov8bit": "bitsandbytes.optim.SGD8bit",
    "came": "came_pytorch.CAME",
    "prodigy": "prodigyopt.Prodigy",
    "prodigyplusschedulefree": "prodigyplus.ProdigyPlusScheduleFree",
    "adamwschedulefree": "schedulefree.AdamWScheduleFree",
    "radamschedulefree": "schedulefree.RAdamScheduleFree",
    "sgdschedulefree": "schedulefree.SGDScheduleFree",
    "dadaptation": "dadaptation.experimental.DAdaptAdamPreprint",
    "dadaptadampreprint": "dadaptation.experimental.DAdaptAdamPreprint",
    "dadaptadagrad": "dadaptation.DAdaptAdaGrad",
    "dadaptadam": "dadaptation.DAdaptAdam",
    "dadaptadan": "dadaptation.DAdaptAdan",
    "dadaptadanip": "dadaptation.experimental.DAdaptAdanIP",
    "dadaptlion": "dadaptation.DAdaptLion",
    "dadaptsgd": "dadaptation.DAdaptSGD",
}
_NESTEROV: Args = {"momentum": 0.9, "nesterov": True}
_SHORT_FOR: dict[str, Args] = {  # arguments that a short name stands for
    "muon": {"adjust_lr_fn": "match_rms_adamw"},  # AdamW's rates hold
    "sgdnesterov": _NESTEROV,
    "sgdnesterov8bit": _NESTEROV,
    "prodigyplusschedulefree": {"split_groups": False},  # one step is estimated for all
}
_IN_EXTRA = ("came_pytorch", "prodigyopt", "prodigyplus", "schedulefree")  # pip install sd3pipe[optimizers]
_OF_AN_AVERAGE = ("betas", "momentum")  # they say how far schedule-free weights lie from their average
_OF_AN_ESTIMATE = ("d0",)  # Prodigy's sums are in units of it
_NEAR_ONE = 0.1
_ESTIMATE_THEIR_RATE = ("prodigy", "dadapt")  # their learning_rate multiplies an estimate, and belongs near 1


# What is compiled are the blocks of the model, never a step. Torch's optimizers keep these methods from the compiler,
# and would import it to do so, for 1.2 s: here they are told that it is done.
for _method in (Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict):
    _plain = getattr(_method, "__wrapped__", None)  # of a wrapper that asks for the plain method, disabled, here:
    if _plain is not None and not hasattr(_plain, "__dynamo_disable"):
        _plain.__dynamo_disable = _plain


def make_optimizer(name: str, groups: ParameterGroups, args: Args) -> Optimizer:
    """Returns the optimizer for `name`: a short name, a class of torch.optim, or any dotted class path."""
    rates = {group["lr"] for group in groups}
    if name.lower().startswith(_ESTIMATE_THEIR_RATE):
        if len(rates) > 1:
            raise ParameterError(
                f"optimizer_type = {name} estimates one step for all: leave out lr_rules and loraplus_lr_ratio"
            )
        if max(rates) < _NEAR_ONE:
            log.warning("learning_rate = %g: %s estimates the step itself, so set it near 1", *rates, name)
    if args.get("relative_step"):
        log.warning("learning_rate, lr_scheduler and lr_rules have no effect: relative_step=True sets the steps itself")
    optimizer = _construct(name, groups, args)
    set_training(optimizer, training=True)  # schedule-free optimizers of other packages begin in neither mode
    return optimizer


def check_optimizer(name: str) -> None:
    """Raises ParameterError for an optimizer that is not there. A known one is not imported: bitsandbytes takes 4 s."""
    known = _CLASSES.get(name.lower())
    if known is None or importlib.util.find_spec(known.partition(".")[0]) is None:
        _find(name)


def check_optimizer_args(name: str, args: Args, *, axes: Collection[int]) -> None:
    """Raises ParameterError for arguments that the optimizer does not take, and for weights of so many axes."""
    _construct(name, [{"params": [nn.Parameter(torch.zeros([1] * count)) for count in axes], "lr": 1.0}], args)


def _construct(name: str, groups: ParameterGroups, args: Args) -> Optimizer:
    optimizer_class, defaults = _find(name), _SHORT_FOR.get(name.lower(), {})
    accepted = inspect.signature(optimizer_class).parameters
    if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in accepted.values()):
        unknown = [key for key in args if key not in accepted]
        if unknown:
            known = ", ".join(key for key in accepted if key not in ("params", "lr"))
            raise ParameterError(f"optimizer_args: {name} does not know {', '.join(unknown)}: it takes {known}")
        if "lr" in args:
            raise ParameterError(f"optimizer_args: lr={args['lr']}: set learning_rate instead")
    step = optimizer_class.step
    if getattr(getattr(step, "__code__", None), "co_name", "") == "_use_grad" and not args.get("differentiable"):
        # torch's wrapper around the step switches gradients off with the compiler's help
        optimizer_class.step = torch.no_grad()(inspect.unwrap(step))
    options = {"lr": groups[0]["lr"], **_fast_kernels(optimizer_class, groups, args), **defaults, **args}
    try:
        return cast(Callable[..., Optimizer], optimizer_class)([dict(group) for group in groups], **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ParameterError(f"optimizer_type = {name}, optimizer_args = {dict(args)}: {error}") from error


def set_training(optimizer: Optimizer, *, training: bool) -> None:
    """Switches a schedule-free optimizer's weights between the trained ones and their average; others have no modes."""
    switch = getattr(optimizer, "train" if training else "eval", None)
    if switch is not None:
        switch()


def _find(name: str) -> type[Optimizer]:
    path = _CLASSES.get(name.lower()) or (name if "." in name else f"torch.optim.{name}")
    module_name, _, class_name = path.rpartition(".")
    try:
        optimizer_class = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        package = module_name.partition(".")[0]
        wanted = '"sd3pipe[optimizers]"' if package in _IN_EXTRA else package
        raise ParameterError(
            f"optimizer_type = {name}: the package {package} cannot be imported ({error}): "
            f"pip install {wanted}, or choose AdamW"
        ) from error
    except AttributeError:
        optimizer_class = None
    if not isinstance(optimizer_class, type) or not issubclass(optimizer_class, Optimizer):
        raise ParameterError(
            f"optimizer_type = {name}: unknown: use a class of torch.optim, a dotted class path, or one of "
            + ", ".join(sorted(_CLASSES))
        )
    return optimizer_class


def _fast_kernels(optimizer_class: type[Optimizer], groups: ParameterGroups, args: Args) -> Args:
    """Returns fused=True where torch has a fused kernel, for it runs once over all tensors.

    `optimizer_args` fused=False or foreach=True choose others; without any, torch takes foreach on CUDA by itself.
    """
    if not optimizer_class.__module__.startswith("torch.optim") or {"foreach", "differentiable"} & args.keys():
        return {}
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = "fused" in inspect.signature(optimizer_class).parameters and devices <= {"cuda", "cpu"}
    return {"fused": True} if fused else {}


def export_state(optimizer: Optimizer, names: Mapping[Tensor, str]) -> tuple[dict[str, Tensor], dict[str, JsonValue]]:
    """Returns the optimizer's state as it is now, tensors where they lie, and the rest of it as JSON types.

    Whoever writes it does so before the next step, and needs no second copy of it in memory.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, JsonValue] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            _put(f"state/{names[parameter]}/{key}", value, tensors, values)
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key != "params":
                _put(f"group/{number}/{key}", value, tensors, values)
    return tensors, values


def import_state(
    optimizer: Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, JsonValue],
    *,
    made_by: tuple[str, Args] | None = None,
) -> None:
    """Puts back what `export_state` returned, but for learning rates: the options and the schedule say those.

    `made_by` are the optimizer_type and arguments of the state where the run's own are others, which then act. Unlike
    load_state_dict, no tensor changes its dtype. Raises InputError for what cannot go on so.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    if made_by is not None:
        others = _other_options(optimizer, *made_by, {**tensors, **values})
        tensors = {path: tensor for path, tensor in tensors.items() if path not in others}
        values = {path: value for path, value in values.items() if path not in others}
    _check_state(optimizer, parameters, {**tensors, **values})
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    optimizer.state.clear()
    for path, value in {**tensors, **values}.items():
        kind, rest = path.split("/", 1)
        owner, key = rest.rsplit("/", 1)
        if kind == "group":
            if key != "lr":
                optimizer.param_groups[int(owner)][key] = _from_json(value)
            continue
        parameter = parameters[owner]
        if isinstance(value, Tensor):
            # torch keeps step counters on the CPU unless a kernel on the device reads them
            value = value.clone() if key == "step" and not fused else value.to(parameter.device, copy=True)
        optimizer.state[parameter][key] = value


def _other_options(optimizer: Optimizer, name: str, args: Args, found: Mapping[str, object]) -> set[str]:
    """Returns the paths of the group values that another optimizer_type or other arguments set differently.

    Raises InputError for what the optimizer has moved since, or counts on to stay.
    """
    groups = [{"params": group["params"], "lr": group["lr"]} for group in optimizer.param_groups]
    before, now = _construct(name, groups, args).defaults, optimizer.defaults
    fixed = {*_OF_AN_ESTIMATE, *(_OF_AN_AVERAGE if hasattr(optimizer, "eval") else ())}
    others = [key for key in now if key != "lr" and not _equal(before.get(key), now[key])]
    paths = {f"group/{number}/{key}": key for key in others for number in range(len(groups))}
    for path, key in paths.items():
        is_moved = path in found and key in before and not _equal(before[key], _from_json(found[path]))
        if is_moved or key in fixed:
            raise InputError(f"{key} of a {type(optimizer).__name__} can only be set when it begins")
    return set(paths)


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other


def _check_state(optimizer: Optimizer, parameters: Mapping[str, Tensor], found: Mapping[str, object]) -> None:
    """Raises InputError for state of other parameters, or of another form than this optimizer's."""
    by_owner: dict[str, dict[str, object]] = {}
    for path, value in found.items():
        kind, _, rest = path.partition("/")
        owner, _, key = rest.rpartition("/")
        if kind == "group":
            _check_group_value(optimizer, owner, key, value)
        elif kind != "state" or owner not in parameters:
            raise InputError(f"the checkpoint's optimizer state has {owner or path}, which this adapter does not")
        else:
            by_owner.setdefault(owner, {})[key] = value
    # the first group as the checkpoint has it: what Prodigy Plus keeps of a parameter depends on the step
    start = "group/0/"
    saved = {path.removeprefix(start): value for path, value in found.items() if path.startswith(start)}
    own = {key: _from_json(value) for key, value in saved.items() if key != "lr" and not isinstance(value, Tensor)}
    group = {**optimizer.param_groups[0], **own}
    expected: dict[tuple[int, ...], list[Mapping[str, object]]] = {}
    for owner, state in by_owner.items():
        shape = tuple(parameters[owner].shape)
        if shape not in expected:
            expected[shape] = _first_states(optimizer, group, parameters[owner])
        forms = {key: _form(value) for key, value in state.items()}
        known = expected[shape]
        if forms.keys() != known[0].keys() or any(
            all(form != one[key] for one in known) for key, form in forms.items()
        ):
            raise InputError(f"the checkpoint's optimizer state of {owner} is not that of a {type(optimizer).__name__}")


def _check_group_value(optimizer: Optimizer, number: str, key: str, value: object) -> None:
    groups = optimizer.param_groups
    if not number.isascii() or not number.isdecimal() or int(number) >= len(groups):
        raise InputError(f"the checkpoint's optimizer has a group {number}, this run's has {len(groups)}")
    own = groups[int(number)].get(key)
    if own is not None and value is not None and _form(own) != _form(value):
        raise InputError(f"the checkpoint's optimizer has {key} = {value!r}, where this run's has {own!r}")


def _from_json(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _first_states(optimizer: Optimizer, group: Mapping[str, Any], like: Tensor) -> list[Mapping[str, object]]:
    """Returns the forms of what an optimizer keeps for a parameter of one shape: Prodigy keeps less of one of zeros."""
    forms = []
    for fill in (torch.zeros_like, torch.ones_like):
        parameter = nn.Parameter(fill(like))
        parameter.grad = torch.ones_like(parameter)
        trial = object.__new__(type(optimizer))  # a constructor wants what it was given, and not all keep that
        groups = [{**group, "params": [parameter]}]
        trial.__dict__ = {**optimizer.__dict__, "state": defaultdict(dict), "param_groups": groups}
        trial.step()
        forms.append({key: _form(value) for key, value in trial.state[parameter].items()})
    return forms


def _form(value: object) -> object:
    """Returns what makes two values stand for each other: shape and number format, or the kind of JSON value."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, list | tuple):
        return [_form(item) for item in value]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return "a number" if is_number else type(value)


def _put(path: str, value: object, tensors: dict[str, Tensor], values: dict[str, JsonValue]) -> None:
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
    elif _is_json(value):
        values[path] = value


def _is_json(value: object) -> TypeGuard[JsonValue]:
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, bool | int | float | str)
