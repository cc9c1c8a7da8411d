"""Products with packed weights are those of float64, on every instruction set there is, and the layout loses nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import RAN
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import InputError
from compress.kernels import native, t16
from compress.kernels.build import SOURCES, compile_library, compiler
from compress.kernels.linear import PackedLinear
from compress.kernels.packed import Extras
from compress.numerics.grid import Integer, Quantized

WIDTHS = sorted(t16.COLUMNS)
SHAPES = [(16, 32, 32), (48, 256, 128), (37, 256, 64), (100, 384, 384), (1, 96, 32), (5, 704, 704), (33, 688, 688)]
"""Outputs, inputs and group: whole blocks, part of one, one row, one scale per row, inputs that fill no whole unit."""
CROSS, QEMU, SIMDE = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64"), Path("/usr/include/simde")
TOLERANCE = {1: 2e-2, 2: 1e-4}
"""Of the product with inputs of so many digits, relative."""


def bitwise(codes: Tensor, bits: int) -> bytes:
    """The layout as its table says it, one weight after the other."""
    rows, columns = t16.padded(codes.shape[0], 16), t16.padded(codes.shape[1], t16.COLUMNS[bits])
    unit, vectors = t16.COLUMNS[bits], 3 if bits == 3 else 1
    out = bytearray(rows * columns * bits // 8)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            start = ((row // 16) * (columns // unit) + column // unit) * 64 * vectors + row % 16 * 4 + column % 4
            field, code = column % unit // 4, int(codes[row, column])
            if bits != 3:
                out[start] |= code << bits * field
            elif field < 6:
                out[start + 64 * (field // 2)] |= code << 3 * (field % 2)
            else:
                out[start + 64 * (field - 6)] |= (code >> 1) << 6
                out[start + 128] |= (code & 1) << field
    return bytes(out)


@pytest.mark.parametrize("bits", WIDTHS)
@given(rows=st.integers(1, 40), columns=st.integers(1, 70), seed=st.integers(0, 99))
def test_packing_is_what_the_table_says_and_loses_nothing(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = t16.pack(codes, bits)
    assert packed.numel() * 8 == t16.padded(rows, 16) * t16.padded(columns, t16.COLUMNS[bits]) * bits
    assert bytes(packed.flatten().tolist()) == bitwise(codes, bits)
    assert t16.unpack(packed, bits, rows, columns).equal(codes)


def test_a_width_without_a_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="no layout for 5 bits; there is one for 2, 3, 4, 8"):
        t16.pack(torch.zeros(1, 1, dtype=torch.uint8), 5)


def quantized(rows: int, columns: int, group: int, bits: int, symmetric: bool, stored: torch.dtype = torch.bfloat16) -> Quantized:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), dtype=torch.int8)
    scale = (torch.rand(rows, columns // group) + 0.1).to(stored)
    zero = None if symmetric else torch.randint(-half, half, scale.shape, dtype=torch.int8)
    return Quantized(codes, scale, zero, Integer(bits, symmetric))


def exact(x: Tensor, weight: Quantized) -> Tensor:
    codes, (rows, columns) = weight.codes.double(), weight.codes.shape
    zero = 0 if weight.zero_point is None else weight.zero_point.double()[..., None]
    return x.double() @ ((codes.view(rows, weight.scale.shape[1], -1) - zero) * weight.scale.double()[..., None]).view(rows, columns).T


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def magnitude(x: Tensor, weight: Quantized) -> Tensor:
    """What outputs would be if nothing cancelled: what an error of rounding is to be compared with."""
    return exact(x, weight).norm() + x.double().norm() * exact(torch.eye(x.shape[1]), weight).norm() / weight.codes.shape[0] ** 0.5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_products_are_those_of_float64(bits: int, shape: tuple[int, int, int], symmetric: bool, tier: str) -> None:
    for stored in (torch.bfloat16, torch.float16, torch.float32):
        weight = quantized(*shape, bits, symmetric, stored)
        for digits, tolerance in TOLERANCE.items():
            module = PackedLinear(weight, digits=digits)
            for tokens in (1, 2, 3, 7, 15, 33):
                x = torch.randn(tokens, shape[1])
                error = (module(x).double() - exact(x, weight)).norm() / magnitude(x, weight)
                assert error < (1e-6 if tier == "torch" else tolerance)


@pytest.mark.parametrize("bits", WIDTHS)
def test_instruction_sets_agree_to_the_last_bit(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.built() or compiler() is None, "the kernels were not built: python -m compress.kernels.build"
    x, found = torch.randn(5, 384), []
    module = PackedLinear(quantized(70, 384, 64, bits, False))
    for name in (name for name, here in native.built().items() if here):
        monkeypatch.setenv(native.FORCE, name)
        found.append(module(x))
    assert all(each.equal(found[0]) for each in found)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("digits", [1, 2])
def test_the_largest_codes_and_inputs_do_not_overflow(bits: int, digits: int, tier: str) -> None:
    codes = torch.full((16, 256), (1 << (bits - 1)) - 1, dtype=torch.int8)
    codes[8:] = -(1 << (bits - 1))
    zero = torch.full((16, 2), -(1 << (bits - 1)), dtype=torch.int8)
    for weight in (Quantized(codes, torch.ones(16, 2), None, Integer(bits, True)), Quantized(codes, torch.ones(16, 2), zero, Integer(bits, False))):
        for x in (torch.ones(1, 256), -torch.ones(1, 256), torch.ones(1, 256) * torch.tensor([1.0, -1.0]).repeat(128)):
            expected = exact(x, weight)
            assert torch.allclose(PackedLinear(weight, digits=digits)(x).double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39, 1e-20, 1e36])
def test_inputs_of_any_size(value: float, tier: str) -> None:
    weight = Quantized(torch.ones(16, 128, dtype=torch.int8), torch.full((16, 1), 2.0**-7), None, Integer(4, True))
    x = torch.full((2, 128), value)
    found = PackedLinear(weight)(x)
    assert bool(found.isfinite().all())
    # What is not a normal number counts as zero, as it does for processors that flush it.
    assert torch.allclose(found.double(), exact(x, weight), rtol=1e-4, atol=1e-37)


@given(seed=st.integers(0, 999), tokens=st.integers(1, 6), spread=st.sampled_from([0.0, 3.0]))
def test_two_digits_lose_less_than_inputs_in_bfloat16(seed: int, tokens: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 256, generator=generator) * torch.exp(spread * torch.randn(256, generator=generator))
    torch.manual_seed(seed)
    weight = quantized(64, 256, 128, 4, True)
    assert relative(PackedLinear(weight)(x), exact(x, weight)) < relative(exact(x.bfloat16(), weight), exact(x, weight))


def test_inputs_may_have_any_shape_stride_and_dtype(tier: str) -> None:
    weight, bias = quantized(20, 64, 32, 4, True), torch.randn(20)
    module, x = PackedLinear(weight, Extras(bias)), torch.randn(3, 64, 2).transpose(1, 2)
    assert module(x).shape == (3, 2, 20)
    assert relative(module(x), exact(x.reshape(6, 64), weight).view(3, 2, 20) + bias.double()) < 1e-4
    half = module(x.bfloat16())
    assert half.dtype == torch.bfloat16 and relative(half, module(x.bfloat16().float()).double()) < 1e-2
    assert module(x[:0]).shape == (0, 2, 20)


def test_the_operator_keeps_torchs_rules() -> None:
    module = PackedLinear(quantized(20, 64, 32, 3, False))
    arguments = (torch.randn(2, 64), module.codes, module.scales, module.zeros, 3, 20, 64, 2)
    torch.library.opcheck(torch.ops.compress.packed_linear.default, arguments)
    exported = torch.export.export(module, (torch.randn(2, 64),))
    x = torch.randn(2, 64)
    assert exported.module()(x).equal(module(x))


def test_memory_is_that_of_the_codes_and_scales() -> None:
    module = PackedLinear(quantized(64, 256, 128, 3, True))
    assert sum(buffer.nbytes for buffer in module.buffers()) == 64 * 256 * 3 // 8 + 64 * 2 * 2


def test_a_tier_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.FORCE, "sse9")
    with pytest.raises(InputError, match=r"\$COMPRESS_CPU: no kernels called 'sse9' here; there are"):
        native.tier()


def test_without_a_library_torch_does_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    caches = (native.library, native.built, native._chosen)
    for each in caches:
        each.cache_clear()
    try:
        weight, x = quantized(20, 64, 32, 4, True), torch.randn(2, 64)
        assert native.tier() == "torch" and relative(PackedLinear(weight)(x), exact(x, weight)) < 1e-6
    finally:
        monkeypatch.undo()
        for each in caches:
            each.cache_clear()


@pytest.mark.skipif(compiler() is None, reason=f"needs a C++ compiler: install g++ or name one in $CXX; {RAN}")
def test_a_library_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "old.cpp").write_text('extern "C" int t16_tiers() { return 1; }')
    subprocess.run([str(compiler()), "-shared", "-fPIC", str(tmp_path / "old.cpp"), "-o", str(tmp_path / "old.so")], check=True)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "old.so")
    native.library.cache_clear()
    try:
        with pytest.raises(InputError, match=r"old.so: is of another version .*; run python -m compress.kernels.build"):
            native.library()
    finally:
        monkeypatch.undo()
        native.library.cache_clear()


@pytest.mark.parametrize(("grid", "group"), [(Integer(5, True), 32), (Integer(3, True), 16)])
def test_a_grid_without_a_kernel_is_refused(grid: Integer, group: int) -> None:
    weight = Quantized(torch.zeros(16, 64, dtype=torch.int8), torch.ones(16, 64 // group), None, grid)
    assert not PackedLinear.takes(weight)
    with pytest.raises(ValueError, match=f"there is no kernel for {grid.bits} bits, group {group}"):
        PackedLinear(weight)


MAIN = Path(__file__).parent / "kernels_main.cpp"
"""Every width, digit and odd shape once on every instruction set, which must agree to the last bit."""


def printed(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason=f"needs a C++ compiler: install g++ or name one in $CXX; {RAN}")
def test_the_kernels_touch_no_memory_but_their_own(tmp_path: Path) -> None:
    """Under the address and undefined-behaviour sanitizers."""
    called, library, program = str(compiler()), tmp_path / "libt16.so", tmp_path / "main"
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
    compile_library(called, library, sanitize)
    subprocess.run([called, *sanitize, f"-I{SOURCES}", str(MAIN), str(library), "-o", str(program)], check=True)
    assert printed(program, LD_LIBRARY_PATH=str(tmp_path)) == " ".join(["clean:", *(name for name, here in native.built().items() if here)])


@pytest.mark.slow
@pytest.mark.skipif(not (CROSS and QEMU), reason=f"needs g++-aarch64-linux-gnu and qemu-user, as Debian calls them; {RAN}")
def test_neon_agrees_with_plain_on_an_emulated_processor(tmp_path: Path) -> None:
    library, program = tmp_path / "libt16.so", tmp_path / "main"
    compile_library(str(CROSS), library, machine="aarch64")
    subprocess.run([str(CROSS), "-O2", f"-I{SOURCES}", str(MAIN), str(library), "-o", str(program)], check=True)
    sysroot = Path("/usr/aarch64-linux-gnu")
    assert printed(str(QEMU), "-L", sysroot, "-E", f"LD_LIBRARY_PATH={tmp_path}:{sysroot}/lib", program) == "clean: plain neon"


@pytest.mark.slow
@pytest.mark.skipif(not SIMDE.exists() or compiler() is None, reason=f"needs libsimde-dev, as Debian calls it, and a C++ compiler; {RAN}")
def test_avx512_agrees_with_plain_where_its_instructions_are_emulated(tmp_path: Path) -> None:
    (tmp_path / "tiers.inc").write_text("TIER(plain, true)\nTIER(avx512, true)\n")
    flags = ["-std=c++17", "-O1", "-mavx2", "-mfma", "-mf16c", "-ffp-contract=off", "-w", f"-I{tmp_path}", f"-I{SOURCES}"]
    shim = ["-include", str(MAIN.with_name("avx512_emulated.h"))]
    for name in ("plain", "avx512", "t16"):
        source = str(SOURCES / f"{name}.cpp")
        subprocess.run([str(compiler()), *flags, *(shim if name == "avx512" else []), "-c", source, "-o", str(tmp_path / f"{name}.o")], check=True)
    program = tmp_path / "main"
    subprocess.run([str(compiler()), *flags, str(MAIN), *map(str, sorted(tmp_path.glob("*.o"))), "-o", str(program)], check=True)
    assert printed(program) == "clean: plain avx512"
