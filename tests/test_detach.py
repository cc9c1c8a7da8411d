"""Detaching: the weights that cost most, never for the worse, and an artifact that is whole with residuals and without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import KillAfter, Killed, compress, contents
from torch import Tensor

from compress import data, recipe
from compress.backsweep import mean_loss
from compress.block import Block
from compress.checkpoint import RESIDUALS, Checkpoint
from compress.data import Samples, Tokenizer
from compress.errors import InputError
from compress.inspection import inspect
from compress.layout import Layout
from compress.model import Model
from compress.planning import plan
from compress.source import demo_model

SMALL: dict[str, Any] = {"calibration": {"samples": 12, "length": 64}, "evaluate": None, "verify": "streamed"}
WHOLE = SMALL | {"evaluate": {"context": 64, "windows": 6}, "verify": "full"}
CODES = {"rtn": {"bits": 3, "group_size": 128}}


def detached(model: Path | str, out: Path, *, base: dict[str, Any] = CODES, progress: Any = None, **options: Any) -> dict[str, Any]:
    return compress(SMALL | {"passes": [base, {"detach": options}]}, model, out, progress)


def opened(folder: Path) -> Model:
    return Model(Layout(Checkpoint(folder)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Report and artifact of the trained model at 3 bits with residuals."""
    out = tmp_path_factory.mktemp("detach") / "out"
    return compress(WHOLE | {"passes": [CODES, {"detach": {}}]}, "demo:dense", out), out


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of the same recipe without the pass."""
    out = tmp_path_factory.mktemp("coded") / "out"
    compress(SMALL | {"passes": [CODES]}, "demo:dense", out)
    return out


def summary(result: dict[str, Any]) -> dict[str, Any]:
    return next(record for record in result["transforms"] if record["name"] == "detach")


def test_parts_add_up_to_the_change_of_the_loss_and_residuals_lower_it(made: tuple[dict[str, Any], Path], coded: Path) -> None:
    record = summary(made[0])
    assert abs(record["completeness"] - 1) <= 0.03 and record["points"] == 2 and record["fallback"] is None
    assert record["loss"]["with residuals"] < record["loss"]["quantised"]
    samples = data.calibration("demo:text", 12, 64, 0, Tokenizer(demo_model("demo:dense")))
    for name, model in (("before", demo_model("demo:dense")), ("quantised", coded), ("with residuals", made[1])):
        assert mean_loss(opened(model), samples) == pytest.approx(record["loss"][name], abs=1e-6)


def test_as_many_weights_as_asked_for_differ_from_what_the_codes_say(made: tuple[dict[str, Any], Path], coded: Path) -> None:
    model, codes = opened(made[1]), opened(coded)
    entries = 0
    for linear in model.layout.linears:
        residual = model.residual(linear)
        assert residual is not None
        entries += len(residual.values)
        same = torch.ones(residual.shape, dtype=torch.bool)
        same[residual.rows, residual.columns] = False
        assert torch.equal(model.dense(linear)[same], codes.dense(linear)[same])
        assert torch.equal(model.in_engines().dense(linear), codes.dense(linear))
    assert entries == int(0.005 * 3_145_728) == sum(record["residuals"] for record in made[0]["linears"])
    assert {record["pass"] for record in made[0]["linears"]} == {"rtn + detach"}


def test_without_its_residuals_the_artifact_is_the_one_of_the_codes(made: tuple[dict[str, Any], Path], coded: Path) -> None:
    mine, theirs = contents(made[1]), contents(coded)
    assert {name for name in mine if mine[name] != theirs.get(name)} == {"README.md", "manifest.json", "recipe.yaml", "config.json", RESIDUALS}
    config = json.loads((made[1] / "config.json").read_text())
    assert config["quantization_config"].pop("residuals") == RESIDUALS
    assert config == json.loads((coded / "config.json").read_text())


def test_engines_that_leave_residuals_out_are_told_from_those_that_do_not(made: tuple[dict[str, Any], Path]) -> None:
    result, out = made
    assert result["engines"]["compress"] == "loads" and result["engines"]["transformers"].startswith("without residuals; loads")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["loadable_by"] == ["compress"] and manifest["loadable_without_residuals_by"] == ["transformers", "vLLM"]
    assert RESIDUALS in manifest["files"] and "leave out what lies in `residuals/`" in (out / "README.md").read_text()
    assert result["verification"]["mode"] == "full" and result["verification"]["residuals_left_out"]
    assert result["evaluation"]["without_residuals"]["kl"] > result["evaluation"]["compressed"]["kl"]


def test_residuals_are_counted_as_they_were_planned(made: tuple[dict[str, Any], Path]) -> None:
    result, out = made
    size = result["size"]
    assert size["bits_per_weight"] == pytest.approx(3 + 16 / 128 + 0.005 * 32 + 32 * (4 * 2560 + 28) / 3_145_728, abs=1e-4)
    layout = Layout(Checkpoint(demo_model("demo:dense")))
    wanted = recipe.validate(SMALL | {"passes": [CODES, {"detach": {}}]}, "r")
    planned = plan(wanted, layout, recipe.check(wanted, layout, "r"))
    assert planned["size"]["bits_per_weight"] == pytest.approx(size["bits_per_weight"], rel=1e-3)
    assert planned["size"]["after_bytes"] == pytest.approx(size["after_bytes"], rel=1e-4) and planned["passes"][1]["disk_bytes"] > 4 * 3_145_728
    became = {item["name"]: item["became"] for item in inspect(out)["tensors"]}
    assert became["model.layers.0.self_attn.v_proj"].endswith("residuals") and not any("sparse" in name for name in became)


def test_an_artifact_without_the_residuals_it_declares_is_refused(made: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(made[1] / name)
    with pytest.raises(InputError, match=r"residuals\.safetensors: cannot be read"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text((made[1] / "config.json").read_text().replace(RESIDUALS, "../elsewhere.safetensors"))
    with pytest.raises(InputError, match=r"quantization_config\.residuals: names '\.\./elsewhere\.safetensors'"):
        Checkpoint(tmp_path)


# Which weights ----------------------------------------------------------------------------------------------------------------------


class Bed:
    """The trained model rounded to 3 bits, its gradients in memory, and text to judge on that they were not taken from."""

    def __init__(self, coded: Path) -> None:
        from compress.attribution import Attribution
        from compress.numerics.quadrature import gauss_legendre

        self.model, tokenizer = opened(demo_model("demo:dense")), Tokenizer(demo_model("demo:dense"))
        self.exact = {name: self.model.dense(name).float() for name in self.model.layout.linears}
        codes = opened(coded)
        self.rounded = {name: codes.dense(name).float() for name in self.exact}
        self.held: Samples = data.windows("demo:heldout", 128, 8, tokenizer, "held")
        self.samples = data.calibration("demo:text", 24, 128, 0, tokenizer)
        self._attribution, self._places = Attribution, gauss_legendre(2)

    def ends(self, block: Block) -> dict[str, tuple[Tensor, Tensor]]:
        return {linear.name: (self.exact[linear.name], self.rounded[linear.name]) for linear in block.layout.linears}

    def parts(self, folder: Path) -> dict[str, Tensor]:
        """What each weight's rounding did to the loss."""
        attribution = self._attribution(folder, self.ends, self._places)
        attribution.measure(self.model, self.samples, lambda: None)
        found: dict[str, Tensor] = {}
        for layout in self.model.blocks:
            with self.model.block(layout.index) as block:
                found |= attribution.of(block)
        return found

    def excess(self, scores: dict[str, Tensor], share: float) -> float:
        """How much is lost on held-out text with the given share of all weights, those with the largest scores, as they were."""
        every = torch.cat([score.flatten() for score in scores.values()])
        threshold = every.topk(int(share * len(every))).values.min()

        def weights(block: Block) -> dict[str, Tensor]:
            return {name: torch.where(scores[name] >= threshold, before, after) for name, (before, after) in self.ends(block).items()}

        return mean_loss(self.model, self.held, weights) - mean_loss(self.model, self.held)


def test_the_costliest_weights_are_worth_more_than_any_and_signs_mislead(coded: Path, tmp_path: Path) -> None:
    bed = Bed(coded)
    parts = bed.parts(tmp_path / "path")
    share = 0.005
    costliest = bed.excess({name: part.abs() for name, part in parts.items()}, share)
    arbitrary = bed.excess({name: torch.rand_like(part) for name, part in parts.items()}, share)
    signed = bed.excess(parts, share)
    assert costliest <= 0.97 * arbitrary and signed > costliest


# Never for the worse, always the same -----------------------------------------------------------------------------------------------


def test_residuals_that_raise_the_loss_are_not_stored_and_that_is_recorded(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = detached(checkpoint("llama"), tmp_path / "out", base={"rtn": {"bits": 3, "group_size": 32}}, score="random", share=0.1)
    record = summary(result)
    assert record["loss"]["with residuals"] >= record["loss"]["quantised"] and result["fallbacks"] == [record]
    assert record["fallback"].startswith("residuals would take the calibration loss from ")
    assert not (tmp_path / "out" / RESIDUALS).exists() and "residuals" not in (tmp_path / "out" / "README.md").read_text()
    assert (
        "compress" not in result["engines"] and "residuals" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    )
    assert all("residuals" not in item["why"] for item in result["ledger"])


@pytest.mark.parametrize("score", ["taylor", "deltaloss", "random"])
def test_weights_that_are_restored_are_as_they_were(score: str, tmp_path: Path) -> None:
    result = detached("demo:moe", tmp_path / "out", base={"rtn": {"bits": 2, "group_size": 64}}, score=score, values="restored", share=0.02)
    record, model, source = summary(result), opened(tmp_path / "out"), opened(demo_model("demo:moe"))
    assert (record["score"], record["completeness"], record["fallback"]) == (score, None, None)
    for linear in model.layout.linears:
        if residual := model.residual(linear):
            at = residual.rows, residual.columns
            assert torch.allclose(model.dense(linear)[at].float(), source.dense(linear)[at].float(), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        ("qwen3_moe", {"gptq": {"bits": 3, "group_size": 32, "min_tokens": 0, "fallback": "round"}}),
        ("llama-tied", {"rtn": {"format": "int", "bits": 8, "group_size": "channel", "activations": "dynamic"}}),
        ("llava", {"rtn": {"format": "nvfp4"}}),
    ],
    ids=["experts", "rounded inputs", "small floats"],
)
def test_residuals_go_with_every_layout_of_codes(kind: str, base: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compress(SMALL | {"passes": [base, {"detach": {"share": 0.02}}], "verify": "full"}, checkpoint(kind), tmp_path / "out")
    record, model = summary(result), opened(tmp_path / "out")
    assert (record["fallback"] is None) == ("residuals" in model.left_out) == (record["loss"]["with residuals"] < record["loss"]["quantised"])
    assert result["verification"]["mode"] == "full"


THREE = {"base": {"rtn": {"bits": 3, "group_size": 32}}, "share": 0.02}


@pytest.fixture(scope="module")
def unbroken(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    result = detached(checkpoint("llama-3-blocks"), out, **THREE)
    assert summary(result)["fallback"] is None and summary(result)["points"] == 4
    return contents(out)


@pytest.mark.parametrize("reports", [5, 12, 25, 38, 50, 53, 57])
def test_a_run_killed_anywhere_continues_to_the_same_bytes(
    reports: int, checkpoint: Callable[..., Path], unbroken: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        detached(checkpoint("llama-3-blocks"), tmp_path / "out", progress=KillAfter(reports), **THREE)
    detached(checkpoint("llama-3-blocks"), tmp_path / "out", **THREE)
    assert contents(tmp_path / "out") == unbroken


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([{"detach": {}}, CODES], r"passes\[0\]\.detach: no linear is quantised before it; put it behind the passes that quantise"),
        ([CODES, {"detach": {}}, {"detach": {"share": 0.01}}], r"passes\[2\]\.detach: a pass before it has stored residuals already"),
        ([CODES, {"detach": {"share": 0}}], r"passes\[1\]\.detach: share"),
    ],
)
def test_what_cannot_be_detached_is_refused_before_weights_load(passes: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe.check(recipe.validate(SMALL | {"passes": passes}, "r"), Layout(Checkpoint(demo_model("demo:dense"))), "r")


def test_tasks_are_refused_which_would_run_in_engines() -> None:
    plain = SMALL | {"passes": [CODES, {"detach": {}}], "evaluate": {"tasks": ["arc_easy"]}}
    with pytest.raises(InputError, match=r"evaluate\.tasks: lm-eval runs the artifact in transformers, which leaves residuals out"):
        recipe.check(recipe.validate(plain, "r"), Layout(Checkpoint(demo_model("demo:dense"))), "r")
