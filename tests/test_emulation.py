"""Products as llama.cpp computes them: inputs number by number as the oracle, a whole model beside transformers, and what follows another program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from oracles import gguf_inputs as oracle
from safetensors.torch import load_file, save_file
from test_exporting import exported, plain
from test_run import compress
from torch import Tensor
from torch.nn import functional

from compress.checkpoint import Checkpoint
from compress.emulation import SAME, Emulated, Part
from compress.engines.base import find
from compress.errors import InputError
from compress.export import gguf
from compress.formats import gguf_blocks
from compress.formats.gguf_blocks import TYPES, fields
from compress.formats.gguf_inputs import INPUTS, rounded, sums_off
from compress.layout import Layout
from compress.model import Model
from compress.serving import meant

KINDS = sorted({*INPUTS.values()})


def rows_of(count: int) -> Tensor:
    """Inputs [count, 512]: of all sizes, some blocks nought, some numbers halfway between two integers."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, 512, generator=generator) * torch.logspace(-6, 3, count)[:, None]
    rows[0, 32:64] = 0
    rows[1, :256] = 0
    rows[2] = torch.randint(-254, 255, (512,), generator=generator) / 2
    rows[2, ::32] = torch.tensor([127.0, -127.0] * 8)
    return rows


def by_oracle(rows: Tensor, kind: str) -> Tensor:
    return torch.tensor(np.array([oracle.rounded(row, kind) for row in rows.numpy()]))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_rounded_to_the_bit_as_ggml_rounds_them(kind: str) -> None:
    rows = rows_of(60)
    assert torch.equal(rounded(rows, kind), by_oracle(rows, kind))


def test_sums_are_those_that_are_stored() -> None:
    rows = rows_of(60)
    for row, found in zip(rows.numpy(), sums_off(rows), strict=True):
        blocks = [oracle.block_of_32(row[start : start + 32]) for start in range(0, len(row), 32)]
        assert found.tolist() == [float(np.float32(whole - np.float32(scale * np.float32(sum(codes))))) for codes, _, scale, whole in blocks]


def test_every_type_that_is_written_has_a_type_of_inputs() -> None:
    assert {*gguf_blocks.BYTES, "F32", "F16", "BF16"} == INPUTS.keys()


# A model -------------------------------------------------------------------------------------------------------------------------


def rounded_scales(folder: Path) -> None:
    """Leave five bits of each scale of an artifact, so that float16 holds every minimum and types with one are chosen."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        fraction, exponent = tensors[name].float().frexp()
        tensors[name] = torch.ldexp((32 * fraction).round(), exponent - 5).to(tensors[name].dtype)
    save_file(tensors, file, {"format": "pt"})
    (folder / "manifest.json").unlink()  # which tells of the file as it was


class ByOracle:
    """While entered, products with linears of a model of transformers have inputs rounded number by number; those with Q4_1 are the oracle's own."""

    def __init__(self, model: Any, artifact: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = Model(Layout(Checkpoint(artifact)))
        self.kinds, self.summed = {}, {}
        plain_product = functional.linear
        experts = source.layout.of_experts
        for owner, (_, kind) in gguf.types(source, file).items():
            if owner == "model.embed_tokens" or INPUTS[kind] == "F32":
                continue
            place = self.place_of(model, owner) if owner in experts else model.get_submodule(owner).weight
            weight = source.quantized(owner)
            if weight is not None:
                place.data.copy_(weight.dequantize(torch.float32))
            self.kinds[place.data_ptr()] = INPUTS[kind]
            if INPUTS[kind] == "Q8_1":
                assert weight is not None
                self.summed[place.data_ptr()] = fields(weight, TYPES[kind])

        def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            kind, rows = self.kinds.get(weight.data_ptr(), "F32"), inputs.flatten(0, -2)
            if weight.data_ptr() in self.summed:
                found = self.summed[weight.data_ptr()]
                assert found.e is not None
                parts = [(q.tolist(), d.tolist(), (-e).tolist()) for q, d, e in zip(found.q, found.d, found.e, strict=True)]
                outputs = torch.tensor([[oracle.product(*part, row) for part in parts] for row in rows.numpy()])
                return outputs.view(*inputs.shape[:-1], -1) + (0 if bias is None else bias)
            return plain_product(by_oracle(rows, kind).view_as(inputs), weight, bias)

        monkeypatch.setattr(functional, "linear", linear)

    @staticmethod
    def place_of(model: Any, expert: str) -> Tensor:
        """Where transformers has the weight of an expert; a gate stands for what is below it, too."""
        path, _, rest = expert.partition(".experts.")
        number, role = rest.split(".")[:2]
        both = model.get_submodule(f"{path}.experts").gate_up_proj[int(number)]
        if role == "down_proj":
            return model.get_submodule(f"{path}.experts").down_proj[int(number)]
        return both[: len(both) // 2] if role == "gate_proj" else both[len(both) // 2 :]


@pytest.fixture(scope="module")
def made(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """The folder of an artifact and its file."""

    def make(kind: str, options: dict[str, Any] | None, *, few: bool = False, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
        out = tmp_path_factory.mktemp("emulation") / "out"
        if options is None:
            out.mkdir()
            gguf.write(Model(Layout(Checkpoint(checkpoint(kind, dtype)))), {}, None, out)
            return checkpoint(kind, dtype), out / gguf.FILE
        compress(plain({"rtn": options}), checkpoint(kind, dtype), out)
        if few:
            rounded_scales(out)
        return out, Path(exported(out, "gguf")["gguf"]["folder"]) / gguf.FILE

    return make


MODELS: dict[str, tuple[str, dict[str, Any] | None, bool, set[str]]] = {
    "4 bits, a head of its own": ("llama", {"group_size": 32}, False, {"Q4_0", "BF16"}),
    "4 bits, the embedding for a head": ("llama-tied", {"group_size": 32}, False, {"Q4_0", "BF16"}),
    "sums": ("llama-bias", {"group_size": 32, "symmetric": False}, True, {"Q4_1", "BF16"}),
    "experts": ("qwen3_moe", {"group_size": 32}, False, {"Q4_0", "BF16"}),
    "experts as they were": ("qwen3_moe", None, False, {"BF16"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_transformers_does_of_such_inputs(
    name: str, made: Callable[..., tuple[Path, Path]], checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, options, few, types = MODELS[name]
    folder, file = made(kind, options, few=few)
    assert types == {each for _, each in gguf.types(Model(Layout(Checkpoint(folder))), file).values()} - {"F32"}
    ids = torch.randint(4, tiny.VOCABULARY, (1, 7))
    found = meant(folder, file.parent, find("llama.cpp"))(ids).logits
    reference = tiny.plain(checkpoint(kind, torch.bfloat16)).float()
    reference.config._experts_implementation = "eager"
    ByOracle(reference, folder, file, monkeypatch)
    with torch.no_grad():
        expected = reference(ids).logits
    monkeypatch.undo()
    with torch.no_grad():
        unrounded = reference(ids).logits
    away = float((unrounded - expected).abs().max())
    assert float((found - expected).abs().max()) < 0.02 * away


def test_float32_is_not_rounded(made: Callable[..., tuple[Path, Path]]) -> None:
    folder, file = made("llama", None, dtype=torch.float32)
    ids = torch.randint(4, tiny.VOCABULARY, (1, 7))
    with torch.no_grad():
        assert torch.equal(meant(folder, file.parent, find("llama.cpp"))(ids).logits, tiny.plain(folder)(ids).logits)


def test_a_type_that_we_do_not_write_is_refused(made: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, file = made("llama", {"group_size": 32})
    monkeypatch.delitem(INPUTS, "Q4_0")
    with pytest.raises(InputError, match="holds tensors of the types Q4_0; compare a file that compress export wrote"):
        Emulated(folder, file)


class Other(Emulated):
    """Another program: what it is given before each product is a little off, and all of it is kept."""

    noise = 0.0

    def _followed(self, own: Tensor, part: Part) -> Tensor:
        blocks = own.unflatten(-1, (-1, 32))
        # Of the numbers themselves: several experts read the same row, which is off by the same everywhere.
        found = own + self.noise * (blocks * 1e6).sin().mul(blocks.abs().amax(-1, keepdim=True)).flatten(-2)
        self.kept[part.name] = found.flatten(0, -2)[torch.randperm(own[..., 0].numel())]
        return found

    def __call__(self, ids: Tensor, seen: Any = None) -> Any:
        self.kept: dict[str, Tensor] = {}
        return super().__call__(ids)


@pytest.mark.parametrize("name", MODELS)
def test_another_program_is_followed_where_only_sums_differ(name: str, made: Callable[..., tuple[Path, Path]]) -> None:
    """Noise of some ten-thousandths of a step makes other steps, and so another text; told of them, what is meant is the other's logits."""
    kind, options, few, _ = MODELS[name]
    folder, file = made(kind, options, few=few)
    ours, other = Emulated(folder, file), Other(folder, file)
    other.noise = SAME / 256
    ids = torch.randint(4, tiny.VOCABULARY, (1, 60))
    theirs = other(ids).logits
    alone, following = ours(ids).logits, ours(ids, other.kept).logits
    counts = ours.counted()
    # A block of next to nothing is further off, for its size.
    assert counts["strayed"] < 0.01 * counts["blocks"] and 0 < counts["moved"] < 0.01 * counts["numbers"] and 0 < counts["largest"] <= SAME
    assert float((following - theirs).norm()) < 0.05 * float((alone - theirs).norm())
    assert ours.counted()["blocks"] == 0


def test_another_weight_is_not_followed(made: Callable[..., tuple[Path, Path]]) -> None:
    folder, file = made("qwen3_moe", {"group_size": 32})
    ours, other = Emulated(folder, file), Other(folder, file)
    down: Any = other.model.get_submodule("model.layers.0.mlp.experts.down")
    down.scales.mul_(1.01)
    ids = torch.randint(4, tiny.VOCABULARY, (1, 60))
    theirs = other(ids).logits
    following = ours(ids, other.kept).logits
    assert ours.counted()["strayed"] > 0 and float((following - theirs).abs().max()) > 0.01 * float(theirs.abs().max())
