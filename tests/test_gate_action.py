"""The action and the example repository: their very steps are run, in bash, as a new user's workflow would."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
EXPRESSION = re.compile(r"\$\{\{ *([\w.-]+) *\}\}")


class Runner:
    """As much of GitHub's runner as the workflow uses: expressions that are names, `uses`, `with`, `env`, step outputs and a summary."""

    def __init__(self, folder: Path, tools: Path) -> None:
        self.folder, self.tools = folder, tools
        self.summary = tools / "summary"
        self.ran: list[str] = []

    def workflow(self, file: Path, context: dict[str, str]) -> int:
        """Run every job; the exit code of the first step that fails."""
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            for step in job["steps"]:
                name = step["uses"].partition("@")[0]
                if name.startswith("actions/"):  # check out, set up, upload: the folder is there
                    continue
                assert name.endswith("/compress")
                code = self.action(ROOT / "action.yml", {key: self.filled(value, context) for key, value in step["with"].items()}, context)
                if code:
                    return code
        return 0

    def action(self, file: Path, given: dict[str, str], context: dict[str, str]) -> int:
        action = yaml.safe_load(file.read_text())
        assert not given.keys() - action["inputs"].keys()
        inputs = {name: given.get(name, about.get("default")) for name, about in action["inputs"].items()}
        assert all(value is not None for value in inputs.values()), "a required input is missing"
        known = context | {f"inputs.{name}": str(value) for name, value in inputs.items()} | {"github.action_path": str(file.parent)}
        for step in action["runs"]["steps"]:
            output = self.tools / "output"
            output.write_text("")
            variables = {key: self.filled(value, known) for key, value in step.get("env", {}).items()}
            assert "${{" not in step["run"], "an expression in a script lets whoever names a branch run commands"
            environment = os.environ | variables | {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(self.summary)}
            environment |= {"PATH": f"{self.tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
            script = self.tools / "script"
            script.write_text(step["run"])
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)], cwd=self.folder, env=environment, capture_output=True, text=True
            )
            self.ran.append(step["name"])
            for line in output.read_text().splitlines():
                key, _, value = line.partition("=")
                known[f"steps.{step['id']}.outputs.{key}"] = value
            if done.returncode:
                return done.returncode
        return 0

    @staticmethod
    def filled(value: object, known: dict[str, str]) -> str:
        return EXPRESSION.sub(lambda match: known[match[1]], str(value))


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    """A copy of the example repository, and a `compress` and a `gh` on the path."""
    folder, tools = tmp_path / "repository", tmp_path / "tools"
    shutil.copytree(ROOT / "examples" / "ci", folder)
    tools.mkdir()
    for name, script in (
        ("compress", f'exec {shlex.quote(sys.executable)} -m compress "$@"'),
        ("gh", f'echo "$@" >> {shlex.quote(str(tools / "said"))}'),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    return Runner(folder, tools)


WITHOUT_TOKEN = {"github.token": "", "github.event.pull_request.number": ""}
PULL_REQUEST = {"github.token": "secret", "github.event.pull_request.number": "7"}


def run(runner: Runner, context: dict[str, str]) -> int:
    return runner.workflow(runner.folder / ".github" / "workflows" / "gate.yml", context)


@pytest.mark.slow
def test_the_example_passes_and_says_so_in_a_comment(runner: Runner) -> None:
    assert run(runner, PULL_REQUEST) == 0
    assert runner.ran == ["Install", "Compress and judge", "Comment", "Status"]
    comment = (runner.folder / "gate-out" / "comment.md").read_text()
    assert "✅ gate passed" in comment and comment == runner.summary.read_text()
    assert (runner.tools / "said").read_text().startswith("pr comment 7 --body-file gate-out/comment.md")
    root = ElementTree.parse(runner.folder / "gate-out" / "gate.xml").getroot()
    assert root.attrib["failures"] == root.attrib["errors"] == "0"


@pytest.mark.slow
def test_a_pull_request_that_makes_the_recipe_worse_fails_and_is_told_why(runner: Runner) -> None:
    recipe = runner.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("bits: 4", "bits: 2"))
    assert run(runner, WITHOUT_TOKEN) == 3
    comment = (runner.folder / "gate-out" / "comment.md").read_text()
    assert "❌ gate failed" in comment and "text demo:heldout: kl" in comment
    assert not (runner.tools / "said").exists()


def test_a_recipe_with_a_mistake_is_told_in_the_comment_too(runner: Runner) -> None:
    recipe = runner.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("bits", "bit"))
    assert run(runner, PULL_REQUEST) == 2
    comment = (runner.folder / "gate-out" / "comment.md").read_text()
    assert "no verdict (exit 2)" in comment and "unknown key; did you mean 'bits'?" in comment
    assert (runner.tools / "said").exists()


def test_the_workflow_asks_only_for_what_it_needs() -> None:
    workflow: dict[Any, Any] = yaml.safe_load((ROOT / "examples" / "ci" / ".github" / "workflows" / "gate.yml").read_text())
    assert workflow["permissions"] == {"contents": "read", "pull-requests": "write"}
    listed = workflow[True]["pull_request"]["paths"]  # YAML takes `on` for true
    assert all((ROOT / "examples" / "ci" / name).is_file() for name in listed)
