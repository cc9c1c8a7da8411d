"""The action and the example repository: their very steps are run, in bash, as a new user's workflow would."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
EXPRESSION = re.compile(r"\$\{\{ *([\w.-]+) *\}\}")


class Runner:
    """As much of GitHub's runner as the workflow uses: expressions that are names, `uses`, `with`, `env`, step outputs and a summary."""

    def __init__(self, folder: Path, tools: Path, github: GitHub) -> None:
        self.folder, self.tools, self.github = folder, tools, github
        self.said = ""
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
            environment |= {"GITHUB_API_URL": self.github.url, "GITHUB_REPOSITORY": "me/mine", "NO_PROXY": "127.0.0.1"}
            script = self.tools / "script"
            script.write_text(step["run"])
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)], cwd=self.folder, env=environment, capture_output=True, text=True
            )
            self.ran.append(step["name"])
            self.said += done.stdout + done.stderr
            for line in output.read_text().splitlines():
                key, _, value = line.partition("=")
                known[f"steps.{step['id']}.outputs.{key}"] = value
            if done.returncode:
                return done.returncode
        return 0

    @staticmethod
    def filled(value: object, known: dict[str, str]) -> str:
        return EXPRESSION.sub(lambda match: known[match[1]], str(value))


class GitHub:
    """Comments of pull request 7 of me/mine: listed by pages, added, changed, or refused to a token that may only read."""

    def __init__(self) -> None:
        self.comments: list[dict[str, Any]] = []
        self.asked: list[str] = []
        github = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                parts, token = urlsplit(self.path), self.headers["Authorization"].removeprefix("Bearer ")
                github.asked.append(f"{self.command} {parts.path}")
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
                status, found = (
                    (403, {}) if token != "secret" and self.command != "GET" else github.answer(self.command, parts.path, parts.query, body)
                )
                text = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PATCH = answer  # noqa: N815

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, command: str, path: str, query: str, body: Any) -> tuple[int, Any]:
        of, _, number = path.removeprefix("/repos/me/mine/issues/").rpartition("/")
        if (command, of, number) == ("GET", "7", "comments"):
            page, many = (int(parse_qs(query)[key][0]) for key in ("page", "per_page"))
            return 200, self.comments[(page - 1) * many : page * many]
        if (command, of, number) == ("POST", "7", "comments"):
            self.comments.append({"id": len(self.comments) + 1, "body": body["body"]})
            return 201, self.comments[-1]
        if command == "PATCH" and of == "comments":
            self.comments[int(number) - 1]["body"] = body["body"]
            return 200, self.comments[int(number) - 1]
        return 404, {}


@pytest.fixture
def github() -> Iterator[GitHub]:
    found = GitHub()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def runner(tmp_path: Path, github: GitHub) -> Runner:
    """A copy of the example repository, and a `compress` and a `python` on the path."""
    folder, tools = tmp_path / "repository", tmp_path / "tools"
    shutil.copytree(ROOT / "examples" / "ci", folder)
    tools.mkdir()
    for name, script in (
        ("compress", f'exec {shlex.quote(sys.executable)} -m compress "$@"'),
        ("python", f'exec {shlex.quote(sys.executable)} "$@"'),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    return Runner(folder, tools, github)


WITHOUT_TOKEN = {"github.token": "", "github.event.pull_request.number": ""}
PULL_REQUEST = {"github.token": "secret", "github.event.pull_request.number": "7"}
FROM_A_FORK = {"github.token": "reading only", "github.event.pull_request.number": "7"}
MARK = "<!-- compress gate: recipe.yaml, demo:dense, gate.yaml -->\n"


def run(runner: Runner, context: dict[str, str]) -> int:
    return runner.workflow(runner.folder / ".github" / "workflows" / "gate.yml", context)


@pytest.mark.slow
def test_the_example_passes_and_says_so_in_a_comment(runner: Runner) -> None:
    assert run(runner, PULL_REQUEST) == 0
    assert runner.ran == ["Install", "Compress and judge", "Comment", "Status"]
    comment = (runner.folder / "gate-out" / "comment.md").read_text()
    assert "✅ gate passed" in comment and comment == runner.summary.read_text()
    assert [each["body"] for each in runner.github.comments] == [MARK + comment]
    root = ElementTree.parse(runner.folder / "gate-out" / "gate.xml").getroot()
    assert root.attrib["failures"] == root.attrib["errors"] == "0"


@pytest.mark.slow
def test_a_pull_request_that_makes_the_recipe_worse_fails_and_is_told_why(runner: Runner) -> None:
    recipe = runner.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("bits: 4", "bits: 2"))
    assert run(runner, WITHOUT_TOKEN) == 3
    comment = (runner.folder / "gate-out" / "comment.md").read_text()
    assert "❌ gate failed" in comment and "text demo:heldout: kl" in comment
    assert not runner.github.asked


def test_a_recipe_with_a_mistake_is_told_in_the_comment_too(runner: Runner) -> None:
    recipe = runner.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("bits", "bit"))
    assert run(runner, PULL_REQUEST) == 2
    comment = (runner.folder / "gate-out" / "comment.md").read_text()
    assert "no verdict (exit 2)" in comment and "unknown key; did you mean 'bits'?" in comment
    assert runner.github.comments[0]["body"] == MARK + comment


def test_a_comment_is_written_once_and_then_anew_among_those_of_others(runner: Runner) -> None:
    recipe = runner.folder / "recipe.yaml"
    good = recipe.read_text()
    runner.github.comments = [
        {"id": number, "body": text} for number, text in enumerate(["lint: fine", None, "<!-- compress gate: r, m, g -->"] * 40, 1)
    ]
    others = list(runner.github.comments)
    for mistake in ("bit", "bots"):
        recipe.write_text(good.replace("bits", mistake))
        assert run(runner, PULL_REQUEST) == 2
        assert runner.github.comments[:120] == others and len(runner.github.comments) == 121
        assert f"passes[0].rtn: {mistake}: unknown key" in runner.github.comments[120]["body"]
    assert [each.partition(" ")[0] for each in runner.github.asked] == ["GET", "GET", "POST", "GET", "GET", "PATCH"]
    assert "::warning::" not in runner.said


def test_a_token_that_may_only_read_and_a_server_that_is_gone_are_told_and_the_status_stays(runner: Runner) -> None:
    recipe = runner.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("bits", "bit"))
    assert run(runner, FROM_A_FORK) == 2
    assert runner.github.comments == [] and runner.said.count("::warning::the comment could not be written") == 1
    assert "secret" not in runner.said and "reading only" not in runner.said
    runner.github.url = "http://127.0.0.1:9"
    assert run(runner, PULL_REQUEST) == 2
    assert runner.said.count("::warning::the comment could not be written") == 2 and runner.summary.read_text().count("no verdict (exit 2)") == 2


def test_what_a_pull_request_writes_cannot_leave_the_block_of_its_comment(runner: Runner) -> None:
    recipe = runner.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("bits", '"```\\n@everyone $(touch ran)"'))
    assert run(runner, PULL_REQUEST) == 2
    assert runner.github.comments[0]["body"].count("```") == 2 and not (runner.folder / "ran").exists()


@pytest.mark.parametrize("gpu", [False, True])
def test_the_package_is_installed_where_it_is_not_and_without_a_gpu_that_of_pytorch_first(runner: Runner, gpu: bool) -> None:
    """Whatever else is called compress: a program of the system, a folder of the repository."""
    (runner.folder / "compress").mkdir()
    (runner.folder / "compress" / "gate.py").write_text("")
    (runner.tools / "python").write_text('#!/bin/sh\ncase "$1" in -P) exit 1;; *) echo "$@" >> installed;; esac\n')
    if gpu:
        shutil.copy(runner.tools / "compress", runner.tools / "nvidia-smi")
    recipe = runner.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("bits", "bit"))
    assert run(runner, WITHOUT_TOKEN) == 2
    asked = (runner.folder / "installed").read_text().splitlines()
    assert asked[-1] == f"-m pip install {ROOT}"
    assert asked[:-1] == [] if gpu else ["-m pip install torch --index-url https://download.pytorch.org/whl/cpu"]


def test_the_workflow_asks_only_for_what_it_needs() -> None:
    workflow: dict[Any, Any] = yaml.safe_load((ROOT / "examples" / "ci" / ".github" / "workflows" / "gate.yml").read_text())
    assert workflow["permissions"] == {"contents": "read", "pull-requests": "write"}
    listed = workflow[True]["pull_request"]["paths"]  # YAML takes `on` for true
    assert all((ROOT / "examples" / "ci" / name).is_file() for name in listed)
