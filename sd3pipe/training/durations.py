"""How long a run may take before it stops by itself."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """Returns seconds from "90", "90s", "15m", "1.5h" or "2d"."""
    return float(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else float(text)
