"""Whether a row that somebody else encoded is the one that we would have encoded, up to rounding."""

# C latent channels, h w latent pixels, L tokens, D width

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sd3pipe.encoding.npz_files import NotProved

# Half precision stays far below these (docs/from-sd-scripts.md); another picture and another word do not.
_ROUNDING = 0.05  # of the latents' root mean square: what a VAE in half precision may be off
_WHOLE, _PLACE = 1.3, 25.0  # squared distance in units of posterior and rounding: mean, and mean at any one place
_STATES, _TOKEN = 0.1, 0.35  # relative distance of text states: over all tokens, and at any one


@dataclass(frozen=True, slots=True)
class Distance:
    """How far two rows are apart, as a share of their size: over all, and where it is largest."""

    whole: float
    place: float


def check_latents(sample_Chw: Tensor, mean_Chw: Tensor, logvar_Chw: Tensor) -> Distance:
    """Returns how far a draw is from the mean, beyond what drawing explains. Raises NotProved if that is too far."""
    variance_Chw, size = logvar_Chw.exp(), mean_Chw.square().mean().sqrt()
    off_Chw = (sample_Chw - mean_Chw).square()
    units_hw = (off_Chw / (variance_Chw + (_ROUNDING * size).square())).mean(dim=0)
    beyond_hw = (off_Chw - variance_Chw).mean(dim=0).clamp_min(0)
    distance = Distance(
        whole=float((off_Chw - variance_Chw).mean().clamp_min(0).sqrt() / size),
        place=float(beyond_hw.max().sqrt() / size),
    )
    if not (units_hw.mean() <= _WHOLE and units_hw.max() <= _PLACE):
        raise NotProved(f"its latents are not those of the picture ({_shown(distance)})")
    return distance


def check_states(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> Distance:
    """Returns the largest distance of text states [L, D] or vectors [D]. Raises NotProved if one is too large."""
    largest = Distance(whole=0.0, place=0.0)
    for name, our_states in ours.items():
        mine_LD = our_states.float().reshape(-1, our_states.shape[-1])
        other_LD = theirs[name].float().reshape(mine_LD.shape)
        off_L, size_L = (other_LD - mine_LD).norm(dim=1), mine_LD.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        distance = Distance(whole=float(off_L.norm() / size_L.norm()), place=float((off_L / size_L).max()))
        if not (distance.whole <= _STATES and distance.place <= _TOKEN):
            raise NotProved(f"its {name} is not that of the caption ({_shown(distance)})")
        largest = Distance(whole=max(largest.whole, distance.whole), place=max(largest.place, distance.place))
    return largest


def _shown(distance: Distance) -> str:
    return f"off by {distance.whole:.1%}, by {distance.place:.1%} at one place"
