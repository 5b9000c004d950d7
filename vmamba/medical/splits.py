"""Which slices or cases validate and test: whole cases, or blocks of slices apart from each other."""

import numpy as np

from vmamba.errors import UserError


def split_cases(names: list[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """(train, val) of whole cases, drawn from ``seed``; at least one each. Needs two cases."""
    order = np.random.default_rng(seed).permutation(len(names))
    count = min(max(round(fraction * len(names)), 1), len(names) - 1)
    chosen = set(order[:count].tolist())
    return [n for i, n in enumerate(names) if i not in chosen], [n for i, n in enumerate(names) if i in chosen]


def split_slices(indices: np.ndarray, fractions: dict[str, tuple[float, float]], gap: int) -> dict[str, np.ndarray]:
    """Contiguous blocks of the sorted slice numbers ``indices``, each ``gap`` slices away from the rest.

    ``fractions`` gives each block's start and end in [0, 1]; what lies outside of them and of the gaps is "train".
    Neighbouring slices are near-copies, so that a random split would test on what was trained.
    """
    n, free = len(indices), np.ones(len(indices), bool)
    blocks = {}
    for name, (start, end) in fractions.items():
        first, last = round(start * n), max(round(end * n), round(start * n) + 1)
        blocks[name] = indices[first:last]
        free[max(first - gap, 0) : last + gap] = False
    if not free.any() or not all(len(block) for block in blocks.values()):
        raise UserError(f"{n} slices are too few for {', '.join(blocks)} blocks with gaps of {gap} slices; add a case")
    return {"train": indices[free], **blocks}
