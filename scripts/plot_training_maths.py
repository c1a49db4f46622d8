"""Draws docs/training-maths.svg: how much a training run cares about each noise level, for every scheme and loss form.

The figures come from sd3pipe.training.flow itself: 400,000 evenly spread draws go through sample_sigmas' steps, and
each noise level counts with the weight that the loss gives to a squared velocity error there. Every curve has area 1.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sd3pipe.rules.flow import SigmaSampling
from sd3pipe.training import flow
from sd3pipe.words import LossForm, WeightingScheme

TARGET = Path(__file__).resolve().parent.parent / "docs" / "training-maths.svg"
DRAWS, BINS = 400_000, 100
SHIFTS = (1.0, 3.0)
FORMS: dict[LossForm, tuple[WeightingScheme, ...]] = {
    "velocity": ("uniform", "logit_normal", "mode", "cosmap"),
    "x0": ("uniform", "logit_normal", "mode", "cosmap", "sigma_sqrt"),
}
COLOURS = {"uniform": "#555", "logit_normal": "#c22", "mode": "#27c", "cosmap": "#292", "sigma_sqrt": "#b70"}
PANEL_WIDTH, PANEL_HEIGHT, MARGIN = 360, 200, 56
HIGHEST = 6.0  # of the vertical axis


def emphasis(scheme: WeightingScheme, form: LossForm, shift: float) -> NDArray[np.float64]:
    """Returns the share of each of BINS equal intervals of sigma, times BINS: a density of area 1."""
    sampling = SigmaSampling(weighting_scheme=scheme, loss_form=form, training_shift=shift)
    draws = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    sigmas = flow.shift_sigmas(flow.scheme_times(draws, sampling), shift)
    weights, error_scales = flow.loss_weights(sigmas, sampling)
    shares = (weights * error_scales.square()).double()
    density, _ = np.histogram(sigmas.numpy(), bins=BINS, range=(0, 1), weights=shares.numpy())
    return density / density.sum() * BINS


def panel(form: LossForm, shift: float, left: float, top: float) -> list[str]:
    """Returns the SVG elements of one set of axes with its curves."""
    base = top + PANEL_HEIGHT
    parts = [
        f'<rect x="{left}" y="{top}" width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}" fill="none" stroke="#999"/>',
        f'<text x="{left}" y="{top - 10}" font-weight="bold">loss_form = {form}, shift {shift:g}</text>',
        f'<text x="{left + PANEL_WIDTH / 2}" y="{base + 34}" text-anchor="middle">sigma</text>',
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = left + tick * PANEL_WIDTH
        parts.append(f'<text x="{x:.0f}" y="{base + 16}" text-anchor="middle" fill="#555">{tick:g}</text>')
    for tick in range(int(HIGHEST) + 1):
        y = base - tick / HIGHEST * PANEL_HEIGHT
        parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end" fill="#555">{tick}</text>')
        parts.append(f'<path d="M{left} {y:.1f}h{PANEL_WIDTH}" stroke="#eee"/>')
    for row, scheme in enumerate(FORMS[form]):
        heights = np.minimum(emphasis(scheme, form, shift), HIGHEST)
        points = " ".join(
            f"{left + (index + 0.5) / BINS * PANEL_WIDTH:.1f},{base - height / HIGHEST * PANEL_HEIGHT:.1f}"
            for index, height in enumerate(heights)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[scheme]}" stroke-width="2"/>')
        name = "uniform = none" if scheme == "uniform" else scheme
        parts.append(f'<text x="{left + 10}" y="{top + 18 + 16 * row}" fill="{COLOURS[scheme]}">{name}</text>')
    return parts


def main() -> None:
    """Writes the plot."""
    width, height = 2 * (PANEL_WIDTH + MARGIN) + 20, 2 * (PANEL_HEIGHT + MARGIN + 20) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        '  font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for row, shift in enumerate(SHIFTS):
        for column, form in enumerate(FORMS):
            parts += panel(form, shift, 40 + column * (PANEL_WIDTH + MARGIN), 30 + row * (PANEL_HEIGHT + MARGIN + 20))
    TARGET.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
