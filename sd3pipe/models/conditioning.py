"""What the MMDiT is told about the text: context tokens and the pooled vector, assembled from the encoders' outputs.

Source: model-spec section 4 (Stability AI's sd3.5 reference, diffusers' encode_prompt). Needs torch alone.
"""

# B batch, L tokens, D width of the context, E the three encoders, P pooled width

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def assemble_conditioning(
    rows: Sequence[Mapping[str, Tensor]],
    *,
    keep_BE: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Returns context_BLD and pooled_BP of text rows (clip_l, clip_g, t5xxl, pooled_l, pooled_g).

    The two CLIPs stand side by side on the feature axis, zero-padded to T5's width, and T5's tokens follow theirs. Rows
    with fewer T5 tokens than the longest are filled with zeros. `keep_BE` is False where an encoder (clip_l, clip_g,
    t5xxl) is dropped: zeros take its place, in the pooled vector, too, as in sd-scripts.
    """
    kept_BE = torch.ones(len(rows), 3, dtype=torch.bool) if keep_BE is None else keep_BE.to("cpu", torch.bool)
    if kept_BE.shape != (len(rows), 3):
        raise ValueError(f"keep_BE has shape {list(kept_BE.shape)}, expected [{len(rows)}, 3]")
    clip_length = max(row["clip_l"].shape[0] for row in rows)
    t5_length = max(row["t5xxl"].shape[0] for row in rows)
    l_width, g_width = rows[0]["clip_l"].shape[1], rows[0]["clip_g"].shape[1]
    width = rows[0]["t5xxl"].shape[1]
    if l_width + g_width > width:
        raise ValueError(f"CLIP rows are {l_width} and {g_width} wide, together more than T5's {width}")
    context_BLD = torch.zeros(len(rows), clip_length + t5_length, width, dtype=dtype)
    pooled_BP = torch.zeros(len(rows), rows[0]["pooled_l"].shape[0] + rows[0]["pooled_g"].shape[0], dtype=dtype)
    for number, (row, (keeps_l, keeps_g, keeps_t5)) in enumerate(zip(rows, kept_BE.tolist(), strict=True)):
        if keeps_l:
            context_BLD[number, : row["clip_l"].shape[0], :l_width] = row["clip_l"]
            pooled_BP[number, : row["pooled_l"].shape[0]] = row["pooled_l"]
        if keeps_g:
            context_BLD[number, : row["clip_g"].shape[0], l_width : l_width + g_width] = row["clip_g"]
            pooled_BP[number, row["pooled_l"].shape[0] :] = row["pooled_g"]
        if keeps_t5:
            context_BLD[number, clip_length : clip_length + row["t5xxl"].shape[0]] = row["t5xxl"]
    return context_BLD, pooled_BP
