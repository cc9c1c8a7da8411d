"""Whole runs: what comes out, what is left when one fails, and that a killed one continues to the same bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracles import evaluation as oracle
from safetensors.torch import load_file, save_file

from compress import demo, pipeline, recipe
from compress.calibrate import Inputs
from compress.checkpoint import INDEX, SINGLE, Checkpoint
from compress.data import Tokenizer
from compress.errors import InputError
from compress.export import compressed_tensors
from compress.formats import pack_quantized
from compress.layout import Group, Layout, Linear
from compress.model import Model
from compress.passes import gptq
from compress.report.records import tensor_bytes

QUICK: dict[str, Any] = {
    "calibration": {"samples": 4, "length": 48},
    "evaluate": None,
    "passes": [{"gptq": {"bits": 4, "group_size": 32, "min_tokens": 0}}],
}
DEMO: dict[str, Any] = {"calibration": {"samples": 16, "length": 128}, "evaluate": {"context": 64, "windows": 4}}
UNREPEATABLE = ("report.json", "report.html")
NEVER = {"gptq": {"bits": 4, "group_size": 32, "min_tokens": 0, "fallback": "round"}}


ALSO = {"gptq": {"min_tokens": 0, "fallback": "round"}, "autoround": {"min_tokens": 0, "fallback": "round", "steps": 3}}


class Killed(BaseException):
    """What a signal would do."""


class KillAfter(tiny.Silent):
    """Progress that dies once a number of reports about blocks were made."""

    def __init__(self, reports: int) -> None:
        self.left = reports

    def blocks(self, done: int, total: int) -> None:
        if not self.left:
            raise Killed
        self.left -= 1


def compress(plain: dict[str, Any], model: Path | str, out: Path, progress: tiny.Silent | None = None, overwrite: bool = False) -> dict[str, Any]:
    request = pipeline.Request(recipe.validate(plain, "r.yaml"), "r.yaml", str(model), out, out.with_name(out.name + ".work"), overwrite)
    return pipeline.run(request, progress or tiny.Silent())


def with_pass(name: str, **options: Any) -> dict[str, Any]:
    return QUICK | {"passes": [{name: {"group_size": 32} | ALSO.get(name, {}) | options}]}


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file that two runs must share."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in UNREPEATABLE
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[dict[str, Any], Path]]:
    """Report and artifact of the trained dense model by pass and bits; each made once."""
    made: dict[tuple[str, int], tuple[dict[str, Any], Path]] = {}

    def make(name: str, bits: int) -> tuple[dict[str, Any], Path]:
        if (name, bits) not in made:
            out = tmp_path_factory.mktemp(f"{name}{bits}") / "out"
            made[name, bits] = compress(DEMO | {"passes": [{name: {"bits": bits, "group_size": 128}}]}, "demo:dense", out), out
        return made[name, bits]

    return make


# What comes out ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_architecture_makes_an_artifact_that_plain_transformers_opens(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    options = {"exclude": ["*.experts.*"]} if kind == "gpt_oss" else {}  # whose experts it reads in no other form than together
    result = compress(with_pass("gptq", **options) | {"verify": "full"}, checkpoint(kind), tmp_path / "out")
    assert result["accepted"] and result["verification"]["logits_max_difference"] < 1e-3


@pytest.mark.parametrize(
    "options", [{"bits": bits} for bits in range(2, 9)] + [{"bits": bits, "symmetric": False} for bits in (2, 3, 4, 5, 8)], ids=str
)
@pytest.mark.parametrize("name", ["rtn", "gptq", "autoround"])
def test_every_width_of_grid_is_read_back_by_compressed_tensors_bit_for_bit(
    name: str, options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    result = compress(with_pass(name, **options) | {"verify": "streamed"}, checkpoint("llama", torch.bfloat16), tmp_path / "out")
    assert result["verification"]["weights_unpacked_by_compressed_tensors"] == 14


@pytest.mark.parametrize(
    "options", [{"symmetric": False}, {"group_size": "channel"}, {"group_size": "channel", "symmetric": False, "bits": 8}], ids=str
)
@pytest.mark.parametrize("name", ["rtn", "gptq", "autoround"])
def test_every_form_of_grid_makes_an_artifact_that_plain_transformers_opens(
    name: str, options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    assert compress(with_pass(name, **options) | {"verify": "full"}, checkpoint("llama"), tmp_path / "out")["verification"]["mode"] == "full"


@pytest.mark.parametrize("indivisible", ["keep", "channel"])
@pytest.mark.parametrize("name", ["rtn", "gptq", "autoround"])
def test_an_indivisible_width_makes_an_artifact_that_plain_transformers_opens(
    name: str, indivisible: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    compress(with_pass(name, group_size=64, indivisible=indivisible) | {"verify": "full"}, checkpoint("llama-688"), tmp_path / "out")
    down = "model.layers.0.mlp.down_proj"
    stored = {name.removeprefix(down + "."): tuple(tensor.shape) for name, tensor in weights(tmp_path / "out").items() if name.startswith(down)}
    assert stored == ({"weight": (64, 688)} if indivisible == "keep" else {"weight_packed": (64, 86), "weight_scale": (64, 1), "weight_shape": (2,)})


def test_two_passes_share_the_linears_between_them(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    steps = [
        {"rtn": {"bits": 8, "group_size": 32, "exclude": ["*.mlp.*"]}},
        {"gptq": {"bits": 3, "group_size": 32, "include": ["*.mlp.*"], "min_tokens": 0}},
    ]
    result = compress(QUICK | {"passes": steps, "verify": "full"}, checkpoint("llama"), tmp_path / "out")
    assert {(record["pass"], record["bits"]) for record in result["linears"]} == {("rtn", 8), ("gptq", 3)}


def test_searched_scales_lose_less_than_the_range(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    errors = [
        sum(record["error"] for record in compress(with_pass("rtn", bits=3, scales=scales), checkpoint("llama"), tmp_path / scales)["linears"])
        for scales in ("mse", "minmax")
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_less_than_plain_rounding_on_a_trained_model(bits: int, trained: Callable[[str, int], tuple[dict[str, Any], Path]]) -> None:
    assert trained("gptq", bits)[0]["evaluation"]["compressed"]["kl"] < trained("rtn", bits)[0]["evaluation"]["compressed"]["kl"]


def test_more_bits_lose_less(trained: Callable[[str, int], tuple[dict[str, Any], Path]]) -> None:
    lost = [trained("gptq", bits)[0]["evaluation"]["compressed"]["kl"] for bits in (4, 3, 2)]
    assert lost == sorted(lost)


@pytest.mark.parametrize(("side", "which"), [("baseline", "source"), ("compressed", "artifact")])
def test_reported_perplexity_is_that_of_a_plain_loop(side: str, which: str, trained: Callable[[str, int], tuple[dict[str, Any], Path]]) -> None:
    report, out = trained("gptq", 4)
    folder = out if which == "artifact" else demo.path("dense")
    ids = Tokenizer(demo.path("dense")).encode(demo.data_path("heldout").read_text()[:8000])
    opened = tiny.plain(folder, getattr(torch, report["evaluation"]["protocol"]["dtype"]))
    assert report["evaluation"][side]["perplexity"] == pytest.approx(oracle.perplexity(opened, ids, 64, 4), rel=1e-3)


def test_the_ledger_holds_every_tensor_of_the_source_exactly_once(trained: Callable[[str, int], tuple[dict[str, Any], Path]]) -> None:
    names = [item["name"] for item in trained("gptq", 4)[0]["ledger"]]
    assert sorted(names) == sorted(Checkpoint(demo.path("dense")).tensors)


def test_what_the_ledger_calls_kept_is_byte_for_byte_the_same(trained: Callable[[str, int], tuple[dict[str, Any], Path]]) -> None:
    report, out = trained("gptq", 4)
    before, after = weights(demo.path("dense")), weights(out)
    assert all(torch.equal(before[item["name"]], after[item["name"]]) for item in report["ledger"] if item["action"] == "kept")


def test_the_ledger_calls_quantised_what_is_packed(trained: Callable[[str, int], tuple[dict[str, Any], Path]]) -> None:
    report, out = trained("gptq", 4)
    packed = {name.replace("weight_packed", "weight") for name in weights(out) if name.endswith("weight_packed")}
    assert {item["name"] for item in report["ledger"] if item["action"] == "quantized"} == packed


def test_the_manifest_hashes_every_file(trained: Callable[[str, int], tuple[dict[str, Any], Path]]) -> None:
    out = trained("gptq", 4)[1]
    expected = contents(out)
    expected.pop("manifest.json")
    assert json.loads((out / "manifest.json").read_text())["files"] == expected


def test_the_report_on_disk_is_the_one_returned(trained: Callable[[str, int], tuple[dict[str, Any], Path]]) -> None:
    report, out = trained("gptq", 4)
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))


def test_bits_per_weight_are_those_of_the_files(trained: Callable[[str, int], tuple[dict[str, Any], Path]]) -> None:
    report, out = trained("gptq", 4)
    stored = sum(tensor.nbytes for name, tensor in weights(out).items() if name.endswith(("_packed", "_scale", "_zero_point")))
    assert report["size"]["bits_per_weight"] == pytest.approx(8 * stored / report["size"]["quantized_weights"]) == pytest.approx(4 + 16 / 128)


def test_the_recipe_in_the_artifact_has_the_hash_of_the_manifest(trained: Callable[[str, int], tuple[dict[str, Any], Path]]) -> None:
    out = trained("gptq", 4)[1]
    assert recipe.load(out / "recipe.yaml").hash == json.loads((out / "manifest.json").read_text())["recipe_hash"]


def test_nothing_of_the_work_folder_is_left(trained: Callable[[str, int], tuple[dict[str, Any], Path]]) -> None:
    out = trained("gptq", 4)[1]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_artifact_is_refused_as_a_source(trained: Callable[[str, int], tuple[dict[str, Any], Path]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"already quantised \(compressed-tensors\)"):
        compress(QUICK, trained("gptq", 4)[1], tmp_path / "out")


def test_tied_embeddings_stay_tied(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(with_pass("rtn") | {"verify": "full"}, checkpoint("llama-tied"), tmp_path / "out")
    opened = tiny.plain(tmp_path / "out")
    assert opened.lm_head.weight.data_ptr() == opened.model.embed_tokens.weight.data_ptr() and "lm_head.weight" not in weights(tmp_path / "out")


def test_other_files_are_carried_byte_for_byte(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy()
    for name, content in {"LICENSE": b"\x00\xff free", "chat_template.jinja": b"{{ x }}", "README.md": b"# the source"}.items():
        (folder / name).write_bytes(content)
    compress(with_pass("rtn"), folder, tmp_path / "out")
    carried = {
        "LICENSE": "LICENSE",
        "chat_template.jinja": "chat_template.jinja",
        "README.md": "README.source.md",
        "tokenizer.json": "tokenizer.json",
    }
    assert all((folder / source).read_bytes() == (tmp_path / "out" / target).read_bytes() for source, target in carried.items())


def test_an_artifact_in_several_shards_is_the_same_model(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress(with_pass("rtn"), checkpoint("llama"), tmp_path / "one")
    monkeypatch.setattr(compressed_tensors, "SHARD_BYTES", 100_000)
    compress(with_pass("rtn") | {"verify": "full"}, checkpoint("llama"), tmp_path / "many")
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert (tmp_path / "many" / INDEX).exists() and one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


def test_other_weights_and_unlisted_tensors_are_left_behind_and_said_so(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy()
    (folder / "old.bin").write_bytes(b"x")
    path = sorted(folder.glob("model-*"))[0]
    save_file(load_file(path) | {"stowaway": torch.zeros(1)}, path, {"format": "pt"})
    ledger = compress(with_pass("rtn"), folder, tmp_path / "out")["ledger"]
    assert {item["name"] for item in ledger if item["action"] == "dropped"} == {"old.bin", "stowaway"} and not (tmp_path / "out" / "old.bin").exists()


@pytest.mark.parametrize(("bound", "accepted"), [({"max": 0.5}, False), ({"max": 1.0}, True)])
def test_a_gate_decides_but_the_artifact_is_kept(bound: dict[str, float], accepted: bool, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    result = compress(with_pass("rtn", bits=8) | {"gates": {"size_ratio": bound}}, checkpoint("llama"), tmp_path / "out")
    assert (result["accepted"], json.loads((tmp_path / "out" / "manifest.json").read_text())["accepted"]) == (accepted, accepted)


# Experts that saw too little --------------------------------------------------------------------------------------------------------


def test_a_starved_expert_stops_the_run_by_name_and_tokens(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plain = QUICK | {
        "calibration": {"samples": 1, "length": 8},
        "passes": [{"gptq": {"group_size": 32, "min_tokens": 2 / 64, "include": ["*experts*"]}}],  # as many as there are on average
    }
    with pytest.raises(InputError, match=r"model\.layers\.0\.experts\.gate_up\.\d: saw \d+ of 8 calibration tokens, needs 2"):
        compress(plain, checkpoint("qwen3_moe"), tmp_path / "out")


def test_a_starved_expert_is_rounded_and_recorded_where_the_recipe_allows_it(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    options = {"group_size": 32, "min_tokens": 0.25, "include": ["*experts*"], "fallback": "round"}
    plain = QUICK | {"calibration": {"samples": 1, "length": 8}, "passes": [{"gptq": options}], "gates": {"fallbacks": {"max": 0}}, "verify": "full"}
    result = compress(plain, checkpoint("qwen3_moe"), tmp_path / "out")
    assert (
        not result["accepted"]
        and all(record["fallback"].startswith("saw ") for record in result["fallbacks"])
        and len(result["fallbacks"]) == len(result["linears"])
    )


def test_a_starved_expert_may_go_by_what_all_experts_saw(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    options = {"bits": 3, "group_size": 32, "include": ["*experts*"], "pool": True}
    result = compress(QUICK | {"passes": [{"gptq": options | {"min_tokens": 1e6}}]}, checkpoint("qwen3_moe"), tmp_path / "pooled")
    assert all(record["error"] is not None for record in result["linears"])
    assert all(re.fullmatch(r"saw \d+ of \d+ .*; filled up with those of all experts", record["fallback"]) for record in result["linears"])
    assert len(result["fallbacks"]) == len(result["linears"]) > 0


def test_what_an_expert_lacks_is_the_mean_of_all() -> None:
    groups = tuple(Group(f"g.{number}", (Linear(f"e.{number}", 4, 8),), number) for number in range(3))
    before = torch.rand(3, 8, 8)
    inputs: Any = Inputs(None, groups, before.clone(), (16, 0, 2), 20, (None,) * 3)  # type: ignore[arg-type]
    found = gptq.Pass(pool=True, min_tokens=1.0)._fill(inputs)
    assert found.keys() == {1, 2} and found[2] == "saw 2 of 20 calibration tokens, needs 8; filled up with those of all experts"
    mean = (16 * before[0] + 2 * before[2]) / 18
    assert inputs.hessian[0].equal(before[0])
    assert torch.allclose(inputs.hessian[1], mean) and torch.allclose(inputs.hessian[2], before[2] / 4 + mean * 3 / 4)


def test_a_fallback_rounds_as_rtn_would(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    options = {"bits": 3, "group_size": 32, "include": ["*experts*"]}
    folder = checkpoint("qwen3_moe")
    compress(QUICK | {"passes": [{"gptq": options | {"min_tokens": 1e6, "fallback": "round", "scales": "minmax"}}]}, folder, tmp_path / "gptq")
    compress(QUICK | {"passes": [{"rtn": options}]}, folder, tmp_path / "rtn")
    one, other = weights(tmp_path / "gptq"), weights(tmp_path / "rtn")
    assert all(torch.equal(one[name], other[name]) for name in other)


# The same bytes every time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "llava"])
def test_a_second_run_gives_the_same_bytes(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        compress(with_pass("gptq"), checkpoint(kind), tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


TWO_PASSES = QUICK | {"passes": [{"gptq": NEVER["gptq"] | {"exclude": ["*.mlp.*"]}}, {"gptq": NEVER["gptq"] | {"include": ["*.mlp.*"], "bits": 3}}]}


@pytest.fixture(scope="session")
def unbroken(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """Contents of an artifact of three blocks whose run was not disturbed, by recipe."""
    made: dict[str, dict[str, str]] = {}

    def make(which: str) -> dict[str, str]:
        if which not in made:
            out = tmp_path_factory.mktemp("unbroken") / "out"
            compress(RESUMED[which], checkpoint("llama-3-blocks"), out)
            made[which] = contents(out)
        return made[which]

    return make


RESUMED = {
    "gptq": with_pass("gptq"),
    "qep": with_pass("gptq", qep=0.5),
    "autoround": with_pass("autoround"),
    "rtn": with_pass("rtn"),
    "two passes": TWO_PASSES,
    "smooth": QUICK | {"passes": [{"smooth": {}}, {"rtn": {"bits": 3, "group_size": 32}}]},
    "smooth_keys": QUICK | {"passes": [{"smooth_keys": {}}, {"rtn": {"bits": 3, "group_size": 32}}]},
    "rotate": QUICK | {"passes": [{"rotate": {}}, {"rtn": {"bits": 3, "group_size": 32}}]},
    "kv_quant": QUICK | {"passes": [{"rtn": {"group_size": 32}}, {"kv_quant": {}}]},
    "kv_shrink": QUICK | {"passes": [{"rtn": {"group_size": 32}}, {"kv_shrink": {"multiple_of": 4, "ranks": "water_filling", "tune": 2}}]},
    "prune_structured": QUICK | {"passes": [{"prune_structured": {"keep": 0.5, "multiple_of": 32}}, {"rtn": {"group_size": 32}}]},
    "prune_depth": QUICK | {"passes": [{"prune_depth": {"drop": 2}}, {"rtn": {"group_size": 32}}]},
    "low_rank": QUICK | {"passes": [{"low_rank": {"multiple_of": 32, "keep": 0.95}}, {"rtn": {"group_size": 32}}]},
    "mla": QUICK | {"passes": [{"mla": {"rope": 16, "rank": 32}}, {"rtn": {"group_size": 32}}]},
    "prune_nm": QUICK | {"passes": [{"prune_nm": {"min_tokens": 0, "permute": True, "refit": True}}, NEVER]},
}
REPORTS = {
    "gptq": 4,
    "qep": 4,
    "autoround": 4,
    "rtn": 3,
    "two passes": 8,
    "smooth": 7,
    "smooth_keys": 7,
    "rotate": 6,
    "kv_quant": 7,
    "kv_shrink": 11,
    "prune_structured": 9,
    "prune_depth": 7,
    "low_rank": 11,
    "mla": 10,
    "prune_nm": 8,
}


@pytest.mark.parametrize("which", [*RESUMED, "experts"])
def test_the_ledger_accounts_for_every_byte_before_and_after(which: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    experts = {"passes": [{"prune_experts": {"keep": 0.5}}, {"rtn": {"group_size": 32}}]}
    report = compress(
        QUICK | experts if which == "experts" else RESUMED[which], checkpoint("mixtral" if which == "experts" else "llama-3-blocks"), tmp_path / "out"
    )
    source = [item for item in report["ledger"] if item["action"] != "added"]
    assert sum(tensor_bytes(item) for item in source) == report["size"]["before_bytes"]
    assert sum(item["stored_bytes"] for item in report["ledger"]) == report["size"]["after_bytes"] == Checkpoint(tmp_path / "out").nbytes


@pytest.mark.parametrize(("which", "reports"), [(which, reports) for which, count in REPORTS.items() for reports in range(count)])
def test_a_run_killed_after_any_block_continues_to_the_same_bytes(
    which: str, reports: int, checkpoint: Callable[..., Path], tmp_path: Path, unbroken: Callable[[str], dict[str, str]]
) -> None:
    with pytest.raises(Killed):
        compress(RESUMED[which], checkpoint("llama-3-blocks"), tmp_path / "out", KillAfter(reports))
    assert not (tmp_path / "out").exists()
    compress(RESUMED[which], checkpoint("llama-3-blocks"), tmp_path / "out")
    assert contents(tmp_path / "out") == unbroken(which)


@pytest.mark.parametrize("writes", range(7))
def test_a_run_killed_between_any_two_files_continues_to_the_same_bytes(
    writes: int, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Callable[[str], dict[str, str]]
) -> None:
    from compress import block, calibrate, model

    left = [writes]

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def write(*arguments: Any) -> None:
            if not left[0]:
                raise Killed
            left[0] -= 1
            real(*arguments)

        return write

    with monkeypatch.context() as patched:
        for module, name in ((block, "write_state"), (model, "write_state"), (calibrate, "write_state"), (compressed_tensors, "write_safetensors")):
            patched.setattr(module, name, counted(getattr(module, name)))
        if writes < 6:
            with pytest.raises(Killed):
                compress(RESUMED["gptq"], checkpoint("llama-3-blocks"), tmp_path / "out")
    compress(RESUMED["gptq"], checkpoint("llama-3-blocks"), tmp_path / "out")
    assert contents(tmp_path / "out") == unbroken("gptq")


def test_what_another_recipe_left_is_not_continued_from(
    checkpoint: Callable[..., Path], tmp_path: Path, unbroken: Callable[[str], dict[str, str]]
) -> None:
    with pytest.raises(Killed):
        compress(with_pass("gptq", bits=3), checkpoint("llama-3-blocks"), tmp_path / "out", KillAfter(2))
    compress(RESUMED["gptq"], checkpoint("llama-3-blocks"), tmp_path / "out")
    assert contents(tmp_path / "out") == unbroken("gptq")


# When it fails ----------------------------------------------------------------------------------------------------------------------


def test_nothing_is_left_at_the_target_if_the_source_is_damaged(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy()
    path = sorted(folder.glob("model-*"))[-1]
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match="NaN"):
        compress(with_pass("rtn"), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("syncs", [0, 1, 3, 6, 10])
def test_a_full_disk_is_an_input_error_and_the_run_continues_afterwards(
    syncs: int, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Callable[[str], dict[str, str]]
) -> None:
    real, left = os.fsync, [syncs]

    def sync(descriptor: int) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", sync)
        with pytest.raises(InputError, match="the disk is full; free some space; the same command then continues"):
            compress(RESUMED["gptq"], checkpoint("llama-3-blocks"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    compress(RESUMED["gptq"], checkpoint("llama-3-blocks"), tmp_path / "out")
    assert contents(tmp_path / "out") == unbroken("gptq")


def test_a_second_run_in_the_same_work_folder_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    class Second(tiny.Silent):
        def blocks(self, done: int, total: int) -> None:
            with pytest.raises(InputError, match=r"out\.work: another run is working here"):
                compress(with_pass("rtn"), checkpoint("llama"), tmp_path / "out")

    compress(with_pass("rtn"), checkpoint("llama"), tmp_path / "out", Second())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("fault", ["data", "pairs", "tasks"])
def test_faults_of_what_is_measured_on_are_told_before_any_block_is_made(fault: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\xd3\x00" if fault == "data" else b'{"good": 1}')
    options = {"tasks": [str(tmp_path / "none.yaml")]} if fault == "tasks" else {fault: str(tmp_path / "bad")}

    class Untouched(tiny.Silent):
        def blocks(self, done: int, total: int) -> None:
            raise AssertionError

    with pytest.raises(InputError, match="none.yaml" if fault == "tasks" else "/bad"):
        compress(with_pass("rtn") | {"evaluate": {"context": 64, "windows": 4} | options}, checkpoint("llama"), tmp_path / "out", Untouched())
    assert not list(tmp_path.glob("out*"))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_read(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 10**6))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"the disk has 0\.00 GB free, the run needs"):
        compress(with_pass("rtn"), checkpoint("llama"), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_artifact_is_not_replaced_unless_told_to(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out: exists already"):
        compress(with_pass("rtn"), checkpoint("llama"), tmp_path / "out")


def test_an_artifact_that_is_replaced_stays_until_the_new_one_is_whole(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("old")
    with pytest.raises(Killed):
        compress(with_pass("rtn"), checkpoint("llama"), tmp_path / "out", KillAfter(1), overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_a_replaced_artifact_is_gone(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for path in (tmp_path / "out", tmp_path / ".out.previous"):  # the second is what a kill in the last moment leaves
        path.mkdir()
        (path / "old").write_text("old")
        (path / "manifest.json").write_text("{}")
    compress(with_pass("rtn"), checkpoint("llama"), tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out" / "old").exists()


def test_a_folder_that_is_no_artifact_is_never_replaced(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photograph").write_text("dear")
    with pytest.raises(InputError, match="no artifact of ours"):
        compress(with_pass("rtn"), checkpoint("llama"), tmp_path / "out", overwrite=True)


def test_carried_files_that_are_called_like_ours_are_renamed(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    (source / "recipe.yaml").write_text("theirs")
    compress(with_pass("rtn"), source, tmp_path / "out")
    assert (tmp_path / "out" / "recipe.source.yaml").read_text() == "theirs"


def test_a_work_folder_that_holds_other_things_keeps_them(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    (work / "photographs").mkdir(parents=True)
    (work / "thesis.txt").write_text("irreplaceable")
    compress(with_pass("rtn"), checkpoint("llama"), tmp_path / "out")
    assert sorted(path.name for path in work.iterdir()) == ["photographs", "thesis.txt"]


def test_the_model_itself_is_never_replaced(copy: Callable[..., Path]) -> None:
    folder = copy()
    with pytest.raises(InputError, match="is the model itself"):
        compress(with_pass("rtn"), folder, folder, overwrite=True)


def test_a_target_that_cannot_be_made_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        compress(with_pass("rtn"), checkpoint("llama"), tmp_path / "file" / "out")


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_an_artifact_that_differs_from_what_was_meant_is_never_handed_over(
    part: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compressed_tensors.write

    def damaged(model: Any, plan: Any, cache: Any, folder: Path) -> None:
        real(model, plan, cache, folder)
        tensors = load_file(folder / SINGLE)
        next(tensor for name, tensor in tensors.items() if name.endswith(part)).view(-1)[-1] += 1
        save_file(tensors, folder / SINGLE, {"format": "pt"})

    monkeypatch.setattr(compressed_tensors, "write", damaged)
    with pytest.raises(InputError, match=f"{part}: reads back differently|unpacks other values"):
        compress(with_pass("rtn"), checkpoint("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_codes_of_an_artifact_are_the_weights_the_model_computes_with(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(with_pass("gptq"), checkpoint("llama"), tmp_path / "out")
    model, stored = Model(Layout(Checkpoint(tmp_path / "out"))), weights(tmp_path / "out")
    linear = "model.layers.1.mlp.down_proj"
    with model.block(1) as block:
        computed = block.submodule(linear).weight.clone()
    state = {name: tensor for name, tensor in stored.items() if name.startswith(linear + ".")}
    assert torch.equal(computed, pack_quantized.unpack(linear, state).dequantize())


def test_a_work_folder_that_cannot_serve_is_refused_before_anything_is_done(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "out").mkdir()
    shared = Path("/dev/shm")
    places = [tmp_path / "file", tmp_path / "file" / "in"]
    if shared.is_dir() and shared.stat().st_dev != tmp_path.stat().st_dev:
        places.append(shared / tmp_path.name)
    for work in places:
        request = pipeline.Request(recipe.validate(with_pass("rtn"), "r.yaml"), "r.yaml", str(checkpoint("llama")), tmp_path / "out", work, True)
        with pytest.raises(InputError, match=r"choose (another|a) --work"):
            pipeline.run(request, tiny.Silent())
    assert (tmp_path / "out").is_dir() and not (shared / tmp_path.name).exists()
