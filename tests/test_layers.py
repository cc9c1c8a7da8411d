"""Who may import whom. Seven floors, no circle, no arrow that runs up; and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "compress"
HEAVY = ("torch", "transformers", "compressed_tensors", "datasets", "lm_eval", "safetensors", "PIL", "accelerate")

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "options": ("errors",),
    "demo": (),
    "hardware": ("errors",),
    "numerics": ("errors", "hardware", "numerics"),
    "kernels": ("errors", "numerics", "formats", "kernels"),
    "formats": ("errors", "numerics"),
    "formats.sparse_residual": ("errors", "formats.base"),
    "formats.gptq": ("errors", "numerics", "formats.pack_quantized"),
    "formats.mlx": ("errors", "numerics", "formats.pack_quantized"),
    "formats.branch": ("errors", "numerics", "formats.base"),
    "formats.nm_packed": ("errors", "numerics", "formats.pack_quantized"),
    "formats.gguf_blocks": ("errors", "numerics", "formats.mxfp4_pack_quantized", "formats.sizes"),
    "formats.nvfp4_pack_quantized": ("errors", "numerics", "formats.mxfp4_pack_quantized"),
    "arch": ("errors", "arch.base"),
    "checkpoint": ("errors",),
    "state": ("checkpoint",),
    "manifest": ("errors", "options", "checkpoint"),
    "source": ("errors", "demo"),
    "fused": ("errors", "arch.base", "checkpoint"),
    "layout": ("errors", "arch.base", "checkpoint", "fused"),
    "declared": ("errors", "formats.base", "checkpoint", "layout", "scheme"),
    "scheme": ("errors", "formats.sizes", "layout", "numerics"),
    "images": ("errors",),
    "questions": ("errors",),
    "data": ("errors", "source", "checkpoint", "images", "questions"),
    "latents": ("errors", "numerics", "kernels"),
    "expert_forward": (),
    "slots": ("errors", "arch.base", "checkpoint", "expert_forward", "formats.base", "fused", "layout"),
    "cache": ("errors", "checkpoint", "latents", "layout", "numerics", "scheme"),
    "block": (
        "state",
        "cache",
        "latents",
        "hardware",
        "numerics",
        "formats",
        "arch.base",
        "checkpoint",
        "expert_forward",
        "fused",
        "layout",
        "model",
        "routing",
        "slots",
    ),
    "routing": ("layout",),
    "model": (
        "state",
        "cache",
        "latents",
        "errors",
        "hardware",
        "numerics",
        "formats",
        "arch.base",
        "checkpoint",
        "expert_forward",
        "layout",
        "declared",
        "scheme",
        "slots",
        "block",
        "routing",
    ),
    "reshape": ("arch.base", "checkpoint", "layout"),
    "folding": ("layout", "block"),
    "reordering": ("layout", "block", "numerics"),
    "probe": ("layout", "block", "expert_forward"),
    "objective": ("layout", "probe"),
    "replay": ("errors", "layout", "block", "expert_forward"),
    "drift": ("hardware", "layout", "block", "model", "expert_forward"),
    "calibrate": (
        "errors",
        "state",
        "hardware",
        "numerics",
        "checkpoint",
        "layout",
        "data",
        "block",
        "model",
        "replay",
        "drift",
        "probe",
        "expert_forward",
    ),
    "balance": ("errors", "state", "checkpoint", "data", "layout", "model", "backsweep"),
    "backsweep": ("errors", "hardware", "checkpoint", "layout", "data", "block", "model"),
    "whole": ("checkpoint", "state", "data", "block", "model", "backsweep"),
    "experts": ("block", "numerics", "probe", "expert_forward"),
    "evolution": ("state",),
    "fitness": ("backsweep", "block", "data", "evolution", "experts", "whole"),
    "gating": ("calibrate", "data", "layout", "block", "model", "numerics", "whole", "expert_forward"),
    "branching": ("checkpoint", "state", "calibrate", "data", "formats.branch", "layout", "model", "numerics"),
    "healing": (
        "errors",
        "state",
        "checkpoint",
        "backsweep",
        "branching",
        "calibrate",
        "data",
        "formats.branch",
        "block",
        "model",
        "numerics",
        "whole",
    ),
    "allocation": ("errors", "options", "numerics.knapsack", "checkpoint"),
    "sensitivity": ("errors", "state", "backsweep", "data", "layout", "block", "model"),
    "attribution": ("numerics", "checkpoint", "state", "data", "block", "model", "backsweep"),
    "passes": (
        "source",
        "state",
        "hardware",
        "latents",
        "options",
        "errors",
        "arch.base",
        "checkpoint",
        "allocation",
        "numerics",
        "layout",
        "data",
        "block",
        "model",
        "reshape",
        "folding",
        "reordering",
        "probe",
        "objective",
        "calibrate",
        "backsweep",
        "balance",
        "experts",
        "evolution",
        "fitness",
        "whole",
        "gating",
        "healing",
        "attribution",
        "sensitivity",
        "scheme",
        "passes.base",
    ),
    "passes.mbq": ("block", "errors", "layout", "data", "model", "calibrate", "passes.base", "passes.rtn", "passes.smooth"),
    "recipe": ("errors", "options", "source", "questions", "layout", "scheme", "numerics.pattern", "passes.base", "export.base", "engines.base"),
    "places": ("errors", "layout", "scheme", "passes.base", "recipe", "exporting", "planning"),
    "planning": ("errors", "source", "hardware", "formats", "checkpoint", "layout", "scheme", "passes.base", "recipe", "tradeoff"),
    "tradeoff": ("layout", "scheme", "passes.base", "recipe"),
    "engines": ("engines.launch", "layout", "scheme"),
    "engines.base": ("errors", "layout", "scheme"),
    "engines.launch": (),
    "engines.guard": (),
    "judging": ("errors", "engines.base", "layout", "scheme", "recipe", "planning"),
    "serving": ("errors", "manifest", "engines", "formats.base", "checkpoint", "data", "emulation", "layout", "runtime"),
    "advice": ("errors", "layout", "scheme", "recipe", "planning"),
    "export": ("errors", "formats", "arch.base", "checkpoint", "fused", "layout", "model", "scheme", "export.base"),
    "export.gguf": ("errors", "formats", "numerics", "checkpoint", "layout", "model", "scheme"),
    "export.mxfp4": ("errors", "fused", "checkpoint", "layout", "model", "scheme", "export.compressed_tensors"),
    "exporting": ("errors", "manifest", "formats", "checkpoint", "layout", "declared", "scheme", "model", "recipe", "export.base"),
    "export.nm_packed": ("errors", "formats", "checkpoint", "layout", "model", "scheme", "export.base", "export.compressed_tensors"),
    "evaluate": ("errors", "state", "hardware", "checkpoint", "layout", "data", "model", "recipe", "images", "evaluate"),
    "evaluate.statistics": (),
    "gate": (
        "errors",
        "options",
        "hardware",
        "checkpoint",
        "manifest",
        "source",
        "layout",
        "formats.base",
        "data",
        "model",
        "recipe",
        "evaluate",
        "runtime",
        "gate",
    ),
    "reopen": ("errors", "hardware", "numerics.sparsity", "checkpoint", "layout", "data", "model", "evaluate"),
    "runtime": ("latents", "errors", "hardware", "data", "checkpoint", "source", "layout", "model", "kernels", "numerics", "formats", "cache"),
    "emulation": ("errors", "formats", "kernels", "checkpoint", "layout", "model", "export.gguf", "runtime"),
    "speed": ("latents", "errors", "checkpoint", "source", "layout", "kernels", "runtime"),
    "patterns": ("errors", "checkpoint", "source", "layout", "formats.nm_packed", "kernels", "numerics.pattern", "model", "speed"),
    "plots": ("errors",),
    "report": ("errors", "formats.base", "checkpoint", "plots", "report"),
    "compare": ("errors", "report"),
    "card": ("errors", "checkpoint", "scheme", "numerics.pattern", "passes.base", "recipe"),
    "inspection": ("errors", "manifest", "formats", "checkpoint", "layout", "source"),
    "view": ("errors", "hardware", "gate.report"),
}
"""By module or package, longest match first. Those not named here - pipeline and cli - stand above all and may import everything below."""
TOP = ("pipeline", "cli", "__main__")
LIGHT = (
    "errors",
    "options",
    "numerics.knapsack",
    "numerics.pattern",
    "numerics.ranks",
    "arch",
    "checkpoint",
    "allocation",
    "source",
    "scheme",
    "layout",
    "passes",
    "recipe",
    "planning",
    "engines",
    "judging",
    "serving",
    "advice",
    "export",
    "report",
    "compare",
    "card",
    "pipeline",
    "cli",
    "inspection",
    "manifest",
    "runtime",
    "speed",
    "patterns",
    "view",
    "gate.rules",
    "gate.report",
)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name inside it; the package itself is not among them."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and (parts[-1] != "__init__" or path.read_text().strip()):
            found[name] = path
    return dict(sorted(found.items()))


MODULES = modules()


def covers(names: tuple[str, ...], module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def is_package(name: str) -> bool:
    return PACKAGE.parent.joinpath(*name.split(".")).is_dir()


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(module: str, *, top_only: bool = False, for_types: bool = True) -> set[str]:
    """Full dotted names a module imports; `from a import b` gives ``a.b`` if that is a module, ``a`` otherwise."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {name for name in inner if name.startswith("compress.") and (name.removeprefix("compress.") in MODULES or is_package(name))}
            found.update(known)
            if known != inner:
                found.add(str(node.module))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt) and is_type_checking(child) and not for_types:
                continue
            if top_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            visit(child)

    visit(ast.parse(MODULES[module].read_text()))
    return found


def ours(names: set[str]) -> set[str]:
    return {name.removeprefix("compress.") for name in names if name.startswith("compress.")}


def rule(module: str) -> tuple[str, ...] | None:
    return next((MAY_IMPORT[name] for name in sorted(MAY_IMPORT, key=len, reverse=True) if covers((name,), module)), None)


@pytest.mark.parametrize("module", [name for name in MODULES if not covers(TOP, name)])
def test_a_module_imports_only_what_its_floor_allows(module: str) -> None:
    allowed = rule(module)
    assert allowed is not None, f"{module} has no floor: give it one in MAY_IMPORT"
    assert not {name for name in ours(imports(module)) if not covers(allowed, name) and name != module}


def test_there_is_no_circle() -> None:
    graph = {module: ours(imports(module, for_types=False)) & MODULES.keys() - {module} for module in MODULES}
    assert len(tuple(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_nothing_imports_the_command_line() -> None:
    assert {module for module in MODULES if "cli" in ours(imports(module))} == {"__main__"}


@pytest.mark.parametrize("module", [name for name in MODULES if covers(LIGHT, name)])
def test_a_light_module_imports_nothing_heavy_at_its_top(module: str) -> None:
    assert not {name for name in imports(module, top_only=True, for_types=False) if name.partition(".")[0] in HEAVY}


@pytest.mark.parametrize(
    "statement",
    [
        "import compress.recipe, compress.layout, compress.planning",
        "import compress.cli",
        "import compress.pipeline",
        "from compress import advice; advice.book()",
        "import compress.passes.allocate, compress.passes.gptq, compress.export.compressed_tensors",
    ],
)
def test_what_answers_at_once_loads_no_torch(statement: str) -> None:
    code = f"import sys; {statement}; print(sorted({{name.partition('.')[0] for name in sys.modules}} & {set(HEAVY)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_table_has_no_row_for_what_does_not_exist() -> None:
    assert not [name for name in MAY_IMPORT if not any(covers((name,), module) for module in MODULES)]
