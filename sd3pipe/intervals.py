"""Confidence intervals of means, as Student's t gives them."""

import math
from collections.abc import Sequence

# 97.5 % quantiles of Student's t by degrees of freedom, and the normal one for more
_T_QUANTILES = (
    12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)  # fmt: skip
_NORMAL_QUANTILE = 1.96


def t_quantile(freedom: float) -> float:
    """Returns the 97.5 % quantile of Student's t; broken degrees of freedom, at least 1, count as the next lower."""
    return _T_QUANTILES[max(1, int(freedom)) - 1] if freedom < len(_T_QUANTILES) + 1 else _NORMAL_QUANTILE


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean, and half the width of its 95 % confidence interval; None for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, t_quantile(len(values) - 1) * math.sqrt(variance / len(values))
