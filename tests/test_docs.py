"""Documents tell the truth: their code runs, what scripts write into them is fresh, their links lead somewhere, every recipe loads."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress import errors, pipeline, recipe
from compress.cli import app
from compress.passes.base import Prunes, Restructure

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SKIP = re.compile(r"<!-- not run: (.+) -->")
FILE = re.compile(r"# ((?:compress|tests|recipes)/\S+)")


@dataclass(frozen=True)
class Code:
    """A code block of a document. `file` is the path its first line gives it, `skipped` why it is not run."""

    document: str
    line: int
    language: str
    text: str
    skipped: str | None

    @property
    def file(self) -> str | None:
        match = FILE.fullmatch(self.text.partition("\n")[0])
        return match[1] if match else None


def code_blocks(path: Path) -> list[Code]:
    """Every fenced block of a document that names its language."""
    found, lines = [], path.read_text().splitlines()
    start = None
    for number, line in enumerate(lines):
        if start is None and line.startswith("```"):
            start = number
        elif start is not None and line == "```":
            reason = SKIP.fullmatch(lines[start - 1]) if start else None
            text = "\n".join(lines[start + 1 : number]) + "\n"
            found.append(Code(path.name, start + 1, lines[start].removeprefix("```"), text, reason[1] if reason else None))
            start = None
    assert start is None, f"{path.name}:{start}: a code block that does not end"
    return found


BLOCKS = [block for path in DOCUMENTS for block in code_blocks(path)]
PLAIN = [block for block in BLOCKS if block.file is None]


def named(blocks: list[Code]) -> list[object]:
    return [pytest.param(block, id=f"{block.document}:{block.line}") for block in blocks]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"} | more


@pytest.mark.parametrize("block", named([block for block in PLAIN if block.language == "python"]))
def test_python_in_documents_runs(block: Code) -> None:
    assert block.skipped is None
    exec(compile("\n" * block.line + block.text, block.document, "exec"), {"__name__": "document"})


@pytest.mark.parametrize("block", named([block for block in PLAIN if block.language == "bash" and not block.skipped]))
def test_shell_in_documents_runs(block: Code, tmp_path: Path) -> None:
    (tmp_path / "compress").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m compress "$@"\n')
    (tmp_path / "compress").chmod(0o755)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=ROOT,
        env=environment(PATH=f"{tmp_path}:{os.environ['PATH']}"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_not_run_says_why() -> None:
    assert {block.language for block in PLAIN} <= {"python", "bash", "yaml", "json", ""}
    skipped = {f"{block.document}: {block.text.splitlines()[0].partition('  ')[0]}" for block in BLOCKS if block.skipped}
    assert skipped == {
        "README.md: pip install -e . && compress run recipes/w4.yaml demo:dense",
        "CONTRIBUTING.md: pip install -e '.[dev]'",
        "CONTRIBUTING.md: compress run recipes/pow2.yaml demo:dense --out pow2",
        "README.md: compress export w4 --to gptq,awq,mlx,gguf",
        "engines.md: compress check w4 demo:dense --engine vllm==0.33",
        'export.md: compress serve-check small-gguf --engine llama.cpp --python "$COMPRESS_RIVALS/llamacpp/bin/python" --reference small --tokens 64',
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_worked_example_is_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of CONTRIBUTING.md, written where it says, in a folder that the package is told to look into as well."""
    import compress.passes

    files = {block.file: block for block in BLOCKS if block.file}
    assert set(files) == {"compress/passes/pow2.py", "recipes/pow2.yaml", "tests/test_pow2.py"}
    for name, block in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(block.text.partition("\n")[2])
    monkeypatch.setattr(compress.passes, "__path__", [*compress.passes.__path__, str(tmp_path / "compress" / "passes")])
    monkeypatch.chdir(tmp_path)
    try:
        assert "pow2" in recipe.pass_names()
        path = tmp_path / "recipes" / "pow2.yaml"
        words = shlex.split(path.read_text().partition("\n")[0].removeprefix("# "))
        assert words[0] == "compress"
        result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
        assert result.exit_code == errors.Exit.ACCEPTED, result.output
        tests: dict[str, object] = {}
        exec(compile((tmp_path / "tests" / "test_pow2.py").read_text(), "test_pow2.py", "exec"), tests)
        functions = [value for name, value in tests.items() if name.startswith("test_") and callable(value)]
        assert len(functions) == 2
        for function in functions:
            function()
    finally:
        sys.modules.pop("compress.passes.pow2", None)


def test_the_reference_of_recipes_is_fresh() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "recipe_reference.py"), "--check"]
    done = subprocess.run(script, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_figures_of_the_readme_are_those_measured() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "results.py"), "--check"]
    done = subprocess.run(script, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def meant_for(path: Path) -> str:
    return {"vlm": "demo:vlm", "experts": "demo:moe"}.get(path.stem.partition("-")[0], "demo:dense")


def test_recipes_are_counted() -> None:
    quantising = ["awq4", "fp8", "nvfp4", "rtn4", "vlm-w3", "vlm-w4", "vlm-w4a8", "w2", "w3", "w4-kv-latents", "w4-kv8", "w4", "w8", "w8a8"]
    pruning = ["depth", "low-rank", "nm24-heal", "nm24-w4", "nm24", "prune20-nm24-w4", "prune20"]
    experts = ["experts-active", "experts-channels", "experts-task", "experts-w4"]
    assert sorted(path.stem for path in RECIPES) == sorted([*quantising, *pruning, *experts])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_fit_the_demonstration_model(path: Path) -> None:
    layout = pipeline.open_layout(meant_for(path))
    loaded = recipe.load(path)
    pruned = [linear for _, step in loaded.instances() if isinstance(step, Prunes) for linear in step.prunes(layout)]
    plan = recipe.check(loaded, layout, path.name)
    if any(isinstance(step, Restructure) for _, step in loaded.instances()):
        after = recipe.expected(loaded, layout)[-1]
        assert (
            after.checkpoint.nbytes < layout.checkpoint.nbytes or after.text_config["num_experts_per_tok"] < layout.text_config["num_experts_per_tok"]
        )
    else:
        assert {*plan, *pruned} == layout.linears.keys()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_begin_with_their_command_and_a_summary(path: Path) -> None:
    command, summary, *_ = path.read_text().splitlines()
    assert command == f"# compress run recipes/{path.name} {meant_for(path)} --out {path.stem}"
    assert re.fullmatch(r"# .{20,}\.", summary)
    listed = CliRunner().invoke(app, ["recipes"]).output
    assert summary.removeprefix("# ") in listed
