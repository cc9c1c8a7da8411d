"""The experts of a block with packed weights: of each that is hit, the weights are read once for all of its tokens; others are not touched.

``compress::packed_experts`` takes tokens in the order of their experts, so that its shapes depend on no data. Compiled kernels for integers are given
all of them at once; elsewhere those of each expert go to the operator of a single weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.kernels import native, small, t16
from compress.kernels.linear import T16
from compress.kernels.packed import Kept, Packed, refuse
from compress.kernels.residuals import Residuals
from compress.numerics.grid import as_bytes

_library: Any = torch.library.Library("compress", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "packed_experts(Tensor x, Tensor ends, Tensor codes, Tensor scales, Tensor? zeros, Tensor? units, str coding, int rows, int digits) -> Tensor"
)


def _product(
    x: Tensor, ends: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, units: Tensor | None, coding: str, rows: int, digits: int
) -> Tensor:
    outputs = x.new_zeros(len(x), rows)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if start < end:
            given, zero = x[start:end], None if zeros is None else zeros[expert]
            if coding.startswith(T16):
                bits = int(coding.removeprefix(T16))
                product = torch.ops.compress.packed_linear(given, codes[expert], scales[expert], zero, bits, rows, x.shape[1], digits)
            else:
                unit = None if units is None else units[expert]
                if coding in small.CODINGS:
                    product = torch.ops.compress.small_linear(given, codes[expert], scales[expert], unit, coding)
                else:
                    product = torch.ops.compress.unpacked_linear(given, codes[expert], scales[expert], zero, unit, coding)
            outputs[start:end] = product
        start = end
    return outputs


def _fake(
    x: Tensor, ends: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, units: Tensor | None, coding: str, rows: int, digits: int
) -> Tensor:
    return x.new_empty(len(x), rows)


def _on_cpu(
    x: Tensor, ends: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, units: Tensor | None, coding: str, rows: int, digits: int
) -> Tensor:
    tier = native.tier()
    if coding.startswith(T16) and tier != "torch":
        bits = int(coding.removeprefix(T16))
        columns = codes.shape[2] * t16.VECTOR // bits
        step = native.step_of(columns // scales.shape[2], t16.COLUMNS[bits])
        if step is not None:
            given = x.float().contiguous()
            found = native.experts(given, ends, codes, scales, zeros, bits=bits, rows=rows, columns=columns, step=step, digits=digits, tier=tier)
            return found.to(x.dtype)
    return _product(x, ends, codes, scales, zeros, units, coding, rows, digits)


_library.impl("packed_experts", _product, "CUDA")
_library.impl("packed_experts", _on_cpu, "CPU")
torch.library.register_fake("compress::packed_experts", _fake, lib=_library)


class Stack(Kept):
    """The same linear of every expert: the buffers of a `Packed`, [experts, ...]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    units: Tensor | None

    def __init__(self, members: Sequence[Packed], residuals: Residuals | None = None) -> None:
        """Of ``members`` stored alike, with nothing beside their codes but ``residuals`` of all of them."""
        super().__init__()
        first = members[0]
        self.out_features, self.coding, self.digits, self.stored = first.out_features, first.coding, first.digits, first.stored
        self.in_features, self.why_unpacked = first.in_features, first.why_unpacked
        self.residuals = residuals
        for name in ("codes", "scales", "zeros", "units"):
            parts = [getattr(member, name) for member in members]
            self.register_buffer(name, None if parts[0] is None else as_bytes(torch.stack, parts))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]; tokens up to ``ends`` int64 [experts] belong to one expert after the other."""
        refuse(x, self.in_features)
        arguments: tuple[Any, ...] = (x, ends, self.codes, self.scales, self.zeros, self.units, self.coding, self.out_features, self.digits)
        # Where nothing traces, past the dispatcher, as for a single linear.
        direct = type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling()
        outputs: Tensor = _on_cpu(*arguments) if direct else torch.ops.compress.packed_experts(*arguments)
        return outputs if self.residuals is None else outputs + self.residuals(x, ends).to(x.dtype)


class PackedExperts(nn.Module):
    """Stands for the experts of transformers, which hold all weights in two parameters."""

    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(
        self,
        gate_up: Stack,
        down: Stack,
        gate: Callable[[Tensor], Tensor],
        *,
        interleaved: bool = False,
        biases: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        """``gate_up`` gives gates and after them what they are multiplied with, [tokens, 2 x width], of which `gate` makes what ``down`` is given.

        An `interleaved` one wants each gate before what it is multiplied with. ``biases`` [experts, out] are added to what the two stacks give.
        """
        super().__init__()
        self.gate_up, self.down, self.gate, self.interleaved = gate_up, down, gate, interleaved
        for name, bias in zip(("gate_up_bias", "down_bias"), biases, strict=True):
            self.register_buffer(name, bias)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states`` [tokens, hidden]; ``top_k_index`` int64 and ``top_k_weights`` [tokens, k]."""
        tokens, several = top_k_index.shape
        experts, order = top_k_index.flatten().sort(stable=True)
        ends = torch.searchsorted(experts, torch.arange(len(self.down.codes), device=experts.device), right=True)
        both = _biased(self.gate_up(hidden_states[order // several], ends), self.gate_up_bias, experts)
        if self.interleaved:
            both = both.view(len(both), 2, -1).transpose(1, 2).flatten(1)
        outputs = _biased(self.down(self.gate(both), ends), self.down_bias, experts) * top_k_weights.flatten()[order, None]
        return torch.empty_like(outputs).index_copy_(0, order, outputs).view(tokens, several, self.down.out_features).sum(1).to(hidden_states.dtype)


def _biased(outputs: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
    return outputs if bias is None else outputs + bias[experts]
