"""The kernels for GPUs as machine code, compiled here for GPUs that are not: instructions per weight, width of loads, spills.

    python bench/sass.py --json sass.json [--only sm_90] [--tokens 1]

An instruction per weight is one that one thread executes, over the weights that its program takes: the instructions in the body of the
innermost loop, times the threads of the program, over the weights that one round of the loop multiplies (by all its inputs and digits). What
runs once per program is not counted. An H200 can issue about 3.5 per weight of 4 bits in the time it takes to read one, 2.6 of 3 bits and 1.7
of 2 bits; stalls and slower pipes come on top, so few instructions are needed for speed but do not prove it.
"""

import argparse
import itertools
import json
import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.kernels import gpu, latents, t16, triton_latents, triton_t16

DEVICES = {
    "sm_80": (gpu.Device("cuda", 32, 108), GPUTarget("cuda", 80, 32)),
    "sm_90": (gpu.Device("cuda", 32, 132), GPUTarget("cuda", 90, 32)),
    "sm_100": (gpu.Device("cuda", 32, 148), GPUTarget("cuda", 100, 32)),
    "gfx942": (gpu.Device("hip", 64, 304), GPUTarget("hip", "gfx942", 64)),
}
WIDTHS, DIGITS, TOKENS, STEP = (2, 3, 4, 8), (1, 2), (1, 2, 4, 8, 16, 32, 64), 128
ROWS = COLUMNS = 4096
MULTIPLIES = ("IDP", "IMMA", "IGMMA", "v_dot4", "v_mfma")
PARAMETERS = {
    "codes": "i32", "digits": "i32", "scales": "bf16", "zeros": "u8", "units": "fp32", "sums": "fp32", "partials": "fp32", "counters": "i32",
    "y": "bf16", "x": "bf16",
}  # fmt: skip
"""What the pointers among the kernels' parameters point to."""
ALIGNED = ("rows", "key_row", "key_group", "key_token", "value_row", "value_group", "value_token")
"""Sizes that are multiples of 16."""


@dataclass(frozen=True)
class Code:
    """What was counted in one kernel; `loads` are the widest loads, in bits, and `ahead` are as many as stand before the first product."""

    instructions: int
    per_weight: float
    loads: int
    ahead: int
    spills: int
    registers: int
    body: dict[str, int]


def compiled(kernel: Any, target: GPUTarget, constants: dict[str, Any], types: dict[str, str], absent: tuple[str, ...]) -> Any:
    """A kernel for `target`, with pointers and sizes as aligned as torch's are."""
    options = {name: value for name, value in constants.items() if name.islower()}
    fixed = {name: value for name, value in constants.items() if not name.islower()} | dict.fromkeys(absent)
    signature = {name: "constexpr" if name in fixed else f"*{types[name]}" if name in types else "i32" for name in kernel.arg_names}
    signature |= {name: "fp32" for name in signature if name == "scaling"}
    aligned = [place for place, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or name in ALIGNED]
    source = ASTSource(kernel, signature, fixed, {(place,): [["tt.divisibility", 16]] for place in aligned})
    return triton.compile(source, target=target, options=options)


def product(name: str, bits: int, digits: int, tokens: int, symmetric: bool = True) -> Code:
    """The kernel that `gpu.tile` chooses for so many tokens."""
    device, target = DEVICES[name]
    cut = gpu.tile(device, bits, ROWS // t16.ROWS, COLUMNS // STEP, STEP, tokens, digits)
    constants = gpu.constants(device, cut, bits, STEP, STEP, digits)
    absent = (*(("zeros",) if symmetric else ()), *(("partials", "counters") if cut.split == 1 else ()))
    if cut.dots:
        made = compiled(triton_t16.matrix_kernel, target, constants, PARAMETERS | {"codes": "u8", "digits": "i8"}, absent)
        weights = cut.blocks * t16.ROWS * STEP
    else:
        made = compiled(triton_t16.vector_kernel, target, constants, PARAMETERS, absent)
        weights = gpu.slots(device, cut.warps) // gpu.lanes(bits, STEP) * STEP * t16.ROWS
    return counted(made, weights, cut.warps * device.warp)


def attending(
    name: str, groups: int, width: int, bits: int, number: Any = tl.bfloat16, mask: torch.dtype | None = None
) -> dict[str, tuple[int, int]]:
    """Of both kernels of a step behind a cache of `groups` that are so wide, in `number` or `bits`: spills, and bytes that threads share."""
    device, target = DEVICES[name]
    cut = latents.cut(device, 1, groups, 4, 32768, width, width, number.primitive_bitwidth // 8)
    given = None if mask is None else torch.empty(1, dtype=mask)
    coded = ("key_scales", "key_lows", "value_scales", "value_lows")
    types = dict.fromkeys(("sums", "limits", "old_sums", "new_sums"), "fp32") | dict.fromkeys(("query", "old", "new"), str(number))
    types |= dict.fromkeys(("keys", "values"), str(number) if bits == 16 else "u8") | dict.fromkeys(coded, "fp16")
    types["mask"] = "u8" if mask == torch.uint8 else str(number)
    absent = (*(coded if bits == 16 else ()), *(("mask",) if mask is None else ()))
    fixed = latents.constants(groups, width, width, bits, given, cut, number)
    made = {"attend": compiled(triton_latents.attend_kernel, target, fixed, types, absent)}
    made["join"] = compiled(triton_latents.join_kernel, target, latents.joining(width, 128, cut.parts + 1), types, ())
    return {kernel: (counted(code, 1, 1).spills, code.metadata.shared) for kernel, code in made.items()}


def rounding(name: str, digits: int) -> Any:
    """The kernel that rounds inputs, compiled."""
    constants = {
        "STEP": STEP, "COLUMNS": 8, "LANES": 2, "SLOTS": 32, "INPUTS": 1, "DIGITS": digits, "STEPS": 4, "WIDE": STEP,
        "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip
    return compiled(triton_t16.digits_kernel, DEVICES[name][1], constants, PARAMETERS | {"digits": "i8"}, ("counters",))


def counted(made: Any, weights: int, threads: int) -> Code:
    """What stands in the machine code of a kernel whose loop takes so many weights a round."""
    if "cubin" in made.asm:
        instructions, registers = _sass(made.asm["cubin"])
        wide = [int(width) for _, text in instructions for width in re.findall(r"^LDG\S*\.(128|64)\b", text)]
        spills = sum(text.startswith(("STL", "LDL")) for _, text in instructions)
    else:
        text = made.asm["amdgcn"]
        instructions, registers = _amd(text), int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        wide = [32 * int(count) for _, text in instructions for count in re.findall(r"^(?:global|buffer)_load_dwordx(\d)", text)]
        spills = sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
    body = _loop(instructions)
    before = itertools.takewhile(lambda line: not line.startswith(MULTIPLIES), body)
    ahead = sum(bool(re.match(r"LDG\S*\.128\b|(?:global|buffer)_load_dwordx4", line)) for line in before)
    return Code(
        len(body), len(body) * threads / weights if body else float("nan"), max(wide, default=32), ahead, spills, registers,
        dict(Counter(re.split(r"[\s.]", text)[0] for text in body).most_common()),
    )  # fmt: skip


def _sass(cubin: bytes) -> tuple[list[tuple[str, str]], int]:
    """Address and instruction of each line, and the registers of a thread. A jump's target is an address."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-sass", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S.*?);", text)
    return [(hex(int(address, 16)), line) for address, line in lines], int(re.search(r"REG:(\d+)", usage.stdout + usage.stderr)[1])


def _amd(text: str) -> list[tuple[str, str]]:
    """The same of assembly, where a label stands for the address of what follows it."""
    found, label = [], ""
    for line in text[: text.index("s_endpgm")].splitlines():
        code = line.split(";")[0].strip()
        if code.endswith(":"):
            label = code[:-1]
        elif code and not code.startswith("."):
            found.append((label, code))
            label = ""
    return found


def _loop(instructions: list[tuple[str, str]]) -> list[str]:
    """The longest run from the target of a jump backwards to the jump that multiplies; nothing if there is none, where a loop was cut up."""
    place = {address: number for number, (address, _) in enumerate(instructions) if address}
    found: list[str] = []
    for number, (_, text) in enumerate(instructions):
        if text.startswith(("BRA", "s_cbranch")):
            target = place.get(text.replace("`", "").split()[-1].strip("()"), number)
            run = [line for _, line in instructions[target : number + 1]]
            if len(run) > len(found) and any(line.startswith(MULTIPLIES) for line in run):
                found = run
    return [line for line in found if not line.startswith(("NOP", "s_nop", "s_waitcnt"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    parser.add_argument("--only", choices=sorted(DEVICES), help="one target")
    parser.add_argument("--tokens", type=int, nargs="+", choices=TOKENS, default=TOKENS, help="numbers of inputs")
    arguments = parser.parse_args()
    table, rows = Table(title=f"instructions per weight ({ROWS} x {COLUMNS}, groups of {STEP}, symmetric)"), []
    for heading in ("target", "bits", "digits", *(f"M={tokens}" for tokens in arguments.tokens)):
        table.add_column(heading, justify="right")
    for name, bits, digits in itertools.product([arguments.only] if arguments.only else DEVICES, WIDTHS, DIGITS):
        cells = []
        for tokens in arguments.tokens:
            code = product(name, bits, digits, tokens)
            rows.append({"target": name, "bits": bits, "digits": digits, "tokens": tokens, **vars(code)})
            cells.append(
                ("?" if math.isnan(code.per_weight) else f"{code.per_weight:.2f}")
                + (" spills" if code.spills else "")
                + ("" if code.loads == 128 else f" {code.loads}b")
            )
        table.add_row(name, str(bits), str(digits), *cells)
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    arguments.json.write_text(json.dumps({"benchmark": "sass", "versions": versions, "results": rows}, indent=1) + "\n")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
