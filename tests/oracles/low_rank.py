"""What low-rank factors lose, on the tokens themselves; and every choice of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray


def output_error(weight: NDArray[np.float64], instead: NDArray[np.float64], inputs: NDArray[np.float64]) -> float:
    """Mean over tokens of the squared error of the outputs, one token at a time; ``inputs`` [tokens, in]."""
    total = 0.0
    for token in inputs:
        total += float(((weight - instead) @ token) @ ((weight - instead) @ token))
    return total / len(inputs)


def least_output_error(weight: NDArray[np.float64], inputs: NDArray[np.float64], rank: int) -> float:
    """The least any weight of this rank can have: Eckart and Young on the outputs themselves, [tokens, out]."""
    values = np.linalg.svd(inputs @ weight.T, compute_uv=False)
    return float((values[rank:] ** 2).sum()) / len(inputs)


def least_loss(spectra: Mapping[str, tuple[int, int, Sequence[float]]], budget: int, multiple: int) -> float:
    """The least sum of what is left out, over every choice of multiples or the whole within `budget` parameters; one multiple at least."""
    options = []
    for rows, columns, energy in spectra.values():
        ranks = [r for r in range(multiple, len(energy) + 1, multiple) if r * (rows + columns) < rows * columns]
        options.append([(r * (rows + columns), float(sum(energy[r:]))) for r in ranks] + [(rows * columns, 0.0)])
    return min(sum(loss for _, loss in chosen) for chosen in product(*options) if sum(size for size, _ in chosen) <= budget)
