"""Translates the options of a run of sd-scripts' sd3_train_network.py into a project, by the one table of them.

Every value that sd-scripts would use is written out, its own defaults included; whatever acts differently here, or not
at all, is told with the reason.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from sd3pipe.models.hub import is_hub_id
from sd3pipe.params.fields import is_foreign_code
from sd3pipe.params.sd_scripts import OPTIONS, SECRETS

Given = Mapping[str, Any]
STAGES = ("encode_text", "encode_latents", "train", "export")
_PROMPT_FILES = (".txt", ".toml", ".json")
_LYCORIS = {  # its algo -> our adapter_type
    "lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "diag-oft": "oft",
}  # fmt: skip
_OFT_HERE = "adapter_type = oft, whose network_dim is the width of a block, trains such"
_NOT_THE_SAME = {  # other kinds -> what is nearest here
    "tlora": "in sd-scripts LyCORIS is told no noise levels, so that all ranks act; adapter_type = tlora masks them",
    "boft": _OFT_HERE,
    "networks.oft": f"its network_dim is the number of blocks; {_OFT_HERE}",
    "networks.oft_v2": "adapter_type = oftv2, whose network_dim is the width of a block, trains such",
    "networks.boft": _OFT_HERE,
}
_LYCORIS_ARGS = {"factor": "lokr_factor"}
_SHORT_NAMES = {  # paths by which sd-scripts takes optimizers that have a name here
    "came_pytorch.CAME": "CAME",
    "prodigyplus.ProdigyPlusScheduleFree": "ProdigyPlusScheduleFree",
    "prodigyplus.prodigy_plus_schedulefree.ProdigyPlusScheduleFree": "ProdigyPlusScheduleFree",
}
_ENDS_ABOVE_ZERO = ("cosine_with_min_lr", "warmup_stable_decay")


@dataclass(slots=True, kw_only=True)
class Translation:
    """What a run of sd-scripts becomes: values for each file of the project, and lines to tell.

    `left_out` holds, by file and key, values that are written commented out and why.
    """

    name: str = "last"
    paths: dict[str, str] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=lambda: {stage: {} for stage in STAGES})
    dataset: dict[str, Any] = field(default_factory=dict)  # for the dataset file's [general]
    prompts: str | None = None  # text of a prompt file that the GUI would write
    left_out: dict[tuple[str, str], list[tuple[Any, str]]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)  # acts there and not here: told first
    changed: list[str] = field(default_factory=list)
    idle: dict[str, str] = field(default_factory=dict)  # option -> why it has no effect

    def leave_out(self, file: str, key: str, value: Any, reason: str) -> None:
        self.left_out.setdefault((file, key), []).append((value, reason))

    def put(self, file: str, key: str, value: Any) -> None:
        """Puts a value into the file that it belongs to."""
        target = self.dataset if file == "dataset" else self.paths if file == "project" else self.values[file]
        target[key] = value


def translate(given: Given, *, with_defaults: bool = True) -> Translation:
    """Returns the project that does what sd-scripts would do with the options `given`.

    Without defaults, what they do not say is left to sd3pipe's own.
    """
    asked = {name: value for name, value in given.items() if name not in OPTIONS or not OPTIONS[name].is_off(value)}
    result = Translation()
    for name, row in OPTIONS.items() if with_defaults else ():
        for place in row.places:
            if name not in asked and row.default is not None and place.value is None:
                result.put(place.file, place.key, row.default)
    for name, value in asked.items():
        _translate(name, value, result)
    # Options that stand under another name here beat the ones of that name, as unet_lr beats learning_rate there.
    for name, value in asked.items():
        for place in OPTIONS[name].places if name in OPTIONS else ():
            if place.key != name:
                result.put(place.file, place.key, value if place.value is None else place.value)
    given_name = str(asked.get("output_name") or result.name)
    result.name = re.split(r"[/\\]", given_name)[-1].strip(". ") or result.name
    if result.name != given_name:
        result.changed.append(f"output_name = {given_name}: the run is called {result.name}")
    _fix_network(asked, result)
    _fix_optimizer(asked, result)
    _fix_occasions(asked, result, with_defaults)
    _fix_loss(asked, result, with_defaults)
    _fix_rest(asked, result, with_defaults)
    return result


def shown(name: str, value: Any) -> str:
    """Returns an option as a line can show it."""
    return name if value is True or name in SECRETS else f"{name} = {value}"


def located(value: str) -> tuple[str, str | None]:
    """Returns an input's path as it holds from anywhere, and why it cannot be used here, if so."""
    path = Path(value).expanduser()
    if path.exists():
        return str(path.absolute()), None
    return value, "is a path of Windows" if _is_of_windows(value) else "is not here"


def _is_of_windows(value: str) -> bool:
    return not Path("C:/").is_absolute() and (bool(PureWindowsPath(value).drive) or "\\" in value)


def _translate(name: str, value: Any, result: Translation) -> None:
    row = OPTIONS.get(name)
    if row is None:
        near = next(iter(difflib.get_close_matches(name, OPTIONS, n=1)), None)
        hint = f" (did you mean {near}?)" if near else ""
        result.lost.append(f"{shown(name, value)}: sd-scripts has no such option{hint}")
    elif row.fate == "idle" or (row.fate == "met" and value in row.met):
        result.idle[name] = f"{shown(name, value)}: {row.text}"
    elif row.fate == "refused":
        result.lost.append(f"{shown(name, value)}: {row.text}")
    elif row.fate == "met" and name != "network_module":
        result.changed.append(f"{shown(name, value)}: {row.otherwise or row.text}")
    for place in row.places if row else ():
        if place.key == name or place.value is not None:
            result.put(place.file, place.key, value if place.value is None else place.value)


def _fix_network(asked: Given, result: Translation) -> None:
    if not (asked.get("network_train_unet_only") is True or asked.get("network_train_text_encoder_only") is True):
        result.lost.append(
            "text encoder LoRA: without --network_train_unet_only sd-scripts trains CLIP-L and CLIP-G, too; here text "
            "encoders are not trained, since their outputs are cached. The MMDiT's part is the same"
        )
    train, module = result.values["train"], asked.get("network_module")
    if train.get("network_alpha") == 0:
        train["network_alpha"] = train.get("network_dim", OPTIONS["network_dim"].default)
    if module == "lycoris.kohya":
        _fix_lycoris(train, result)
    elif module is not None and module != "networks.lora_sd3":
        near = f"; {_NOT_THE_SAME[module]}" if module in _NOT_THE_SAME else ""
        result.changed.append(
            f"network_module = {module}: fails for SD3 in sd-scripts; taken as networks.lora_sd3{near}"
        )
    for key in ("network_weights", "base_weights"):
        if key in train:
            _locate(key, train, result)


def _fix_lycoris(train: dict[str, Any], result: Translation) -> None:
    """Takes LyCORIS' own network_args into options."""
    args = dict(arg.partition("=")[::2] for arg in train.get("network_args", []))
    algorithm = args.pop("algo", "lora")
    kind = _LYCORIS.get(algorithm.lower())
    if kind == "lora" and args.pop("dora_wd", "").lower() == "true":
        kind = "dora"
    if kind is None:
        near = _NOT_THE_SAME.get(algorithm.lower(), "sd3pipe trains lora, dora, loha, lokr and diag-oft")
        result.lost.append(f"algo = {algorithm}: taken as lora; {near}")
    if kind == "oft":
        _fix_oft(args, train, result)
    if "dropout" in args:
        train["network_dropout"] = float(args.pop("dropout"))
    train["adapter_type"] = kind or "lora"
    train["network_args"] = [f"{_LYCORIS_ARGS.get(key, key)}={value}" for key, value in args.items()]
    result.changed.append(f"network_module = lycoris.kohya: adapter_type = {train['adapter_type']}, in the same layers")


def _fix_oft(args: dict[str, str], train: dict[str, Any], result: Translation) -> None:
    """Takes away what LyCORIS' OFT does not look at, and says what acts otherwise here."""
    if train.pop("scale_weight_norms", None):
        result.lost.append(
            "scale_weight_norms: limits products of two factors here; network_alpha bounds an OFT's turn"
        )
    for name in ("network_alpha", "network_dropout"):
        if train.pop(name, None):
            result.changed.append(f"{name}: LyCORIS' OFT has no use for it; left out")
    for name in ("dropout", "rank_dropout"):
        if args.pop(name, None):
            result.changed.append(f"network_args {name}: LyCORIS' OFT has no use for it; left out")
    for name, why in (
        ("constraint", "LyCORIS means it times a layer's rows; network_alpha bounds the turn as ComfyUI reads it"),
        ("rescaled", "ComfyUI ignores the rows' scales, and they are not trained here"),
    ):
        if args.pop(name, "").lower() not in ("", "0", "0.0", "false"):
            result.lost.append(f"network_args {name}: {why}")
    result.changed.append(
        "algo = diag-oft: blocks are the widest up to network_dim that divide a layer's rows, of q, k and v each; "
        "LyCORIS' are never wider than they are many, and may reach from q into k"
    )


def _locate(key: str, train: dict[str, Any], result: Translation) -> None:
    """Makes paths of adapters absolute; if one is not here, all of that option are left out."""
    value = train[key]
    found = [located(path) for path in (value if isinstance(value, list) else [value])]
    problem = next((f"{path} {problem}" for path, problem in found if problem), None)
    if problem:
        result.leave_out("train", key, train.pop(key), problem)
    else:
        train[key] = [path for path, _ in found] if isinstance(value, list) else found[0][0]


def _fix_optimizer(asked: Given, result: Translation) -> None:
    train = result.values["train"]
    if train.get("optimizer_type") in _SHORT_NAMES:
        train["optimizer_type"] = _SHORT_NAMES[train["optimizer_type"]]
    if is_foreign_code(train.get("optimizer_type")):
        result.changed.append(
            f"optimizer_type = {train['optimizer_type']}: is imported and run, which a file may not ask for by itself: "
            "pass --allow-code to `sd3pipe run` or `train`"
        )
    if str(train.get("optimizer_type")).lower() == "adafactor":
        _fix_adafactor(asked, train, result)
    if train.get("lr_scheduler") == "constant":
        if warmup := train.get("lr_warmup_steps"):
            reason = "constant has no warm-up, and sd-scripts refuses the pair: constant_with_warmup has one"
            result.leave_out("train", "lr_warmup_steps", warmup, reason)
        train["lr_warmup_steps"] = 0
    ratio = asked.get("lr_scheduler_min_lr_ratio")
    if ratio is not None and train.get("lr_scheduler") not in _ENDS_ABOVE_ZERO:
        train.pop("lr_scheduler_min_lr_ratio")
        reason = f"sd-scripts takes it for {' and '.join(_ENDS_ABOVE_ZERO)} only; here every falling schedule does"
        result.leave_out("train", "lr_scheduler_min_lr_ratio", ratio, reason)


def _fix_adafactor(asked: Given, train: dict[str, Any], result: Translation) -> None:
    """Writes out the arguments that sd-scripts sets, and the schedule that it puts in place of the given one."""
    args = list(train.get("optimizer_args") or [])
    named = {name.strip(): value.strip() for name, _, value in (arg.partition("=") for arg in args)}
    for name in ("relative_step", "scale_parameter"):
        if name not in named:
            args.append(f"{name}=True")
    train["optimizer_args"] = args
    relative = named.get("relative_step", "True") == "True"
    if relative or str(asked.get("lr_scheduler")).startswith("adafactor"):
        train |= {"lr_scheduler": "constant", "lr_warmup_steps": 0}
    if relative:
        ignored = [name for name in ("learning_rate", "unet_lr", "lr_scheduler", "lr_warmup_steps") if name in asked]
        for name in ignored:
            result.idle[name] = f"{shown(name, asked[name])}: with relative_step=True Adafactor sets its steps itself"


def _fix_occasions(asked: Given, result: Translation, with_defaults: bool) -> None:
    """Writes when a run saves, samples and validates, where our own defaults would do it as well."""
    train = result.values["train"]
    if "max_train_epochs" in asked:
        train.pop("max_train_steps", None)
    ratio = asked.get("save_n_epoch_ratio")
    if isinstance(ratio, int) and ratio > 0:
        counted = "epochs" if "max_train_epochs" in train else "steps"
        all_of_them = train.get(f"max_train_{counted}", OPTIONS["max_train_steps"].default)
        train[f"save_every_n_{counted}"] = max(1, int(all_of_them) // ratio)
        result.changed.append(f"save_n_epoch_ratio = {ratio}: save_every_n_{counted} = {all_of_them} / {ratio}")
    for what in ("save", "sample", "validate"):
        by_steps, by_epochs = f"{what}_every_n_steps", f"{what}_every_n_epochs"
        if what == "sample" and by_steps in train and by_epochs in train:  # epochs win there
            result.leave_out("train", by_steps, train.pop(by_steps), "sd-scripts counts the epochs if both are given")
        if with_defaults or by_epochs in train:
            train.setdefault(by_steps, 0)
    if with_defaults:
        train.setdefault("validate_every_n_epochs", 1)
    if train.get("sample_at_first") and not (train.get("sample_every_n_steps") or train.get("sample_every_n_epochs")):
        counted = "epochs" if "max_train_epochs" in train else "steps"
        train[f"sample_every_n_{counted}"] = train.get(f"max_train_{counted}", 1)
        result.changed.append("sample_at_first: samples are drawn at the end, too")


def _fix_loss(asked: Given, result: Translation, with_defaults: bool) -> None:
    train = result.values["train"]
    if with_defaults:
        train["loss_form"] = "x0"  # sd-scripts' loss compares x - sigma v with the latents
    if train.get("loss_type") not in ("huber", "smooth_l1"):
        for key in ("huber_c", "huber_scale", "huber_schedule"):
            if key not in asked:
                train.pop(key, None)
    elif train.get("huber_schedule") == "snr":
        result.changed.append("huber_schedule = snr: sd-scripts fails with it on SD3; here it follows the noise level")


def _fix_rest(asked: Given, result: Translation, with_defaults: bool) -> None:
    train = result.values["train"]
    if with_defaults:
        train.setdefault("blocks_to_swap", 0)
    if "logging_dir" in train:
        train.setdefault("log_with", "tensorboard")
        _place_output("train", "logging_dir", train, result)
    if "thumbnail" in result.values["export"]:
        path, problem = located(str(result.values["export"].pop("thumbnail")))
        if problem:
            result.leave_out("export", "thumbnail", path, problem)
        else:
            result.put("export", "thumbnail", path)
    if "seed" not in asked:
        result.changed.append("seed: sd-scripts draws one; here it is 42, so that a run can be repeated")
    if asked.get("enable_scaled_pos_embed"):
        result.changed.append(
            "enable_scaled_pos_embed: a table of positions for each bucket's area; sd-scripts makes one for each "
            "dataset's resolution, which is the same without buckets"
        )
    masks = [name for name in ("apply_lg_attn_mask", "apply_t5_attn_mask") if asked.get(name)]
    if masks and not (asked.get("cache_text_encoder_outputs") or asked.get("cache_text_encoder_outputs_to_disk")):
        result.changed.append(f"{', '.join(masks)}: sd-scripts ignores it unless text encoder outputs are cached")
    _locate_paths(result)
    result.changed += [
        "latents: sd-scripts caches one random draw per picture; here train draws anew from the cached moments",
        "timesteps: sd-scripts rounds them to the compute type (507 values in bfloat16); here they stay float32",
        "resume is exact, and starts by itself when the same command is given again",
    ]


def _locate_paths(result: Translation) -> None:
    """Makes the paths of project.toml hold from anywhere; what is not here is left out."""
    prompts = result.paths.get("sample_prompts")
    if prompts is not None and Path(prompts).suffix.lower() not in _PROMPT_FILES:
        result.prompts, result.paths["sample_prompts"] = prompts, "sample_prompts.txt"
    for key, value in list(result.paths.items()):
        if key == "loras_dir":
            _place_output("project", key, result.paths, result)
        elif not (key == "model" and is_hub_id(value)) and not (key == "sample_prompts" and result.prompts):
            result.paths[key], problem = located(value)
            if problem:
                result.leave_out("project", key, result.paths.pop(key), problem)


def _place_output(file: str, key: str, values: dict[str, Any], result: Translation) -> None:
    """Makes a folder that is to be written hold from anywhere: sd-scripts takes it from the current one."""
    value = str(values.pop(key))
    if _is_of_windows(value):
        result.leave_out(file, key, value, "is a path of Windows")
    else:
        values[key] = str(Path(value).expanduser().absolute())
