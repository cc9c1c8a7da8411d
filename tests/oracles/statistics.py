"""What a calibration walk measures, taken from a plain transformers model by hooks and summed by loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def second_moment(rows: list[Tensor]) -> Tensor:
    """Mean of ``x x^T`` over tokens, one token at a time, float64."""
    size = rows[0].shape[-1]
    total = torch.zeros(size, size, dtype=torch.float64)
    count = 0
    for tokens in rows:
        for token in tokens.reshape(-1, size).double():
            total += torch.outer(token, token)
            count += 1
    return total / max(1, count)


@torch.no_grad()
def inputs_of_linears(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Everything each `nn.Linear` of a model is given, by module name."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(
                module.register_forward_pre_hook(lambda _, arguments, name=name: seen.setdefault(name, []).append(arguments[0].detach().clone()))
            )
    for batch in batches:
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def residual_streams(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """What the output of attention and of the MLP is added to, by the name of the linear that ends them, for Llama and its kin."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        for norm, linear in ((layer.input_layernorm, "self_attn.o_proj"), (layer.post_attention_layernorm, "mlp.down_proj")):
            name = f"model.layers.{index}.{linear}"
            handles.append(norm.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, []).append(given[0].clone())))
    for batch in batches:
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def cross_moment(one: list[Tensor], other: list[Tensor], inputs: list[Tensor]) -> Tensor:
    """Sum of ``(one - other) inputs^T`` over tokens, float64."""
    pairs = zip(one, other, inputs, strict=True)
    return sum((x - y).double().reshape(-1, x.shape[-1]).T @ z.double().reshape(-1, z.shape[-1]) for x, y, z in pairs)  # type: ignore[return-value]


@torch.no_grad()
def inputs_of_experts(model: Any, module: str, batches: list[dict[str, Tensor]]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """What each expert's gate and up are given, and what its down is given, token by token, for the experts in `module`."""
    experts = model.get_submodule(module)
    calls: list[tuple[Tensor, Tensor]] = []
    handle = experts.register_forward_pre_hook(lambda _, arguments: calls.append((arguments[0].clone(), arguments[1].clone())))
    for batch in batches:
        model(**batch, use_cache=False)
    handle.remove()
    count, across, biased = experts.gate_up_proj.shape[0], experts.is_transposed, experts.has_bias
    first: list[list[Tensor]] = [[] for _ in range(count)]
    second: list[list[Tensor]] = [[] for _ in range(count)]
    for hidden, chosen in calls:
        for token, numbers in zip(hidden, chosen.tolist(), strict=True):
            for expert in numbers:
                weight = experts.gate_up_proj[expert]
                both = (weight.T if across else weight) @ token + (experts.gate_up_proj_bias[expert] if biased else 0)
                first[expert].append(token)
                second[expert].append(experts._apply_gate(both))
    return first, second
