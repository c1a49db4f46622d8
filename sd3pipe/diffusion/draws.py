"""Random numbers as pure functions of (seed, purpose, counters), so that nothing depends on who draws first.

Numbers for many samples at once come from a hash of each sample's identity (the finaliser of splitmix64, Steele 2014);
whole tensors come from Philox, a counter-based generator (Salmon et al. 2011). Both are keyed by blake3.
"""

import numpy as np
from numpy.typing import NDArray

from sd3pipe.fingerprint import canonical_json, digest_bytes

Ids = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, splitmix64's increment


def stream_key(*parts: str | int) -> int:
    """Returns 128 bits that stand for the parts: seed, purpose, epoch or step, sample."""
    return int.from_bytes(digest_bytes(canonical_json(list(parts)))[:16], "little")


def mix(values: Ids) -> Ids:
    """Returns each 64-bit value scrambled, so that neighbouring values give unrelated ones."""
    with np.errstate(over="ignore"):
        values = values + _GOLDEN
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hashes(ids: Ids, *parts: str | int) -> Ids:
    """Returns 64 random bits for each id; equal parts and id give equal bits, whatever else is in `ids`."""
    key = stream_key(*parts)
    return mix(mix(ids ^ np.uint64(key & 0xFFFFFFFFFFFFFFFF)) ^ np.uint64(key >> 64))


def uniforms(ids: Ids, *parts: str | int) -> NDArray[np.float64]:
    """Returns a uniform number in [0, 1) for each id."""
    return (hashes(ids, *parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(shape: tuple[int, ...], *parts: str | int) -> NDArray[np.float32]:
    """Returns standard normal numbers that belong to the parts."""
    return np.random.Generator(np.random.Philox(key=stream_key(*parts))).standard_normal(shape, dtype=np.float32)


def torch_seed(*parts: str | int) -> int:
    """Returns a seed for torch's own generators, which drive dropout masks and stochastic rounding."""
    return stream_key(*parts) & 0x7FFFFFFFFFFFFFFF
