"""Scale moved along an edge changes nothing the model computes, for every edge of every architecture and whatever the scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.checkpoint import INDEX, Checkpoint
from compress.folding import Folding, open_edge
from compress.layout import Edge, Layout
from compress.model import Model

KINDS = tuple(kind for kind in tiny.KINDS if kind != "qwen2-sliding")


def fold_all(tensors: dict[str, Tensor], layout: Layout, wanted: Callable[[Edge], Edge] = lambda edge: edge) -> int:
    """Fold random scales from 1/16 to 16 into every edge, in place; how many there are."""
    generator = torch.Generator().manual_seed(3)
    edges = [wanted(edge) for block in layout.blocks for edge in block.edges]
    for edge in edges:
        folding = Folding(edge, tensors, {name: tensor.dtype for name, tensor in tensors.items()}, head_dim=16)
        scale = torch.exp2(8 * torch.rand(folding.channels, generator=generator, dtype=torch.float64) - 4)
        tensors |= folding.folded(folding.exact(scale))
    return len(edges)


@torch.no_grad()
def difference(folder: Path, tmp_path: Path, wanted: Callable[[Edge], Edge] = lambda edge: edge) -> float:
    """How far the logits of a float64 model move, of the largest, when every edge is folded."""
    batches = [batch.inputs for batch in tiny.samples(image="llava" in folder.name).batches()]
    batches = [{name: value.double() if value.is_floating_point() else value for name, value in batch.items()} for batch in batches]
    before = [tiny.plain(folder, torch.float64)(**batch).logits for batch in batches]
    tensors = tiny.weights(folder)
    assert fold_all(tensors, Layout(Checkpoint(folder)), wanted) >= 6
    for path in folder.iterdir():
        if path.suffix == ".json" and path.name != INDEX:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tiny.write(tensors, tmp_path)
    after = [tiny.plain(tmp_path, torch.float64)(**batch).logits for batch in batches]
    return max(float((one - other).abs().max() / one.abs().max()) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_any_scale_on_every_edge_leaves_the_logits(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    assert difference(checkpoint(kind, torch.float64), tmp_path) < (1e-6 if kind in tiny.ROUTED else 1e-12)


@pytest.mark.parametrize("forgotten", ["mlp.gate", "block_sparse_moe.gate", "self_attn.k_proj"])
def test_a_reader_that_is_forgotten_shows(forgotten: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("mixtral" if forgotten.startswith("block_sparse") else "qwen3_moe", torch.float64)

    def without(edge: Edge) -> Edge:
        return replace(edge, consumers=tuple(name for name in edge.consumers if not name.endswith(forgotten)))

    assert difference(folder, tmp_path, without) > 1e-3


def attention(values: int, heads: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> Folding:
    """An edge from v to o of ``values`` heads of 4 channels read by ``heads``."""
    tensors = {"v.weight": torch.randn(values * 4, 8), "o.weight": torch.randn(8, heads * 4)}
    if bias:
        tensors["v.bias"] = torch.randn(values * 4).to(dtype).float()
    return Folding(Edge("v to o", "o", "v", ("o",)), tensors, dict.fromkeys(tensors, dtype), 4)


def norm(weight: Tensor, dtype: torch.dtype) -> Folding:
    tensors = {"norm.weight": weight.to(dtype).float(), "q.weight": torch.randn(5, len(weight)).to(dtype).float()}
    return Folding(Edge("q", "q", "norm", ("q",)), tensors, dict.fromkeys(tensors, dtype), 4)


@pytest.mark.parametrize(("values", "heads"), [(1, 1), (2, 2), (1, 6), (2, 6)])
def test_each_column_gets_the_scale_of_the_head_its_query_head_reads(values: int, heads: int) -> None:
    folding = attention(values, heads)
    scale = torch.rand(values * 4) + 0.5
    expected = [float(scale[(head // (heads // values)) * 4 + channel]) for head in range(heads) for channel in range(4)]
    assert folding.spread(scale).tolist() == expected
    assert all(torch.equal(each, scale) for each in folding.heads(folding.spread(scale)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 1000), spread=st.floats(0, 8))
def test_what_is_rounded_in_the_producer_is_made_good_in_the_readers(dtype: torch.dtype, seed: int, spread: float) -> None:
    torch.manual_seed(seed)
    for folding, vector in ((norm(torch.randn(16), dtype), "norm.weight"), (attention(2, 4, dtype, bias=True), "v.bias")):
        factor = folding.exact((torch.randn(folding.channels) * spread).exp2())
        folded = folding.folded(factor)
        assert torch.equal(folded[vector], folded[vector].to(dtype).float())
        assert torch.allclose(folded[vector] * factor, folding._tensors[vector], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), 1e30, 1e-30, 1e38, 1e-38])
def test_no_scale_breaks_a_weight(dtype: torch.dtype, scale: float) -> None:
    for folding in (norm(torch.tensor([1.0, -0.5, 0.0, 2.0]), dtype), attention(1, 2, dtype), attention(1, 2, dtype, bias=True)):
        factor = folding.exact(torch.full((folding.channels,), scale))
        folded = folding.folded(factor)
        assert (factor > 0).all() and all(tensor.to(dtype).isfinite().all() for tensor in folded.values())
        for name, before in folding._tensors.items():
            assert torch.equal(before == 0, folded[name] == 0), name


def test_a_weight_of_zero_stays_zero_and_its_channel_takes_any_scale() -> None:
    folding = norm(torch.tensor([0.0, 1.0]), torch.bfloat16)
    factor = folding.exact(torch.tensor([3.0, 3.0]))
    assert float(factor[0]) == 3.0 and float(folding.folded(factor)["norm.weight"][0]) == 0.0


def test_a_scale_of_one_changes_nothing() -> None:
    folding = attention(2, 4, torch.bfloat16, bias=True)
    factor = folding.exact(torch.ones(folding.channels))
    assert all(torch.equal(folded, folding._tensors[name]) for name, folded in folding.folded(factor).items())


def test_an_edge_is_opened_with_the_changes_made_so_far(checkpoint: Callable[..., Path]) -> None:
    model = Model(Layout(Checkpoint(checkpoint("llama-bias"))))
    with model.block(1) as block:
        edge = next(edge for edge in block.layout.edges if edge.kind == "o")
        before = open_edge(block, edge)
        for name, value in before.folded(torch.full((before.channels,), 2.0)).items():
            block.set_dense(name, value)
        after = open_edge(block, edge)
        assert set(after._tensors) == {f"model.layers.1.self_attn.{name}" for name in ("v_proj.weight", "v_proj.bias", "o_proj.weight")}
        for name, tensor in before._tensors.items():
            assert torch.equal(after._tensors[name], tensor * 2 if "o_proj" in name else tensor / 2)
