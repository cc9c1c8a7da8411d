"""The search finds what trying everything finds, judges what it writes, and a killed one goes on as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_run import KillAfter, Killed, compress, contents
from transformers import AutoModelForCausalLM

from compress import recipe
from compress.backsweep import mean_loss
from compress.calibrate import look
from compress.checkpoint import Checkpoint
from compress.data import Tokenizer, calibration, divided, sentence_pairs
from compress.errors import InputError
from compress.evolution import MERGING, PRUNING, Found, Gene, Options, Search, arbitrary
from compress.experts import Reconstruction
from compress.fitness import Mixture, accuracy, margin
from compress.layout import Layout
from compress.model import Model
from compress.whole import opened

QUICK: dict[str, Any] = {"calibration": {"samples": 8, "length": 48}, "evaluate": None}
NEAR = (0.03, 0.01)


def searching(**options: Any) -> dict[str, Any]:
    return QUICK | {"passes": [{"eep": {"keep": 0.5, "start": 2, "prune": 6, "merge": 8, "judged": 4} | options}]}


def records(out: Path) -> list[dict[str, Any]]:
    return [record for record in json.loads((out / "report.json").read_text())["transforms"] if record["pass"] == "eep"]


def pairs_file(path: Path) -> Path:
    rows = [{"good": f"The cat number {number} sat on the mat.", "bad": f"Mat the on sat {number} number cat the."} for number in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_dead_experts(folder: Path, dead: tuple[int, int]) -> Path:
    """Two of eight are never chosen: the router rows of the others are opposite in pairs, so three of them always beat a row of zeros."""
    alive = [expert for expert in range(8) if expert not in dead]
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("mlp.gate.weight"):
                rows = torch.zeros_like(tensors[name])
                rows[alive[::2]], rows[alive[1::2]] = tensors[name][alive[::2]], -tensors[name][alive[::2]]
                tensors[name] = rows
        save_file(tensors, path, {"format": "pt"})
    return folder


@torch.no_grad()
@pytest.mark.parametrize("dead", [(1, 6), (0, 5)])
def test_dead_experts_are_found_as_by_trying_everything(dead: tuple[int, int], copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_dead_experts(copy("qwen3_moe"), dead)
    samples = calibration("demo:text", 4, 48, 0, Tokenizer(folder))
    for probe in look(Model(Layout(Checkpoint(folder))), samples, tiny.Silent()):
        error = Reconstruction(probe, None).error
        every = {kept: -error(torch.tensor(kept)) for kept in combinations(range(8), 6)}
        assert max(every, key=lambda kept: every[kept]) == tuple(expert for expert in range(8) if expert not in dead)
        options = Options(8, 6, 1, 40, 0, NEAR, 0)
        seeds = [arbitrary(options, 1, number) for number in range(4)]
        search = Search(options, lambda individual, every=every: every[individual[0].kept], seeds, tmp_path / f"{probe.block.layout.index}.jsonl")
        search.go(lambda found: None)
        assert search.best().fitness == max(every.values()) > -1e-4


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 7, 30])
def test_a_search_that_was_cut_short_goes_on_to_the_same_end(stop: int, mapped: bool, tmp_path: Path) -> None:
    def fitness(individual: tuple[Gene, ...]) -> float:
        matrices = [matrix or gene.themselves(8) for gene in individual for matrix in (gene.mix, gene.routes)]
        return -sum(abs(sum(gene.kept) - 11) for gene in individual) - sum(abs(1 - sum(row)) for matrix in matrices for row in matrix)

    options = Options(8, 4, 2, 20, 20, NEAR, 5, mapped)
    seeds = [arbitrary(options, 3, number) for number in range(3)]
    whole = Search(options, fitness, seeds, tmp_path / "whole").go(lambda found: None)

    def cut(found: Found) -> None:
        if len(first.archive) > stop:
            raise Killed

    first = Search(options, fitness, seeds, tmp_path / "part")
    with pytest.raises(Killed):
        first.go(cut)
    with (tmp_path / "part").open("a") as journal:
        journal.write('{"phase": "prune", "fitn')  # as if the machine had stopped in the middle of a line
    assert Search(options, fitness, seeds, tmp_path / "part").go(lambda found: None) == whole
    assert any(gene.routes for found in whole for gene in found.individual) == mapped
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()


@given(seed=st.integers(0, 1000), sectors=st.sampled_from([1, 2, 4]))
def test_children_keep_as_many_of_each_sector_and_only_merging_mixes(seed: int, sectors: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    options = Options(8, 4, sectors, 6, 6, NEAR, seed)
    seeds = [arbitrary(options, 2, number) for number in range(2)]
    search = Search(options, lambda individual: float(sum(individual[0].kept)), seeds, tmp_path_factory.mktemp("search") / "journal")
    for found in search.go(lambda found: None):
        for gene in found.individual:
            assert list(gene.kept) == sorted(set(gene.kept))
            assert all(sum(one // (8 // sectors) == sector for one in gene.kept) == 4 // sectors for sector in range(sectors))
            assert gene.mix is None or found.phase == MERGING
            assert gene.mix is None or (len(gene.mix) == 4 and all(len(row) == 8 for row in gene.mix))
    assert [found.phase for found in search.archive] == [PRUNING] * 8 + [MERGING] * 6


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_what_is_judged_is_what_is_written(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(searching(active=1 if kind != "deepseek_v3" else None, merge=25, prune=4, judged=1), checkpoint(kind), tmp_path / "out")
    (first, *_) = found = records(tmp_path / "out")
    assert any(record["mixed"] for record in found) and all(record["after"] == record["before"] // 2 for record in found)
    samples = calibration("demo:text", 8, 48, 0, Tokenizer(checkpoint(kind)))
    seen, held = divided(samples, 0.5, "eep")
    for folder, when, near in ((checkpoint(kind), "before", 1e-6), (tmp_path / "out", "after", 1e-5)):
        model = Model(Layout(Checkpoint(folder)))
        assert -mean_loss(model, seen) == pytest.approx(first["fitness"][when], abs=near)
        assert -mean_loss(model, held) == pytest.approx(first["held_out"][when], abs=near)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    losses = [plain(input_ids=item.ids[None], labels=item.ids[None]).loss for item in held.items]
    assert -float(torch.stack(losses).mean()) == pytest.approx(first["held_out"]["after"], abs=2e-4)


def test_the_search_ends_no_worse_than_it_starts(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(searching(), checkpoint("mixtral"), tmp_path / "out")
    for record in records(tmp_path / "out"):
        assert record["fitness"]["best"] >= record["fitness"]["one_shot"]
        assert record["evaluated"] <= 5 + 2 + 6 + 8


def test_fewer_active_experts_are_searched_for_with_all_of_them(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plain = {"eep": {"keep": 1.0, "active": 1, "merge": 12, "judged": 4}}
    compress(QUICK | {"passes": [plain]}, checkpoint("qwen3_moe"), tmp_path / "out")
    for record in records(tmp_path / "out"):
        assert record["after"] == 8 and record["active"] == 1 and record["fitness"]["best"] >= record["fitness"]["one_shot"]


@torch.no_grad()
def test_pairs_are_judged_sentence_by_sentence(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe")
    pairs = sentence_pairs(str(pairs_file(tmp_path / "pairs.jsonl")), Tokenizer(folder))
    plain = tiny.plain(folder)
    scores = [float(plain(input_ids=item.ids[None]).logits[0, :-1].log_softmax(-1).gather(1, item.ids[1:, None]).sum()) for item in pairs.items]
    apart = torch.tensor([good - bad for good, bad in zip(scores[::2], scores[1::2], strict=True)])
    with opened(Model(Layout(Checkpoint(folder)))) as whole:
        mixture = Mixture(whole, [[0], [1]], None)
        assert mixture.fitness(None, pairs, accuracy) == float((apart > 0).float().mean())
        assert mixture.fitness(None, pairs, margin) == pytest.approx(float(torch.nn.functional.logsigmoid(apart).mean()), rel=1e-4)
        worse = mixture.fitness((Gene((0, 1)), Gene((2, 3))), pairs, margin)
        assert worse != mixture.fitness(None, pairs, margin) == pytest.approx(float(torch.nn.functional.logsigmoid(apart).mean()), rel=1e-4)


def test_a_task_is_searched_for(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    steps = searching(fitness="margin", pairs=str(pairs_file(tmp_path / "pairs.jsonl")), first=6, groups=1)
    compress(steps, checkpoint("qwen3_moe"), tmp_path / "out")
    assert {tuple(record["kept"]) for record in records(tmp_path / "out")} == {tuple(records(tmp_path / "out")[0]["kept"])}


@pytest.mark.parametrize(("mode", "reports"), [*(("foldable", number) for number in (0, 1, 3, 9, 20, 23)), ("full", 9), ("full", 20)])
def test_a_killed_run_goes_on_to_the_same_bytes(mode: str, reports: int, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(searching(mode=mode), checkpoint("qwen3_moe"), tmp_path / "undisturbed")
    with pytest.raises(Killed):
        compress(searching(mode=mode), checkpoint("qwen3_moe"), tmp_path / "out", KillAfter(reports))
    compress(searching(mode=mode), checkpoint("qwen3_moe"), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fitness": "accuracy"}, "fitness: accuracy does not go with pairs: None"),
        ({"pairs": "demo:pairs"}, "fitness: likelihood does not go with pairs: demo:pairs"),
        ({"first": 8}, "first: is an option of pairs"),
        ({"groups": 5}, "groups: 5 of 2 blocks with experts"),
        ({"keep": 1.0}, "prune: there is nothing to choose where all experts stay"),
        ({"keep": 0.125}, "2 experts are to serve a token, but only 1 stay"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError) as caught:
        recipe.check(recipe.validate(searching(**options), "r.yaml"), Layout(Checkpoint(checkpoint("qwen3_moe"))), "r.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("first", "evaluation", "message"),
    [
        (None, {}, "evaluate.pairs: eep learns from all pairs of"),
        (6, {}, "evaluate.skip_pairs: eep learns from the first 6 pairs; set it to 6 or more"),
        (6, {"skip_pairs": 5}, "evaluate.skip_pairs: eep learns from the first 6 pairs; set it to 6 or more"),
        (6, {"skip_pairs": 8}, "evaluate: skip_pairs: leaves none of the 8 pairs of"),
        (6, {"skip_pairs": 2, "pairs": None}, "evaluate.skip_pairs: is an option of pairs"),
    ],
)
def test_a_search_is_not_judged_by_what_it_has_seen(
    first: int | None, evaluation: dict[str, Any], message: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pairs = str(pairs_file(tmp_path / "pairs.jsonl"))
    steps = searching(fitness="margin", pairs=pairs, **({"first": first} if first else {}))
    judged = {"data": "demo:heldout", "context": 64, "windows": 2, "pairs": pairs}
    with pytest.raises(InputError) as caught:
        compress(steps | {"evaluate": judged | evaluation}, checkpoint("qwen3_moe"), tmp_path / "out")
    assert message in str(caught.value)


def test_it_is_judged_by_the_pairs_that_are_left(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pairs = str(pairs_file(tmp_path / "pairs.jsonl"))
    evaluation = {"data": "demo:heldout", "context": 64, "windows": 2, "pairs": pairs, "skip_pairs": 6}
    result = compress(searching(fitness="margin", pairs=pairs, first=6) | {"evaluate": evaluation}, checkpoint("qwen3_moe"), tmp_path / "out")
    assert result["evaluation"]["protocol"]["accuracy"].startswith(f"share of the 2 pairs of {pairs} from number 7 on")


def test_a_part_of_the_pairs_has_of_everything_that_a_file_is_sorted_by(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"good": f"{kind} {number} good", "bad": f"{kind} {number} bad"} for kind in ("cat", "dog") for number in range(50)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer(checkpoint("qwen3_moe"))
    pairs = sentence_pairs(str(path), tokenizer).items
    first = [tuple(tokenizer.encode(row["good"])) for row in rows[:50]]
    share = sum(tuple(item.ids.tolist()) in first for item in pairs[:50:2])
    assert 5 < share < 20 and len(pairs) == 200
    assert [item.ids.tolist() for item in sentence_pairs(str(path), tokenizer).items] == [item.ids.tolist() for item in pairs]
