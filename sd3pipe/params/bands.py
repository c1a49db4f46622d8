"""The noise levels at which held-out pictures are measured, by the names under which they are written down."""

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # the middles of five bands of equal width
BAND_NAMES = tuple(f"sigma_{sigma}" for sigma in SIGMAS)
