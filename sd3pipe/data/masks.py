"""Loss masks at latent resolution: 1 where the loss counts, 0 where it does not."""

import numpy as np

from sd3pipe.data.resize import area_mean

LATENT_PX = 8  # pixels per latent, each way


def latent_mask(levels_HW: np.ndarray) -> np.ndarray:
    """Returns a uint8 mask of a cut averaged over latents, as float16 [height / 8, width / 8] from 0 to 1.

    sd-scripts averages over the same areas at training time; half precision is exact to 1/2048 there.
    """
    return (area_mean(levels_HW, LATENT_PX) / 255).astype(np.float16)
