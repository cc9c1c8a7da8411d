"""A weight as the product of two of low rank, chosen by what its inputs make of the error.

With ``H`` the second moment of the inputs, the squared output error of ``W'`` is ``tr((W - W') H (W - W')^T)``. If ``H = S S^T``, that is the
squared norm of ``(W - W') S``, so the best ``W' S`` of rank r is that of the singular value decomposition of ``W S``, and what is lost is the sum
of the squares of the singular values left out (SVD-LLM, arXiv 2403.07378, section 3.1). With ``S = I`` that is the plain decomposition, with ``S``
the diagonal of the inputs' mean magnitudes to some power ASVD (arXiv 2312.05821, section 3.2). LoRD (arXiv 2309.14021, section 3) keeps the
directions in which outputs vary most, the first eigenvectors of ``W H W^T``; in exact arithmetic that is the product SVD-LLM finds.

All in float64; a square root of ``H`` is [in, in] lower triangular, or [in] where it is diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROOM = 1e-6
"""What the least eigenvalue becomes where a second moment has to be mended, as a fraction of the mean of its diagonal."""


@dataclass(frozen=True)
class Factors:
    """``first`` [rank, in] and ``second`` [out, rank], of which ``second @ first`` stands for a weight [out, in]."""

    first: Tensor
    second: Tensor

    @property
    def product(self) -> Tensor:
        """[out, in]."""
        return self.second @ self.first


def magnitudes_root(magnitude: Tensor, alpha: float = 0.5) -> Tensor:
    """ASVD's stand-in for a square root of the second moment: ``magnitude`` [in], the mean of ``|x|``, to the power `alpha`, [in] float64.

    Channels that were always zero count as the smallest that was not, since what they are multiplied by is divided by afterwards.
    """
    root = magnitude.double() ** alpha
    alive = root[root > 0]
    return root.clamp_min(float(alive.min()) if len(alive) else 1.0)


def moment_root(moment: Tensor) -> tuple[Tensor, float]:
    """The lower triangular square root of ``moment`` [in, in], the mean of ``x x^T``, [in, in] float64, and what had to be added to its diagonal.

    Zero where it is positive definite. Otherwise (SVD-LLM, the released code) as much as makes its least eigenvalue `ROOM`, of the mean of the
    diagonal: without data, all inputs then count alike.
    """
    moment = moment.double()
    root, failed = torch.linalg.cholesky_ex(moment)
    if not int(failed):
        return root, 0.0
    least = float(torch.linalg.eigvalsh(moment)[0])
    added = max(0.0, -least) + ROOM * (float(moment.diagonal().mean()) or 1.0)
    return torch.linalg.cholesky(moment + added * torch.eye(len(moment), dtype=torch.float64, device=moment.device)), added


def energy(weight: Tensor, root: Tensor) -> Tensor:
    """[min(out, in)] float64, descending: squares of the singular values of ``weight`` [out, in] times ``root``."""
    values: Tensor = torch.linalg.svdvals(_times(weight, root))
    return values.square()


def decompose(weight: Tensor, root: Tensor, rank: int) -> Factors:
    """The factors of ``weight`` [out, in] of this rank that lose least of its product with ``root``; each takes the roots of the singular values."""
    left, values, right = torch.linalg.svd(_times(weight, root), full_matrices=False)
    sizes = values[:rank].sqrt()
    rows = right[:rank]
    # B S = V^T, solved for B; the triangle is inverted by substitution, never as a matrix.
    plain = rows / root if root.ndim == 1 else torch.linalg.solve_triangular(root, rows, upper=False, left=False)
    return Factors(sizes[:, None] * plain, left[:, :rank] * sizes)


def output_energy(weight: Tensor, moment: Tensor) -> Tensor:
    """[out] float64, descending: eigenvalues of the second moment of the outputs of ``weight`` [out, in]."""
    values: Tensor = torch.linalg.eigvalsh(_outputs(weight, moment))
    return values.flip(0).clamp_min(0)


def output_directions(weight: Tensor, moment: Tensor, rank: int) -> Factors:
    """LoRD: ``Q`` and ``Q^T W``, with ``Q`` [out, rank] the directions in which the outputs of ``weight`` [out, in] are largest."""
    directions = torch.linalg.eigh(_outputs(weight, moment)).eigenvectors.flip(1)[:, :rank]
    return Factors(directions.T @ weight.double(), directions)


def lost(weight: Tensor, instead: Tensor, moment: Tensor) -> float:
    """Squared error of the outputs with ``instead`` of ``weight``, both [out, in], as a share of their sum of squares; 0 if there is none."""
    apart, weight = weight.double() - instead.double(), weight.double()
    moment = moment.double()
    whole = float(((weight @ moment) * weight).sum())
    return float(((apart @ moment) * apart).sum()) / whole if whole > 0 else 0.0


def _times(weight: Tensor, root: Tensor) -> Tensor:
    return weight.double() * root if root.ndim == 1 else weight.double() @ root


def _outputs(weight: Tensor, moment: Tensor) -> Tensor:
    product = weight.double() @ moment.double() @ weight.double().T
    return (product + product.T) / 2
