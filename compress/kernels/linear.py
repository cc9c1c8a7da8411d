"""The product with a packed weight as an operator of torch, and the module that holds one.

``compress::packed_linear`` has one meaning and several implementations: compiled kernels on a CPU, Triton's for a few tokens on a GPU, and
everywhere else unpacking and torch's own product, a block of rows at a time. Fake tensors pass through it, so it can be compiled and exported.

The kernels round inputs, `digits` of 8 bits each, at most 128 of them to one scale: 2 digits, the default, cost about 5e-5 of an output, less than
inputs in bfloat16 do; 1 digit is faster and costs about 7e-3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.kernels import native, t16
from compress.kernels.packed import NOTHING, Extras, Packed, described
from compress.numerics.grid import Integer, Quantized

ROWS_AT_ONCE = 1024
DIGITS = 2
T16 = "t16-"
"""What codings of this layout begin with; the bits follow."""

_library: Any = torch.library.Library("compress", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("packed_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, int bits, int rows, int columns, int digits) -> Tensor")
_library.define("packed_int8_linear(Tensor x, Tensor x_scale, Tensor codes, Tensor scales, Tensor? zeros, int bits, int rows) -> Tensor")


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
    # Every operation of torch counts here: a token of a small model asks for hundreds of products.
    tier, stored = native.tier(), codes.shape[1] * t16.VECTOR // bits
    step = native.step_of(stored // scales.shape[1], t16.COLUMNS[bits])
    if tier == "torch" or step is None:
        return _by_unpacking(x, codes, scales, zeros, bits, rows, columns, digits)
    given = x.reshape(-1, columns).to(torch.float32).contiguous()
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


def _int8_by_unpacking(x: Tensor, x_scale: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, rows: int) -> Tensor:
    return _by_unpacking(x.float() * x_scale.float(), codes, scales, zeros, bits, rows, x.shape[-1], DIGITS)


def _int8_on_cpu(x: Tensor, x_scale: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, rows: int) -> Tensor:
    columns, stored = x.shape[-1], codes.shape[1] * t16.VECTOR // bits
    tier, step = native.tier(), native.step_of(stored // scales.shape[1], t16.COLUMNS[bits])
    given = x.reshape(-1, columns)
    if tier == "torch" or step is None:
        return _int8_by_unpacking(x, x_scale, codes, scales, zeros, bits, rows)
    # A digit reaches from -127 to 127: where -128 occurs, a second one holds what the first lacks.
    few = 2 if bool((given == -128).any()) else 1
    rounded = torch.zeros(len(given), few, stored, dtype=torch.int8)
    rounded[:, 0, :columns] = given.clamp_min(-127)
    if few == 2:
        rounded[:, 1, :columns] = given - rounded[:, 0, :columns]
    scale = x_scale.float().expand(*x.shape[:-1], 1).reshape(-1, 1)
    units = scale[:, None].expand(-1, few, stored // step).contiguous()
    sums = rounded.view(len(given), few, stored // step, step).sum((1, 3)) * scale
    outputs = native.products(rounded, units, sums, codes, scales, zeros, bits=bits, rows=rows, step=step, tier=tier)
    return outputs.view(*x.shape[:-1], rows)


def _int8_fake(x: Tensor, x_scale: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, rows: int) -> Tensor:
    return x_scale.new_empty(*x.shape[:-1], rows, dtype=torch.float32)


_library.impl("packed_int8_linear", _int8_on_cpu, "CPU")
_library.impl("packed_int8_linear", _int8_by_unpacking, "CUDA")
torch.library.register_fake("compress::packed_int8_linear", _int8_fake, lib=_library)


class PackedLinear(Packed):
    """A linear of integers that kernels multiply where they lie.

    ``codes`` uint8 [out / 16, vectors, 16, 4] (`t16`), ``scales`` [out / 16, groups, 16] as stored, ``zeros`` uint8 alike or None.
    """

    def __init__(self, weight: Quantized, extras: Extras = NOTHING, digits: int = DIGITS) -> None:
        """Raises `ValueError` for a weight that `takes` says no to, and for digits other than 1 and 2."""
        super().__init__(weight.codes.shape, described(weight), extras)
        if digits not in (1, 2):
            raise ValueError(f"digits must be 1 or 2, got {digits}")
        if not self.takes(weight):
            raise ValueError(f"there is no kernel for {self.stored}")
        self.bits, self.digits, self.coding = weight.bits, digits, f"{T16}{weight.bits}"
        offset = 1 << (self.bits - 1)
        self.register_buffer("codes", t16.pack(weight.codes.contiguous().view(torch.uint8) + offset, self.bits))
        self.register_buffer("scales", t16.by_block(weight.scale))
        zeros = None if weight.zero_point is None else t16.by_block(weight.zero_point.contiguous().view(torch.uint8) + offset)
        self.register_buffer("zeros", zeros)
        self.register_buffer("units", None)

    @staticmethod
    def takes(weight: Quantized) -> bool:
        """Whether kernels read it: a width of the layout, groups that are whole units of it, or one the whole row, and scales of 2 or 4 bytes."""
        grid, group = weight.grid, weight.group_size
        if not isinstance(grid, Integer) or grid.bits not in t16.COLUMNS or weight.scale.dtype not in native.FLOATS:
            return False
        return group == weight.codes.shape[1] or group % t16.COLUMNS[grid.bits] == 0

    def product(self, x: Tensor) -> Tensor:
        if self.inputs is not None and self.inputs.kind == "int8" and self.inputs.group_size is None:
            given, scale = self.inputs.codes(x)
            outputs: Tensor = torch.ops.compress.packed_int8_linear(
                given, scale, self.codes, self.scales, self.zeros, self.bits, self.out_features
            ).to(x.dtype)
            return outputs
        given = x if self.inputs is None else self.inputs.round(x)
        arguments: tuple[Any, ...] = (given, self.codes, self.scales, self.zeros, self.bits, self.out_features, self.in_features, self.digits)
        # Where nothing traces, past the dispatcher: it takes longer than a small product.
        if type(given) is Tensor and given.is_cpu and not torch.compiler.is_compiling():
            return _on_cpu(*arguments)
        outputs = torch.ops.compress.packed_linear(*arguments)
        return outputs

    @staticmethod
    def why_unpacked(stored: str, device: torch.device) -> str | None:
        from compress.kernels import gpu

        if device.type == "cpu":
            return native.missing_why()
        return gpu.missing() if device.type == "cuda" else f"no kernel for {device.type}"
