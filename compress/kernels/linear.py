"""The product with a packed weight as an operator of torch, and the module that holds one.

``compress::packed_linear`` has one meaning and several implementations: for a few tokens compiled kernels on a CPU and Triton's on a GPU, and
for many, unpacking and torch's own product, a block of rows at a time. Fake tensors pass through it, so it can be compiled and exported.

For a few tokens inputs are rounded, `digits` of 8 bits each, at most 128 of them to one scale: 2 digits, the default, cost about 5e-5 of
an output, less than inputs in bfloat16 do; 1 digit is faster and costs about 7e-3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.kernels import native, t16
from compress.numerics.grid import Integer, Quantized

FEW = 32
"""Tokens from which on unpacking a weight costs less than multiplying it once more."""
ROWS_AT_ONCE = 1024
DIGITS = 2

_library: Any = torch.library.Library("compress", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("packed_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, int bits, int rows, int columns, int digits) -> Tensor")


def unpacked(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, rows: int, columns: int) -> Tensor:
    """The weight [out, in] float32 of blocks of rows."""
    plain = t16.unpack(codes, bits, codes.shape[0] * t16.ROWS, codes[0].numel() * 8 // bits // t16.ROWS).float()
    groups = plain.view(plain.shape[0], scales.shape[1], -1)
    middle = 2.0 ** (bits - 1) if zeros is None else zeros.transpose(1, 2).flatten(0, 1).float()[..., None]
    weight: Tensor = (groups - middle) * scales.transpose(1, 2).flatten(0, 1).float()[..., None]
    return weight.flatten(1)[:rows, :columns]


def _by_unpacking(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, rows: int, columns: int, digits: int) -> Tensor:
    given, blocks = x.reshape(-1, columns).float(), ROWS_AT_ONCE // t16.ROWS
    parts = []
    for start in range(0, codes.shape[0], blocks):
        part = slice(start, start + blocks)
        left = min(ROWS_AT_ONCE, rows - start * t16.ROWS)
        weight = unpacked(codes[part], scales[part], None if zeros is None else zeros[part], bits, left, columns)
        parts.append(given @ weight.T)
    return torch.cat(parts, 1).to(x.dtype).view(*x.shape[:-1], rows)


def _on_cpu(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, rows: int, columns: int, digits: int) -> Tensor:
    tier, tokens = native.tier(), x.numel() // columns
    stored = codes[0].numel() * 8 // bits // t16.ROWS
    step = native.step_of(stored // scales.shape[1], t16.COLUMNS[bits])
    if tier == "torch" or tokens > FEW or step is None or tokens == 0:
        return _by_unpacking(x, codes, scales, zeros, bits, rows, columns, digits)
    given = x.reshape(-1, columns).float().contiguous()
    outputs = native.multiply(given, codes, scales, zeros, bits=bits, rows=rows, columns=stored, step=step, digits=digits, tier=tier)
    return outputs.to(x.dtype).view(*x.shape[:-1], rows)


def _on_gpu(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, rows: int, columns: int, digits: int) -> Tensor:
    from compress.kernels import gpu

    refusal = gpu.refusal(bits, codes[0].numel() * 8 // bits // t16.ROWS // scales.shape[1])
    if refusal:
        gpu.say_once(refusal)
    if refusal or not 0 < x.numel() // columns <= gpu.MANY:
        return _by_unpacking(x, codes, scales, zeros, bits, rows, columns, digits)
    given, device = x.reshape(-1, columns).contiguous(), gpu.device_of(x.device.index)
    outputs = gpu.multiply(given, codes, scales, zeros, bits=bits, rows=rows, digits=digits, device=device)
    return outputs.view(*x.shape[:-1], rows)


def _fake(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, rows: int, columns: int, digits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


_library.impl("packed_linear", _on_cpu, "CPU")
_library.impl("packed_linear", _on_gpu, "CUDA")
torch.library.register_fake("compress::packed_linear", _fake, lib=_library)


class PackedLinear(nn.Module):
    """A linear whose weight stays packed in memory.

    ``codes`` uint8 [out / 16, vectors, 16, 4] (`t16`), ``scales`` [out / 16, groups, 16] as stored, ``zeros`` uint8 alike or None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Quantized, bias: Tensor | None = None, digits: int = DIGITS, *, name: str = "weight") -> None:
        """``weight`` goes by `name` in errors. Raises `InputError` if no kernel takes its grid, `ValueError` for digits other than 1 and 2."""
        super().__init__()
        if digits not in (1, 2):
            raise ValueError(f"digits must be 1 or 2, got {digits}")
        grid, group = weight.grid, weight.group_size
        # Groups must be whole units of the layout, or one group the whole row.
        if not isinstance(grid, Integer) or grid.bits not in t16.COLUMNS or (group < weight.codes.shape[1] and group % t16.COLUMNS[grid.bits]):
            raise InputError.one(name, f"is stored as {grid} in groups of {group}, for which there is no kernel", "open it with transformers")
        self.bits, self.digits = grid.bits, digits
        self.out_features, self.in_features = weight.codes.shape
        offset = 1 << (grid.bits - 1)
        self.register_buffer("codes", t16.pack((weight.codes.to(torch.int16) + offset).to(torch.uint8), grid.bits))
        self.register_buffer("scales", t16.by_block(weight.scale))
        zeros = None if weight.zero_point is None else t16.by_block((weight.zero_point.to(torch.int16) + offset).to(torch.uint8))
        self.register_buffer("zeros", zeros)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the dtype of ``x``."""
        outputs: Tensor = torch.ops.compress.packed_linear(
            x, self.codes, self.scales, self.zeros, self.bits, self.out_features, self.in_features, self.digits
        )
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, digits={self.digits}"
