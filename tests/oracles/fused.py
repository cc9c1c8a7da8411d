"""The tensors of gpt-oss expert by expert, and put together again, one at a time. A checkpoint without such tensors stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor

PREFIX = ".mlp.experts."


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Linears of each expert, [out, in], and their biases, in place of those of all."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        start, _, rest = name.partition(PREFIX)
        if rest not in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
            found[name] = tensor
            continue
        part = "bias" if rest.endswith("bias") else "weight"
        for expert, own in enumerate(tensor):
            columns = own.T if own.ndim == 2 else own  # an output each
            linears = {"down_proj": columns} if "down" in rest else {"gate_proj": columns[0::2], "up_proj": columns[1::2]}
            found |= {f"{start}{PREFIX}{expert}.{linear}.{part}": value.contiguous() for linear, value in linears.items()}
    return found


def together(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `apart` took apart."""
    found: dict[str, dict[int, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        start, _, rest = name.partition(PREFIX)
        number, _, local = rest.partition(".")
        suffix = "_bias" if local.endswith("bias") else ""
        if not number.isdigit():
            whole[name] = tensor
        elif local.startswith("down"):
            found.setdefault(f"{start}{PREFIX}down_proj{suffix}", {})[int(number)] = tensor.T if tensor.ndim == 2 else tensor
        elif local.startswith("gate"):
            up = tensors[name.replace("gate_proj", "up_proj")]
            both = torch.empty(2 * len(up), *up.shape[1:], dtype=up.dtype)
            both[0::2], both[1::2] = tensor, up
            found.setdefault(f"{start}{PREFIX}gate_up_proj{suffix}", {})[int(number)] = both.T if both.ndim == 2 else both
    return whole | {name: torch.stack([experts[number] for number in range(len(experts))]) for name, experts in found.items()}
