"""The manifest of an artifact, whole, damaged and gone, beside everything that goes by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner

from compress import cli, exporting, inspection, manifest
from compress.errors import InputError
from compress.gate import run
from compress.gate.rules import validate

RECIPE = "passes: [{rtn: {bits: 4, group_size: 32}}]\nevaluate: null\n"
RULES = {"text": [{"data": "demo:heldout", "context": 16, "windows": 8, "max_flips": 1}], "integrity": {"allow": ["manifest README.md"]}}


def ran(*words: object) -> Any:
    return CliRunner().invoke(cli.app, [*map(str, words)], catch_exceptions=False)


@pytest.fixture
def artifact(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert ran("run", tmp_path / "r.yaml", checkpoint("llama"), "--out", tmp_path / "out").exit_code == 0
    return tmp_path / "out"


def gated(artifact: Path) -> dict[str, Any]:
    return run.judge(validate(RULES, "gate.yaml"), str(artifact), str(artifact), tiny.Silent())


READERS: dict[str, Callable[[Path], object]] = {
    "inspect": inspection.inspect,
    "export": lambda artifact: exporting.check(artifact, {"gptq": artifact.with_name("x")}),
    "gate": gated,
    "baseline": lambda artifact: run.save_baseline(validate(RULES, "gate.yaml"), str(artifact), artifact.with_name("b.json"), tiny.Silent()),
}


def faulty(plain: dict[str, Any]) -> list[tuple[str, object]]:
    """The manifest with each key that others go by replaced by each type of JSON, or gone; and what is no mapping."""
    others = [None, 3, 1.5, "text", [], ["text"], {}, {"a": 1}, True]
    made: list[tuple[str, object]] = [("", each) for each in others if not isinstance(each, dict)]
    for key, right in (("accepted", bool), ("files", dict)):
        made += [(key, plain | {key: each}) for each in others if not isinstance(each, right) or (right is dict)]
        made.append((key, {name: value for name, value in plain.items() if name != key}))
    made += [("files.config.json", plain | {"files": plain["files"] | {"config.json": each}}) for each in others if not isinstance(each, str)]
    return made


@pytest.mark.parametrize("reader", READERS)
def test_a_manifest_of_wrong_types_is_refused_with_its_file_its_key_and_what_to_do(reader: str, artifact: Path) -> None:
    path = artifact / "manifest.json"
    for key, plain in faulty(json.loads(path.read_text())):
        path.write_text(json.dumps(plain))
        with pytest.raises(InputError) as caught:
            READERS[reader](artifact)
        said = [str(problem) for problem in caught.value.problems if problem.place.startswith(str(path))]
        assert said and all(each.startswith(f"{path}: {key}") for each in said), (plain, str(caught.value))
        assert all(manifest.REMEDY in each and ("got" in each or "is missing" in each) and "Error" not in each for each in said), said


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 5000, "\udcff"], ids=["empty", "half", "deep", "long", "bytes"])
@pytest.mark.parametrize("reader", READERS)
def test_a_manifest_that_is_no_json_is_refused(reader: str, text: str, artifact: Path) -> None:
    (artifact / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"manifest\.json: is not JSON .*; fetch the artifact again"):
        READERS[reader](artifact)


def test_a_manifest_names_nothing_outside_of_its_folder(artifact: Path) -> None:
    outside = artifact.with_name("r.yaml")
    names = ["../r.yaml", str(outside), "", ".", "x" * 5000, "a\0b"]
    found = manifest.Manifest(accepted=True, files=dict.fromkeys(names, "0" * 64)).differing(artifact)
    assert found == dict.fromkeys(sorted(names), "is missing")


def test_a_file_that_is_not_the_one_told_of_is_found_by_all(artifact: Path) -> None:
    (artifact / "README.md").write_text("another")
    assert gated(artifact)["verdict"] == "passed"  # allowed by name
    (artifact / "config.json").write_text((artifact / "config.json").read_text() + " ")
    found = {check["name"]: check["detail"] for check in gated(artifact)["checks"]}
    assert found["manifest"] == "manifest config.json differs"
    with pytest.raises(InputError, match=r"is no baseline: manifest config\.json differs"):
        READERS["baseline"](artifact)
    assert not artifact.with_name("b.json").exists()
    with pytest.raises(InputError, match=r"config\.json: is not the file that manifest\.json tells of"):
        READERS["export"](artifact)


def test_an_artifact_without_its_manifest_is_taken_and_that_is_told(artifact: Path) -> None:
    def exported(*words: str) -> tuple[Any, str]:
        said = ran("export", artifact, "--to", "gptq", "--overwrite", *words)
        assert said.exit_code == 0, said.output
        return json.loads((artifact.with_name("out-gptq") / "export.json").read_text())["accepted"], " ".join(said.output.split())

    accepted, said = exported()
    assert accepted is True and "manifest" not in said and not gated(artifact)["notes"]
    told = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps(told | {"accepted": False}))
    accepted, said = exported("--rejected")
    assert accepted is False and "the gates of the artifact failed" in said
    (artifact / "manifest.json").unlink()
    accepted, said = exported()
    assert accepted is None and "the artifact has no manifest.json: nothing tells whether its files are as they were written" in said
    (note,) = {note.partition(" has ")[2] for note in gated(artifact)["notes"]}
    assert note == "no manifest.json any more: nothing tells whether its files are as they were written"
    for name in manifest.BESIDE:
        (artifact / name).unlink(missing_ok=True)
    assert not gated(artifact)["notes"]  # what other programs made has none
