"""`nm-packed`: the weights that N:M or V:N:M pruning keeps, and where they stand. Ours alone; no other engine reads it.

===================  ===============================================  ===============================================================
tensor               dtype, shape                                     content
===================  ===============================================  ===============================================================
``X.nm_pattern``     int32 [4]                                        ``V`` (0: N:M), ``N``, ``M``, bits of a code (0: not quantised)
``X.weight_shape``   int64 [2]                                        ``[out, in]``
``X.nm_values``      dtype of the weight [out, kept]; int32 [out,     N weights of each group in ascending order, then the inputs
                     ceil(kept * bits / 32)] for codes                behind the last whole group
``X.nm_indices``     int32 [out, ceil(groups * N * b / 32)]           where in its group each of the N stands, in b = ceil(log2 M) bits;
                                                                      with V among the four inputs of its block, in 2 bits
``X.nm_columns``     int32 [out / V, ceil(groups * 4 * b / 32)]       with V only: these four inputs, ascending
``X.weight_scale``,  as in `pack-quantized`                           of codes only
``X.weight_zero_point``
===================  ===============================================  ===============================================================

A group with fewer than N weights that are not zero keeps zeros too, the first there are, so that a weight has one packing only. Streams of bits are
those of `pack-quantized`, without an offset for indices. A weight that is not kept is zero, its code that of the zero point; minus zero is not
told from zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import InputError
from compress.formats.pack_quantized import SCALE, SHAPE, ZERO_POINT, pack_stream, pack_zero_points, unpack_stream, unpack_zero_points
from compress.numerics.grid import Integer, Quantized
from compress.numerics.pattern import CHOSEN, Pattern
from compress.numerics.sparsity import keep

NAME = "nm-packed"
VALUES, INDICES, COLUMNS, PATTERN = "nm_values", "nm_indices", "nm_columns", "nm_pattern"

DECLARED = (PATTERN, SHAPE)
"""The tensors that say what the others hold."""
LEAST_V = 16
"""Outputs of a block from which on products without what it never reads are faster: to fetch an input costs as much as some products with it."""


@dataclass(frozen=True)
class Compact:
    """A weight of V:N:M without the inputs that a block of V outputs never reads.

    ``values`` [out / V, V, kept] are in the dtype of the weight, with the zeros that N:M leaves among what is kept. ``columns`` int32 [out / V, kept]
    says where they stand among the ``width`` inputs: four of each whole group, ascending, and those behind the last one.
    """

    values: Tensor
    columns: Tensor
    width: int
    pattern: Pattern


def holds(dtypes: dict[str, str]) -> bool:
    """Whether parts of these dtypes, by name, are a quantised linear in this layout."""
    return dtypes.get(VALUES) == "I32"


def pack(linear: str, weight: Quantized, pattern: Pattern) -> dict[str, Tensor]:
    """The tensors of one linear of integer codes under their names on disk. Raises `ValueError` if it does not keep the pattern."""
    zero = _zero_codes(weight)
    values, tensors = _pack(linear, weight.codes, weight.codes != zero, pattern, weight.bits)
    tensors |= {f"{linear}.{VALUES}": pack_stream(values, weight.bits), f"{linear}.{SCALE}": weight.scale.contiguous()}
    if weight.zero_point is not None:
        tensors[f"{linear}.{ZERO_POINT}"] = pack_zero_points(weight.zero_point, weight.bits)
    return tensors


def unpack(linear: str, tensors: dict[str, Tensor]) -> Quantized:
    """The inverse of `pack`. Raises `InputError` if the tensors contradict each other."""
    scale, zero_point = tensors[f"{linear}.{SCALE}"], tensors.get(f"{linear}.{ZERO_POINT}")
    pattern, (rows, columns), bits = _declared(linear, tensors)
    if not 2 <= bits <= 8 or scale.ndim != 2 or scale.shape[0] != rows or columns % scale.shape[1]:
        raise InputError.one(linear, f"codes of {bits} bits and scale {list(scale.shape)} do not fit a weight of {[rows, columns]}")
    if zero_point is not None:
        zero_point = unpack_zero_points(zero_point, bits, rows)
    width = _kept(columns, pattern)
    packed = tensors[f"{linear}.{VALUES}"]
    _expect(linear, VALUES, packed, (rows, -(-width * bits // 32)))
    empty = Quantized(torch.zeros(rows, columns, dtype=torch.int8), scale, zero_point, Integer(bits, zero_point is None))
    codes = _spread(linear, unpack_stream(packed, bits, width), tensors, _zero_codes(empty))
    return Quantized(codes, scale, zero_point, empty.grid)


def pack_dense(linear: str, weight: Tensor, pattern: Pattern) -> dict[str, Tensor]:
    """The tensors of one linear that is not quantised, [out, in] of any float dtype. Raises `ValueError` if it does not keep the pattern."""
    values, tensors = _pack(linear, weight, weight != 0, pattern, 0)
    return tensors | {f"{linear}.{VALUES}": values + 0}  # minus zero becomes zero


def unpack_dense(linear: str, tensors: dict[str, Tensor]) -> Tensor:
    """The inverse of `pack_dense`. Raises `InputError` if the tensors contradict each other."""
    pattern, (rows, columns), _ = _declared(linear, tensors)
    values = tensors[f"{linear}.{VALUES}"]
    _expect(linear, VALUES, values, (rows, _kept(columns, pattern)))
    return _spread(linear, values, tensors, torch.zeros(rows, columns, dtype=values.dtype))


def _zero_codes(weight: Quantized) -> Tensor:
    """The code of zero of every weight, [out, in]."""
    if weight.zero_point is None:
        return torch.zeros_like(weight.codes)
    return weight.zero_point.repeat_interleave(weight.group_size, 1)


def pays(linear: str, tensors: dict[str, Tensor]) -> bool:
    """Whether products with a `compact` linear are faster than with a dense one. Of ``tensors`` only those `DECLARED` are needed."""
    pattern, _, _ = _declared(linear, tensors)
    return pattern.v is not None and pattern.v >= LEAST_V and pattern.m > CHOSEN


def compact(linear: str, tensors: dict[str, Tensor]) -> Compact:
    """A linear of V:N:M that is not quantised, as products want it. Raises `InputError` if the tensors contradict each other."""
    weight, (pattern, (rows, columns), _) = unpack_dense(linear, tensors), _declared(linear, tensors)
    assert pattern.v is not None
    whole = pattern.pruned_columns(columns)
    groups, blocks = whole // pattern.m, rows // pattern.v
    chosen = _unpack_indices(linear, COLUMNS, tensors, blocks, groups, CHOSEN, pattern.m) + pattern.m * torch.arange(groups)[:, None]
    read = torch.cat([chosen.flatten(1), torch.arange(whole, columns).expand(blocks, -1)], 1)
    values = torch.unflatten(weight, 0, (blocks, pattern.v)).gather(2, read[:, None].expand(-1, pattern.v, -1))
    return Compact(values, read.int(), columns, pattern)


def _pack(linear: str, weight: Tensor, used: Tensor, pattern: Pattern, bits: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The values kept of ``weight`` [out, in], [out, kept], and the tensors that say where; ``used`` bool must be among them."""
    kept = keep(used.float(), pattern)  # of equal scores the first, so zeros fill up in ascending order
    if bool((used & ~kept).any()):
        raise ValueError(f"{linear} does not keep {pattern}")
    rows, columns = weight.shape
    whole = pattern.pruned_columns(columns)
    tensors = {
        f"{linear}.{PATTERN}": torch.tensor([pattern.v or 0, pattern.n, pattern.m, bits], dtype=torch.int32),
        f"{linear}.{SHAPE}": torch.tensor([rows, columns]),
    }
    places = torch.unflatten(kept[:, :whole], 1, (-1, pattern.m))
    width = pattern.m
    if pattern.v is not None:
        block = torch.unflatten(torch.unflatten(used[:, :whole], 1, (-1, pattern.m)), 0, (-1, pattern.v)).sum(1)
        columns_of = _places(keep(block.float().flatten(1), Pattern(CHOSEN, pattern.m)).view(block.shape), CHOSEN)
        tensors[f"{linear}.{COLUMNS}"] = _pack_indices(columns_of, pattern.m)
        places, width = places.gather(2, columns_of.repeat_interleave(pattern.v, 0)), CHOSEN
    tensors[f"{linear}.{INDICES}"] = _pack_indices(_places(places, pattern.n), width)
    return weight[kept].view(rows, _kept(columns, pattern)), tensors


def _places(mask: Tensor, count: int) -> Tensor:
    """Where ``mask`` [rows, groups, m] is true, which is `count` times in every group: int64 [rows, groups, count], ascending."""
    return mask.nonzero()[:, 2].view(*mask.shape[:2], count)


def _spread(linear: str, values: Tensor, tensors: dict[str, Tensor], into: Tensor) -> Tensor:
    """``into`` [out, in] with the ``values`` [out, kept] where they stand."""
    pattern, (rows, columns), _ = _declared(linear, tensors)
    whole = pattern.pruned_columns(columns)
    groups = whole // pattern.m
    width = pattern.m if pattern.v is None else CHOSEN
    places = _unpack_indices(linear, INDICES, tensors, rows, groups, pattern.n, width)
    if pattern.v is not None:
        chosen = _unpack_indices(linear, COLUMNS, tensors, rows // pattern.v, groups, CHOSEN, pattern.m)
        places = chosen.repeat_interleave(pattern.v, 0).gather(2, places)
    places = places + pattern.m * torch.arange(groups)[:, None]
    into = into.scatter(1, places.flatten(1), values[:, : groups * pattern.n])
    into[:, whole:] = values[:, groups * pattern.n :]
    return into


def _declared(linear: str, tensors: dict[str, Tensor]) -> tuple[Pattern, tuple[int, int], int]:
    """Pattern, shape and bits of a linear."""
    try:
        v, n, m, bits = tensors[f"{linear}.{PATTERN}"].tolist()
        pattern = Pattern.parse(f"{v}:{n}:{m}" if v else f"{n}:{m}")
        rows, columns = tensors[f"{linear}.{SHAPE}"].tolist()
    except (ValueError, TypeError) as error:
        raise InputError.one(linear, f"has a pattern or a shape that makes no sense ({error})", "the artifact is damaged; fetch it again") from error
    if pattern.v is not None and rows % pattern.v:
        raise InputError.one(linear, f"has {rows} outputs, which {pattern} does not divide", "the artifact is damaged; fetch it again")
    return pattern, (rows, columns), bits


def _kept(columns: int, pattern: Pattern) -> int:
    """Weights that are stored of so many inputs."""
    whole = pattern.pruned_columns(columns)
    return whole // pattern.m * pattern.n + columns - whole


def _index_bits(width: int) -> int:
    return (width - 1).bit_length()


def _pack_indices(indices: Tensor, width: int) -> Tensor:
    """Numbers below ``width`` int64 [rows, groups, n] as a stream of bits per row."""
    bits = _index_bits(width)
    return pack_stream((indices.flatten(1) - (1 << bits >> 1)).to(torch.int8), bits)


def _unpack_indices(linear: str, part: str, tensors: dict[str, Tensor], rows: int, groups: int, count: int, width: int) -> Tensor:
    """The inverse, [rows, groups, count]. Raises `InputError` where they are not ascending numbers below ``width``."""
    bits, packed = _index_bits(width), tensors[f"{linear}.{part}"]
    _expect(linear, part, packed, (rows, -(-groups * count * bits // 32)))
    indices = (unpack_stream(packed, bits, groups * count).long() + (1 << bits >> 1)).view(rows, groups, count)
    if bool((indices >= width).any()) or bool((indices.diff(dim=2) <= 0).any()):
        raise InputError.one(
            f"{linear}.{part}", f"holds numbers that are not ascending or not below {width}", "the artifact is damaged; fetch it again"
        )
    return indices


def _expect(linear: str, part: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError.one(f"{linear}.{part}", f"has the shape {list(tensor.shape)}, not {list(shape)}", "the artifact is damaged; fetch it again")
