"""The scales of fp8 checkpoints: which tensor scales which weight. An unknown scale is refused, never ignored.

A plain fp8 file is a cast and has none. A scaled one stores weight / scale and beside `X.weight` either
`X.scale_weight` (with a marker `scaled_fp8`) or `X.weight_scale` (with `X.comfy_quant`, a small JSON). Source:
ComfyUI's two generations of scaled fp8, model-spec section 1.4. Free of torch.
"""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from sd3pipe.documents import DocumentError, parse_json
from sd3pipe.errors import InputError
from sd3pipe.tensors.header import StoredTensor

FP8_DTYPES = ("F8_E4M3", "F8_E5M2")

_WEIGHT_SCALES = (".scale_weight", ".weight_scale")
_INPUT_SCALES = (".scale_input", ".input_scale")  # for multiplying in fp8; the weights do not depend on them
_MARKER = "scaled_fp8"
_FORMAT_NOTE = ".comfy_quant"
_NOTE_BYTES = 4096  # a format note is some 30 bytes of JSON
_NOTE = TypeAdapter(dict[str, Any])
_KNOWN_FORMAT = "float8_e4m3fn"
_LOGIT_SCALE = "logit_scale"  # CLIP's temperature has the word in its name and scales no weight


def take_scales(
    tensors: Mapping[str, StoredTensor], where: str
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Returns the weights by name, and for each scaled weight's name its scale.

    Raises InputError for a scale that is not understood or that has no fp8 weight, and for a weight that lacks its own.
    """
    weights: dict[str, StoredTensor] = {}
    scales: dict[str, StoredTensor] = {}
    noted: set[str] = set()
    for name, tensor in tensors.items():
        if suffix := _suffix(name, _WEIGHT_SCALES):
            scales[name.removesuffix(suffix) + ".weight"] = tensor
        elif name.endswith(_FORMAT_NOTE):
            _check_format(tensor, where)
            noted.add(name.removesuffix(_FORMAT_NOTE) + ".weight")
        elif _suffix(name, _INPUT_SCALES) or name == _MARKER:
            continue
        elif "scale" in name and not name.endswith(_LOGIT_SCALE):
            raise InputError(
                f"{where}: {name} scales weights in a way that is not understood: pass the bf16, fp16 or plain fp8 file"
            )
        else:
            weights[name] = tensor
    for name, scale in scales.items():
        _check_scale(name, scale, weights.get(name), where)
    matrices = {name for name, item in weights.items() if item.dtype in FP8_DTYPES and len(item.shape) == 2}
    promised = noted | (matrices if _MARKER in tensors else set())
    if lacking := sorted(promised - scales.keys()):
        raise InputError(
            f"{where}: a scaled fp8 file without the scale of {lacking[0]}: pass the bf16, fp16 or plain fp8 file"
        )
    return weights, scales


def _suffix(name: str, suffixes: tuple[str, ...]) -> str:
    return next((suffix for suffix in suffixes if name.endswith(suffix)), "")


def _check_scale(name: str, scale: StoredTensor, weight: StoredTensor | None, where: str) -> None:
    if weight is None or weight.dtype not in FP8_DTYPES:
        found = "which is not there" if weight is None else f"which is {weight.dtype}, not fp8"
        raise InputError(f"{where}: {scale.name} scales {name}, {found}: pass the bf16, fp16 or plain fp8 file")
    count = math.prod(scale.shape)
    rows = weight.shape[0] if weight.shape else 1
    per_row = count == rows and scale.shape[:1] == (rows,)
    if scale.dtype not in ("F32", "F16", "BF16") or not (count == 1 or per_row):
        raise InputError(
            f"{where}: {scale.name} is {scale.dtype} {list(scale.shape)}; understood is one float, or one a row: "
            "pass the bf16, fp16 or plain fp8 file"
        )


def _check_format(note: StoredTensor, where: str) -> None:
    """Raises InputError unless a format note says e4m3 with one scale."""
    with open(note.path, "rb") as handle:
        handle.seek(note.offset)
        text = handle.read(min(note.nbytes, _NOTE_BYTES))
    try:
        quantisation = parse_json(text, _NOTE, note.name).get("format")
    except DocumentError:
        quantisation = None
    if quantisation != _KNOWN_FORMAT:
        raise InputError(
            f"{where}: {note.name} says the format {ascii(quantisation)[:40]}; understood is {_KNOWN_FORMAT}: "
            "pass the bf16, fp16 or plain fp8 file"
        )
