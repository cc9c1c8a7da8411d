"""Kernels for GPUs: right in Triton's interpreter, lean in the machine code of GPUs that are not here, and never imported without need."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import TOLERANCE, WIDTHS, exact, magnitude, quantized

from compress.kernels import gpu, latents, linear, t16
from compress.kernels.linear import PackedLinear
from compress.latents import Held, Latents
from compress.numerics.blocks import BLOCK

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton: pip install 'compress[gpu]'")
MOST = {(4, 1): 1.3, (3, 1): 1.3, (2, 1): 1.05, (8, 1): 1.5, (4, 2): 1.75, (3, 2): 1.8, (2, 2): 1.4, (8, 2): 2.0}
"""Instructions per weight by bits and digits of one token: half of what an H200 can issue while it reads one, and less."""


@needs_triton
@pytest.mark.parametrize("what", ["triton", "latents"])
def test_kernels_in_the_interpreter(what: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / f"{what}_interpreted.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_triton_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, torch; from compress.kernels import linear, gpu; from compress.kernels.linear import PackedLinear\n"
        "from compress.numerics.grid import Integer, Quantized\n"
        "PackedLinear(Quantized(torch.ones(16, 32, dtype=torch.int8), torch.ones(16, 1), None, Integer(4, True)))(torch.ones(1, 32))\n"
        "print([name for name in sys.modules if name.startswith(('triton', 'compress.kernels.triton'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


@given(
    bits=st.sampled_from(WIDTHS),
    blocks=st.integers(1, 1100),
    units=st.integers(1, 8),
    steps=st.integers(1, 130),
    tokens=st.integers(1, 64),
    digits=st.sampled_from([1, 2]),
    device=st.sampled_from([gpu.Device("cuda", 32, 132), gpu.Device("hip", 64, 304), gpu.Device("any", 32, 20)]),
)
def test_tiles_are_ones_that_kernels_take(bits: int, blocks: int, units: int, steps: int, tokens: int, digits: int, device: gpu.Device) -> None:
    step = units * t16.COLUMNS[bits]
    cut = gpu.tile(device, bits, blocks, steps, step, tokens, digits)
    assert cut == gpu.tile.__wrapped__(device, bits, blocks, steps, step, tokens, digits)
    if cut.dots:
        assert cut.inputs >= tokens and cut.inputs.bit_count() == 1 and gpu.units_at_once(bits, step) * t16.COLUMNS[bits] >= 32
        assert units % gpu.units_at_once(bits, step) == 0 and cut.inputs >= (16 if device.target == "hip" else 8)
    else:
        assert cut.inputs <= tokens and cut.inputs * digits <= gpu.VECTORS and cut.blocks == 1
        assert units % gpu.lanes(bits, step) == 0


def test_what_is_not_covered_is_unpacked_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = quantized(20, 64, 32, 4, True), torch.randn(2, 64)
    module = PackedLinear(weight)
    monkeypatch.setattr(gpu, "missing", lambda: "triton is not installed")
    gpu.say_once.cache_clear()
    arguments: Any = (x, module.codes, module.scales, module.zeros, 4, 20, 64, 2)
    with pytest.warns(UserWarning, match="packed weights are unpacked for every product on this GPU: triton is not installed") as said:
        outputs = [linear._on_gpu(*arguments) for _ in range(2)]
    assert len(said) == 1 and outputs[0].equal(outputs[1]) and (outputs[0].double() - exact(x, weight)).norm() / magnitude(x, weight) < 1e-6


def test_groups_without_a_step_are_named() -> None:
    assert gpu.refusal(3, 200) == "no number of up to 128 inputs is a part of a group of 200 and whole units of 32"


@pytest.fixture
def sass(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return __import__("sass")


@needs_triton
@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_machine_code_is_lean(bits: int, digits: int, sass: Any) -> None:
    code = sass.product("sm_90", bits, digits, 1)
    assert code.per_weight <= MOST[bits, digits] and code.loads == 128 and code.spills == 0
    # What a thread loads at once is on its way before it waits for any of it.
    assert code.ahead == {2: 4, 3: 12, 4: 8}[bits]


@needs_triton
@pytest.mark.parametrize(("name", "bits"), [("sm_80", 3), ("gfx942", 4)])
def test_it_is_on_other_gpus(name: str, bits: int, sass: Any) -> None:
    code = sass.product(name, bits, 2, 1, symmetric=False)
    assert code.per_weight <= 2.2 and code.loads == 128 and code.spills == 0


@needs_triton
def test_many_tokens_meet_tensor_cores(sass: Any) -> None:
    code = sass.product("sm_90", 4, 2, 8)
    assert code.per_weight <= 2 and code.loads == 128 and code.spills == 0 and {"IMMA", "IGMMA"} & code.body.keys()


@needs_triton
@pytest.mark.parametrize(("groups", "width", "bits"), [(1, 200, 16), (8, 128, 4)])
def test_steps_behind_latents_compile_without_spills(groups: int, width: int, bits: int, sass: Any) -> None:
    for spills, shared in sass.attending("sm_90", groups, width, bits).values():
        assert spills == 0 and shared <= latents.ROOM


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_for_latents_compiles(name: str, sass: Any) -> None:
    """Also with masks of both kinds and numbers of four bytes, where a few spills are taken."""
    for arguments in ((1, 1024, 16), (1, 512, 16, sass.tl.float32, torch.float32), (8, 128, 4, sass.tl.float16, torch.uint8), (1, 200, 2)):
        for spills, shared in sass.attending(name, *arguments).values():
            assert spills <= 64 and shared <= latents.ROOM


@given(
    processors=st.integers(1, 300), rows=st.integers(1, 64), groups=st.integers(1, 16), heads=st.integers(1, 40), tokens=st.integers(1, 1 << 20),
    keys=st.integers(1, 1600), values=st.integers(1, 1600), number=st.sampled_from([2, 4]),
)  # fmt: skip
def test_contexts_are_cut_as_kernels_take_them(
    processors: int, rows: int, groups: int, heads: int, tokens: int, keys: int, values: int, number: int
) -> None:
    """All that is not refused: tiles of whole blocks or within one, that fit; never fewer tiles to a part than parts are worth."""
    if latents.refusal(keys, values, 16, number) is not None:
        assert 16 * (keys + values) * number > latents.ROOM // 4
        return
    found = latents.cut(gpu.Device("cuda", 32, processors), rows, groups, heads, tokens, keys, values, number)
    assert BLOCK % found.tokens == 0 and found.tokens >= 16 and found.parts >= 1
    assert found.tokens * found.ahead * (keys + values) * number <= latents.ROOM
    assert found.parts == 1 or found.parts * latents.LEAST * found.tokens < tokens + found.tokens
    assert found.parts <= max(1, latents.PER_PROCESSOR * processors)


def test_what_no_kernel_attends_to_is_named() -> None:
    down, up = torch.randn(6, 12), torch.randn(12, 6)
    there, dtype = torch.device("cuda"), torch.float32
    joint, commuting, plain = (
        Latents(pair, pair, 0, 2, commuting=commutes) for pair, commutes in (((down, up), False), ((down, up), True), (None, True))
    )
    assert joint.why_torch(6, there, dtype) == "old keys have to be restored"
    assert plain.why_torch(6, there, dtype) == "heads of 6 channels in 2 bits end within a byte"
    assert commuting.why_torch(6, torch.device("cpu"), dtype) == "no kernel for latents on a cpu"
    assert latents.refusal(4000, 8, 16, 2) == "4000 and 8 channels of a token are more than a GPU's processor holds"


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_compiles_without_spills(name: str, bits: int, digits: int, sass: Any) -> None:
    assert sass.rounding(name, digits)
    for tokens in sass.TOKENS:
        for symmetric in (True, False):
            code = sass.product(name, bits, digits, tokens, symmetric)
            assert code.spills == 0 and code.loads == 128
            assert name == "gfx942" or tokens > 1 or code.per_weight <= MOST[bits, digits]


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_products_on_a_gpu(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    for shape in ((16, 128, 128), (37, 384, 96), (1, 688, 688), (1000, 4096, 128), (2048, 1024, 64)):
        if shape[2] % t16.COLUMNS[bits] and shape[2] != shape[1]:
            continue
        weight = quantized(*shape, bits, symmetric)
        for digits, tolerance in TOLERANCE.items():
            module = PackedLinear(weight, digits=digits).cuda()
            for tokens in (1, 2, 3, 5, 8, 17, 64, 65):
                x = torch.randn(tokens, shape[1]).to(dtype)
                found = module(x.cuda())
                assert found.dtype == dtype and found.equal(module(x.cuda()))
                error = (found.cpu().double() - exact(x.float(), weight)).norm() / magnitude(x.float(), weight)
                assert error < tolerance + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)


@needs_triton
@pytest.mark.gpu
def test_a_graph_captures_products() -> None:
    for tokens, rows in ((1, 256), (16, 64)):
        module, x = PackedLinear(quantized(rows, 4096, 128, 4, False)).cuda(), torch.randn(tokens, 4096, device="cuda")
        expected = module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = module(x)
        for _ in range(3):
            found.zero_()
            graph.replay()
            assert found.equal(expected)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [16, 4, 2])
@pytest.mark.parametrize("ranks", [(200, 104), None])
def test_steps_behind_latents_on_a_gpu(ranks: tuple[int, int] | None, bits: int, dtype: torch.dtype) -> None:
    from latents_interpreted import expected, held

    for rows, heads, each, old, new in ((1, 8, 4, 64 * BLOCK, 33), (3, 2, 1, BLOCK, 1), (2, 1, 20, 5 * BLOCK, 100)):
        view, query = held(rows=rows, heads=heads, each=each, old=old, new=new, ranks=ranks, bits=bits, dtype=dtype, width=128)
        mask = torch.ones(rows, 1, 1, old + new, dtype=torch.bool)
        mask[-1, :, :, : old // 2] = False
        exact = expected(view, query, mask, 0.05)
        there = Held(view.latents.cuda(), view.old, view.positions.cuda(), view.keys.cuda(), view.values.cuda())
        for kept in there.old:
            kept.parts = tuple(part.cuda() for part in kept.parts)
        assert there.latents.why_torch(128, torch.device("cuda"), dtype) is None
        found = there.attend(query.cuda(), mask.cuda(), 0.05)
        assert found.dtype == dtype and torch.equal(found, there.attend(query.cuda(), mask.cuda(), 0.05))
        error = float((found.cpu().double() - exact).norm() / exact.norm())
        assert error < (2e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps)
