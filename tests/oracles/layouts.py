"""Weights read out of other engines' layouts one number at a time, by what is written about them and nothing else."""

from __future__ import annotations

from torch import Tensor

AWQ_SLOT = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}
"""Which nibble of a word holds each of eight outputs."""


def _field(words: list[int], place: int, bits: int) -> int:
    """`bits` bits from bit `place` on of a little-endian stream of 32-bit words."""
    stream = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
    return stream >> place & ((1 << bits) - 1)


def gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, version: int) -> list[list[float]]:
    """[out][in]"""
    weight = []
    for out in range(qweight.shape[1]):
        column = qweight[:, out].tolist()
        row = []
        for index, group in enumerate(g_idx.tolist()):
            zero = (_field(qzeros[group].tolist(), out * bits, bits) + (version == 1)) % (1 << bits)
            row.append((_field(column, index * bits, bits) - zero) * float(scales[group, out]))
        weight.append(row)
    return weight


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> list[list[float]]:
    """[out][in]"""
    size = qweight.shape[0] // scales.shape[0]
    weight = []
    for out in range(scales.shape[1]):
        word, shift = out // 8, 4 * AWQ_SLOT[out % 8]
        row = []
        for index in range(qweight.shape[0]):
            code, zero = (int(words[word]) >> shift & 15 for words in (qweight[index], qzeros[index // size]))
            row.append((code - zero) * float(scales[index // size, out]))
        weight.append(row)
    return weight


def mlx(weight: Tensor, scales: Tensor, biases: Tensor, bits: int, group_size: int) -> list[list[float]]:
    """[out][in]"""
    found = []
    for out in range(len(weight)):
        words = [int(word) for word in weight[out].tolist()]
        groups = [index // group_size for index in range(scales.shape[1] * group_size)]
        found.append([_field(words, i * bits, bits) * float(scales[out, g]) + float(biases[out, g]) for i, g in enumerate(groups)])
    return found
