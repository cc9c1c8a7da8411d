"""What a killed run finds again: what it has measured, and nothing that is not as it was written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_run import KillAfter, Killed

from compress import pipeline, recipe, runtime, state
from compress.checkpoint import entry
from compress.errors import InputError
from compress.evaluate import scoring, tasks
from compress.evaluate.kept import Kept
from compress.evolution import Found, Gene, Options, Search

TASK = """\
task: odd
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["one", "two"]
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""


class Notes(tiny.Silent):
    """Progress that remembers what it is told in words."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def compress(plain: dict[str, Any], model: Path, out: Path, progress: tiny.Silent | None = None) -> dict[str, Any]:
    request = pipeline.Request(recipe.validate(plain, "r.yaml"), "r.yaml", str(model), out, out.with_name(out.name + ".work"), False)
    return pipeline.run(request, progress or tiny.Silent())


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("report.json", "report.html"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# What was measured ------------------------------------------------------------------------------------------------------------------


def measured(folder: Path) -> dict[str, Any]:
    """A recipe that measures in every way there is."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"good": f"the cat sat {n}", "bad": f"the cat sit {n}"}) + "\n" for n in range(4)))
    (folder / "odd.jsonl").write_text("".join(json.dumps({"text": f"after {n} comes", "label": n % 2}) + "\n" for n in range(4)))
    (folder / "odd.yaml").write_text(TASK % (folder / "odd.jsonl"))
    evaluation: dict[str, Any] = {"context": 32, "windows": 3, "pairs": str(folder / "pairs.jsonl"), "tasks": [str(folder / "odd.yaml")]}
    evaluation["retrieval"] = {"task": "passkey", "lengths": [128], "depths": [0.5], "cases": 2}
    return {"passes": [{"rtn": {"group_size": 32}}], "evaluate": evaluation, "verify": "streamed"}


class Ledger:
    """What was computed of which model, and when to die: once so many measurements are finished."""

    def __init__(self, patch: pytest.MonkeyPatch, last: int | None = None) -> None:
        self.done: list[str] = []
        self._last = last
        for owner, name, said in ((scoring, "last_hidden", "hidden"), (tasks, "run", "tasks"), (runtime, "load", "retrieval")):
            patch.setattr(owner, name, self._counted(getattr(owner, name), said))

    def _counted(self, real: Callable[..., Any], said: str) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            if len(self.done) == self._last:
                raise Killed
            found = real(*arguments, **named)
            self.done.append(said)
            return found

        return counted


EVERYTHING = ["hidden"] * 4 + ["tasks"] * 2 + ["retrieval"] * 2
"""Of source and artifact: text, pairs, tasks, retrieval."""


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder in which the recipe's files lie, and the report of a run that was not disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        ledger = Ledger(patch)
        report = compress(measured(folder), checkpoint("llama"), folder / "out")
    assert ledger.done == EVERYTHING
    return folder, report


@pytest.mark.parametrize("finished", [1, 2, 4, 5, 7])
def test_a_run_killed_while_it_measures_goes_on_there_to_the_same_figures(
    finished: int, undisturbed: tuple[Path, dict[str, Any]], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder, report = undisturbed
    plain = measured(folder)
    with pytest.MonkeyPatch.context() as patch:
        Ledger(patch, finished)
        with pytest.raises(Killed):
            compress(plain, checkpoint("llama"), tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        ledger = Ledger(patch)
        again = compress(plain, checkpoint("llama"), tmp_path / "out")
    assert ledger.done == EVERYTHING[finished:]
    assert json.dumps(again["evaluation"]) == json.dumps(report["evaluation"]) and again["redone"] == []
    assert contents(tmp_path / "out") == contents(folder / "out")


def test_another_protocol_is_measured_anew(undisturbed: tuple[Path, dict[str, Any]], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plain = measured(undisturbed[0])
    with pytest.MonkeyPatch.context() as patch:
        Ledger(patch, len(EVERYTHING) - 1)
        with pytest.raises(Killed):
            compress(plain, checkpoint("llama"), tmp_path / "out")
    plain["evaluate"]["windows"] = 2
    with pytest.MonkeyPatch.context() as patch:
        ledger = Ledger(patch)
        again = compress(plain, checkpoint("llama"), tmp_path / "out")
    assert ledger.done == ["hidden"] * 2 + ["retrieval"]  # of the text alone; pairs and tasks are as they were
    assert again["evaluation"]["protocol"]["sequences"] == 2


def test_figures_that_are_not_what_was_written_are_measured_again_and_recorded(
    undisturbed: tuple[Path, dict[str, Any]], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Ledger(patch, len(EVERYTHING) - 1)
        with pytest.raises(Killed):
            compress(measured(undisturbed[0]), checkpoint("llama"), tmp_path / "out")
    kept = next((tmp_path / "out.work").glob("run-*/evaluation/tasks-*.json"))
    kept.write_text(kept.read_text().replace("0.", "0.9"))
    again = compress(measured(undisturbed[0]), checkpoint("llama"), tmp_path / "out")
    assert json.dumps(again["evaluation"]) == json.dumps(undisturbed[1]["evaluation"])
    assert again["redone"] == [{"what": f"evaluation/{kept.name}", "why": "it is not what was written"}]


def test_figures_of_other_bytes_are_not_taken(tmp_path: Path) -> None:
    one, other = Kept(tmp_path, {"artifact": {"a": "1"}}), Kept(tmp_path, {"artifact": {"a": "2"}})
    assert one.figures("tasks", ("artifact",), {}, lambda: 1) == one.figures("tasks", ("artifact",), {}, lambda: 2) == 1
    assert other.figures("tasks", ("artifact",), {}, lambda: 3) == 3 and one.figures("tasks", ("artifact",), {"n": 1}, lambda: 4) == 4


# What was made ----------------------------------------------------------------------------------------------------------------------

GPTQ: dict[str, Any] = {
    "calibration": {"samples": 4, "length": 48},
    "evaluate": None,
    "passes": [{"smooth": {"min_tokens": 0}}, {"gptq": {"group_size": 32, "min_tokens": 0}}],
}
HEAL: dict[str, Any] = GPTQ | {"passes": [{"prune_nm": {"min_tokens": 0}}, {"heal": {"tokens": 2000, "train": "all"}}]}
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "gone": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
}


@pytest.fixture(scope="module")
def whole(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """Contents of an artifact whose run was not disturbed, by recipe."""
    made: dict[str, dict[str, str]] = {}

    def make(which: str) -> dict[str, str]:
        if which not in made:
            out = tmp_path_factory.mktemp("whole") / "out"
            compress({"gptq": GPTQ, "heal": HEAL}[which], checkpoint("llama-3-blocks"), out)
            made[which] = contents(out)
        return made[which]

    return make


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("pass-1-gptq/block-00000.safetensors", "flipped"),
        ("pass-1-gptq/block-00000.safetensors", "gone"),
        ("pass-1-gptq/activations.safetensors", "truncated"),
        ("pass-0-smooth/block-00001.safetensors", "emptied"),
    ],
)
def test_a_damaged_block_is_noticed_and_made_again(
    name: str, damage: str, checkpoint: Callable[..., Path], tmp_path: Path, whole: Callable[[str], dict[str, str]]
) -> None:
    with pytest.raises(Killed):
        compress(GPTQ, checkpoint("llama-3-blocks"), tmp_path / "out", KillAfter(6))
    (work,) = (tmp_path / "out.work").glob("run-*")
    DAMAGES[damage](work / name)
    notes = Notes()
    report = compress(GPTQ, checkpoint("llama-3-blocks"), tmp_path / "out", notes)
    folder, _, file = name.partition("/")
    why = f"{file} is gone" if damage == "gone" else f"{file} is not what was written"
    assert report["redone"] == [{"what": folder, "why": why}] and f"{folder} is made again: {why}" in notes.said
    assert contents(tmp_path / "out") == whole("gptq")


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_training_is_noticed_and_made_again(
    damage: str, checkpoint: Callable[..., Path], tmp_path: Path, whole: Callable[[str], dict[str, str]]
) -> None:
    saved = pytest.MonkeyPatch()
    real = state.write_state

    def write(path: Path, *arguments: Any) -> None:
        real(path, *arguments)
        if path.name == "training.safetensors":
            raise Killed

    with saved.context() as patched:
        patched.setattr("compress.whole.write_state", write)
        with pytest.raises(Killed):
            compress(HEAL, checkpoint("llama-3-blocks"), tmp_path / "out")
    (training,) = (tmp_path / "out.work").rglob("training.safetensors")
    DAMAGES[damage](training)
    report = compress(HEAL, checkpoint("llama-3-blocks"), tmp_path / "out")
    assert report["redone"] == [{"what": "pass-1-heal", "why": "copy-0/training.safetensors is not what was written"}]
    assert contents(tmp_path / "out") == whole("heal")


def test_a_file_that_no_run_wrote_is_not_continued_from(
    checkpoint: Callable[..., Path], tmp_path: Path, whole: Callable[[str], dict[str, str]]
) -> None:
    with pytest.raises(Killed):
        compress(GPTQ, checkpoint("llama-3-blocks"), tmp_path / "out", KillAfter(5))
    (work,) = (tmp_path / "out.work").glob("run-*")
    shutil.copy(work / "pass-0-smooth" / "block-00000.safetensors", work / "pass-1-gptq" / "block-00002.safetensors")
    report = compress(GPTQ, checkpoint("llama-3-blocks"), tmp_path / "out")
    assert report["redone"] == [{"what": "pass-1-gptq", "why": "block-00002.safetensors was not written by a run"}]
    assert contents(tmp_path / "out") == whole("gptq")


def test_what_was_written_before_is_intact_too_for_a_kill_may_come_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state.write_state_text(tmp_path / "a.json", "one")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(Killed()))
        for name in ("a.json", "b.json"):  # the second is noted, and not there
            with pytest.raises(Killed):
                state.write_state_text(tmp_path / name, "two")
    assert (tmp_path / "a.json").read_text() == "one" and state.damaged(tmp_path) == []
    with (tmp_path / state.SUMS).open("a") as sums:
        sums.write("0123")  # as far as a note came
    state.write_state_text(tmp_path / "a.json", "three")
    assert state.damaged(tmp_path) == []
    state.write_state(tmp_path / "c.safetensors", [entry("x", torch.ones(3))], {})
    assert state.intact(tmp_path / "c.safetensors") and not state.intact(tmp_path / "d.safetensors")
    (tmp_path / "a.json").write_text("four")
    (tmp_path / "c.safetensors").unlink()
    assert state.damaged(tmp_path) == ["a.json is not what was written", "c.safetensors is gone"]


def test_a_journal_is_read_up_to_a_line_that_was_not_finished_and_a_changed_one_shows(tmp_path: Path) -> None:
    options = Options(experts=4, count=2, sectors=1, prune=3, merge=0, near=(0.1, 0.1), seed=0)
    journal = tmp_path / "search.jsonl"

    def search() -> list[Found]:
        return Search(options, lambda individual: float(sum(individual[0].kept)), [(Gene((0, 1)),)], journal).go(lambda found: None)

    found = search()
    written = journal.read_text()
    journal.write_text(written[:-20])
    assert state.damaged(tmp_path) == [] and search() == found and journal.read_text() == written
    journal.write_text(written.replace('"fitness": ', '"fitness": 9', 1))
    assert state.damaged(tmp_path) == ["search.jsonl is not what was written"]


# Where a run writes -----------------------------------------------------------------------------------------------------------------


def places(out: Path, work: Path, model: Path, plain: dict[str, Any] = GPTQ, overwrite: bool = False) -> list[str]:
    with pytest.raises(InputError) as told:
        pipeline.run(pipeline.Request(recipe.validate(plain, "r.yaml"), "r.yaml", str(model), out, work, overwrite), tiny.Silent())
    return [str(problem) for problem in told.value.problems]


def test_everything_about_the_places_is_told_at_once_with_the_recipe_s_mistakes(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").write_text("dear")
    (tmp_path / "file").write_text("")
    told = places(tmp_path / "out", tmp_path / "file" / "work", checkpoint("llama"), GPTQ | {"passes": [{"rtn": {"group_size": 48}}]})
    assert [each.partition("; ")[0].removeprefix(f"{tmp_path}/") for each in told] == [
        "r.yaml: passes[0].rtn: group_size: 48 does not divide the width 64 of model.layers.0.self_attn.q_proj and 11 more",
        "out: exists already",
        f"file/work: cannot be made: {tmp_path}/file is no folder",
    ]


def test_both_disks_must_have_room(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm on a disk of its own, as Linux has it; on 2026-11-23 it ran and passed there")
    full = shutil._ntuple_diskusage(10**6, 0, 10**6)  # type: ignore[attr-defined]
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full if Path(path) == shared else real(path))
    told = places(tmp_path / "out", shared / tmp_path.name, checkpoint("llama"))
    assert len(told) == 2 and "is on another disk than" in told[0]
    assert told[1].startswith(f"{shared / tmp_path.name}: the disk has 0.00 GB free") and told[1].endswith("choose another --work")
    assert not (shared / tmp_path.name).exists()


def test_a_name_that_no_disk_takes_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (told,) = places(tmp_path / ("o" * 250), tmp_path / "work", checkpoint("llama"))  # what it replaces gets a longer name
    assert told.endswith("cannot be made (File name too long); choose another --out")


def test_a_shape_outside_the_blocks_is_told_before_any_block_is_made(
    copy: Callable[..., Path], edit_config: Callable[..., None], tmp_path: Path
) -> None:
    folder = copy()
    edit_config(folder, vocab_size=7)
    with pytest.raises(InputError, match=r"is of another shape than config\.json makes it"):
        compress({"evaluate": None, "passes": [{"rtn": {"group_size": 32}}]}, folder, tmp_path / "out", KillAfter(0))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("out", "work", "said"),
    [
        ("model/out", "out.work", "lies in the model's folder"),
        ("out", "model/work", "lies in the model's folder"),
        ("out", "model", "is the model itself"),
        ("out", "", "holds the model"),
        ("", "elsewhere/work", "holds the model"),
        ("out", "out", "are the same folder"),
        ("out", "out/work", "lie one in the other"),
        ("work/out", "work", "lie one in the other"),
    ],
)
def test_places_that_would_swallow_each_other_are_refused(out: str, work: str, said: str, copy: Callable[..., Path], tmp_path: Path) -> None:
    model = copy()
    before = sorted(tmp_path.rglob("*"))
    assert any(said in each for each in places(tmp_path / out, tmp_path / work, model))
    assert sorted(tmp_path.rglob("*")) == before
