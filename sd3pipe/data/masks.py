"""Loss masks at latent resolution: 1 where the loss counts, 0 where it does not."""

import numpy as np

from sd3pipe.data.resize import area_mean


def latent_mask(levels_HW: np.ndarray, latent_px: int) -> np.ndarray:
    """Returns a uint8 mask averaged over latents of `latent_px` pixels a side, as float16 [h, w] from 0 to 1.

    sd-scripts averages over the same areas at training time; half precision is exact to 1/2048 there.
    """
    return (area_mean(levels_HW, latent_px) / 255).astype(np.float16)
