"""How far drawn pictures have come from the base's towards a set of pictures, along what sets the two apart.

Pictures of one subject differ in colours, background and size, and a cosine counts all of that. Here one direction
counts: the one in which the set lies apart from what the base draws of the same prompts, for how much the pictures of
either vary among themselves (Fisher's linear discriminant). There are fewer pictures than numbers in an embedding, so
their covariance is shrunk as Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance
matrices", do it. A direction that is fitted to pictures flatters these very pictures: so pictures of one seed are
measured along one that was fitted to the base's pictures of the other seeds, and the scale is that of pictures of the
set and of prompts that were left out.
"""

# C columns: the base, then K checkpoints; P prompts, S seeds, F the one of them that is left out in turn, X the other
# D embedding width, N pictures of a set, B pictures of the base, R residuals

import numpy as np

from sd3pipe.judging.bootstrap import Array

_LEAST_UNIT = 0.1  # of the distance that is fitted; below it the direction is one of chance


def towards(drawn_CPSD: Array, pictures_ND: Array) -> Array | None:
    """Returns how far each picture has come from the base's of the same prompt and noise [K, P, S].

    0 is where the base's pictures lie and 1 where those of the set do. None where the judge model does not tell the two
    apart. With a single seed prompts are left out in turn instead of seeds.
    """
    unit = _unit(drawn_CPSD[0], pictures_ND)
    if unit < _LEAST_UNIT:
        return None
    folds = 2 if drawn_CPSD.shape[2] > 1 else 1  # the axis whose members are left out in turn
    turned_CFXD = np.moveaxis(drawn_CPSD, folds, 1)
    count = turned_CFXD.shape[1]
    come_KFX = np.empty((len(drawn_CPSD) - 1, *turned_CFXD.shape[1:3]))
    for turn in range(count):
        _, others_BD = _left_out(turned_CFXD[0], turn, count)
        direction_D = discriminant(others_BD, pictures_ND)
        come_KFX[:, turn] = (turned_CFXD[1:, turn] - turned_CFXD[0, turn]) @ direction_D
    return np.moveaxis(come_KFX, 1, folds) / unit


def discriminant(first_ND: Array, second_ND: Array) -> Array:
    """Returns the direction [D] along which two sets lie apart by 1 and vary least; zeros for sets that coincide."""
    apart_D = second_ND.mean(axis=0) - first_ND.mean(axis=0)
    covariance_DD = shrunken_covariance(np.concatenate([_residuals(first_ND), _residuals(second_ND)]))
    direction_D = np.linalg.solve(covariance_DD, apart_D)
    distance = direction_D @ apart_D
    return direction_D / distance if distance > 0 else direction_D


def shrunken_covariance(residuals_RD: Array) -> Array:
    """Returns the covariance of residuals, shrunk towards a multiple of the identity as its own error suggests."""
    number, width = residuals_RD.shape
    sample_DD = residuals_RD.T @ residuals_RD / number
    mean = np.trace(sample_DD) / width
    if mean == 0:
        return np.eye(width)
    target_DD = mean * np.eye(width)
    spread = ((sample_DD - target_DD) ** 2).sum()
    error = ((residuals_RD**2).sum(axis=1) ** 2).sum() / number**2 - (sample_DD**2).sum() / number
    share = min(1.0, error / spread) if spread > 0 else 1.0
    return (1 - share) * sample_DD + share * target_DD


def _unit(base_PSD: Array, pictures_ND: Array) -> float:
    """Returns how far apart the base's pictures and the set lie along directions that were fitted without them."""
    turns = min(len(base_PSD), len(pictures_ND))
    units = []
    for turn in range(turns):
        left_out_BD, base_BD = _left_out(base_PSD, turn, turns)
        left_out_ND, fitted_ND = _left_out(pictures_ND, turn, turns)
        units.append((left_out_ND.mean(axis=0) - left_out_BD.mean(axis=0)) @ discriminant(base_BD, fitted_ND))
    return float(np.mean(units))


def _left_out(vectors: Array, turn: int, turns: int) -> tuple[Array, Array]:
    """Returns every `turns`-th item of the first axis, and the others, as rows; with one turn all of them twice."""
    mine = np.arange(len(vectors)) % turns == turn
    kept = vectors[~mine] if turns > 1 else vectors
    return vectors[mine].reshape(-1, vectors.shape[-1]), kept.reshape(-1, vectors.shape[-1])


def _residuals(vectors_ND: Array) -> Array:
    """Returns the differences from the mean, at the spread of an unbiased estimate."""
    number = len(vectors_ND)
    return (vectors_ND - vectors_ND.mean(axis=0)) * np.sqrt(number / max(1, number - 1))
