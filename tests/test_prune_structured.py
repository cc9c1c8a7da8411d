"""What is cut out of a model computes as if it had been multiplied by zero, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_run import compress, contents, weights

from compress import recipe, runtime
from compress.checkpoint import SINGLE, Checkpoint
from compress.data import Tokenizer, calibration
from compress.errors import InputError
from compress.layout import Layout
from compress.numerics import saliency
from compress.passes import prune_structured
from compress.planning import plan

QUICK: dict[str, Any] = {"calibration": {"samples": 4, "length": 48}, "evaluate": None}
KINDS = {
    "llama": ("kv_group", "query_head", "ffn_channel"),
    "llama-bias": ("kv_group", "query_head", "ffn_channel"),
    "mistral": ("kv_group", "query_head", "ffn_channel"),
    "qwen2": ("kv_group", "query_head", "ffn_channel"),
    "qwen3": ("kv_group", "query_head", "ffn_channel"),
    "llava": ("kv_group", "query_head", "ffn_channel"),
    "mixtral": ("kv_group", "query_head", "expert_channel"),
    "qwen3_moe": ("kv_group", "query_head", "expert_channel"),
    "qwen3_moe-dense-first": ("ffn_channel", "expert_channel"),
    "qwen2_moe": ("kv_group", "query_head", "shared_channel", "expert_channel"),
    "olmoe": ("expert_channel",),
    "deepseek_v3": ("ffn_channel",),
    "gpt_oss": ("expert_channel",),
}
METHODS = ("magnitude", "random", "wanda_sp", "flap", "taylor")


def pruning(**options: Any) -> dict[str, Any]:
    return QUICK | {"passes": [{"prune_structured": {"multiple_of": 16} | options}]}


def records(out: Path) -> list[dict[str, Any]]:
    return [record for record in json.loads((out / "report.json").read_text())["transforms"] if record["pass"] == "prune_structured"]


def indices(text: str) -> list[int]:
    ends = [list(map(int, part.split("-"))) for part in text.split(", ")]
    return [index for part in ends for index in range(part[0], part[-1] + 1)]


def masked(folder: Path, out: Path, found: list[dict[str, Any]], target: Path) -> Path:
    """The source with everything that a run took out multiplied by zero where it is read: the slow, obvious version."""
    import shutil

    shutil.copytree(folder, target)
    layout = Layout(Checkpoint(folder))
    units = {units.name: units for block in layout.blocks for units in block.units}
    tensors = tiny.weights(target)
    for record in found:
        name = f"{units[record['name']].columns}.weight"
        keep = torch.zeros(record["before"], dtype=torch.bool)
        keep[indices(record["kept"])] = True
        tensors[name] *= keep.repeat_interleave(tensors[name].shape[1] // record["before"])
    tiny.write(tensors, target)
    return target


@pytest.mark.parametrize(("model", "kind"), [(model, kind) for model, kinds in KINDS.items() for kind in kinds])
def test_what_was_cut_out_computes_as_what_was_masked(model: str, kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(pruning(method="random", keep={kind: 0.5}), checkpoint(model), tmp_path / "out")
    found = records(tmp_path / "out")
    assert found and all(record["after"] == record["before"] // 2 for record in found)
    small, large = tiny.plain(tmp_path / "out"), tiny.plain(masked(checkpoint(model), tmp_path / "out", found, tmp_path / "masked"))
    ids = torch.randint(4, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert float((small(input_ids=ids).logits - large(input_ids=ids).logits).abs().max()) < 1e-5
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(small.generate(ids, **settings), large.generate(ids, **settings))
    assert Checkpoint(tmp_path / "out").nbytes < Checkpoint(checkpoint(model)).nbytes
    if kind == "kv_group":
        assert small.config.get_text_config().num_key_value_heads == large.config.get_text_config().num_key_value_heads // 2


def unevenly(choices: dict[str, saliency.Choice], remove: int) -> dict[str, int]:
    return {name: len(choice.scores) if ".0." in name else len(choice.scores) // 2 for name, choice in choices.items()}


@pytest.mark.parametrize("model", ["llama-bias", "qwen3_moe", "mixtral"])
def test_blocks_of_different_widths_compute_as_what_was_masked(
    model: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saliency, "share_out", unevenly)
    compress(pruning(method="flap", keep=0.5, widths="per_layer", multiple_of=1), checkpoint(model), tmp_path / "out")
    found = [record for record in records(tmp_path / "out") if record["after"] < record["before"]]
    assert found and all(record["block"] == 1 for record in found)
    large = tiny.plain(masked(checkpoint(model), tmp_path / "out", found, tmp_path / "masked"))
    ids = torch.randint(4, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
    small = runtime.load(tmp_path / "out")
    with torch.no_grad():
        assert float((small(input_ids=ids).logits - large(input_ids=ids).logits).abs().max()) < 1e-5
    with pytest.raises(Exception, match="per-layer attribute"):  # what transformers raises has no public name
        tiny.plain(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["engines"]["transformers"].startswith("refuses")


def test_equal_numbers_of_heads_that_transformers_refuses_are_said_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saliency, "share_out", lambda choices, remove: {name: len(choice.scores) - 1 for name, choice in choices.items()})
    compress(pruning(method="magnitude", keep={"kv_group": 0.75}, widths="per_layer"), "demo:dense", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_attention_heads"] == 8 and config["num_key_value_heads"] == 3
    assert config["per_layer_config"] == {str(block): {"num_attention_heads": 6} for block in range(4)}
    runtime.load(tmp_path / "out")


def test_blocks_that_lose_nothing_get_biases_too(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saliency, "share_out", unevenly)
    options = pruning(method="flap", keep={"ffn_channel": 0.5}, widths="per_layer", compensate=True)
    compress(options, checkpoint("llama"), tmp_path / "out")
    after = weights(tmp_path / "out")
    assert not after["model.layers.0.mlp.down_proj.bias"].any() and after["model.layers.1.mlp.down_proj.bias"].any()
    runtime.load(tmp_path / "out")


@pytest.mark.parametrize("widths", ["uniform", "per_layer"])
def test_as_many_parameters_go_however_widths_are_shared_out(widths: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(pruning(method="magnitude", keep=0.5, widths=widths, multiple_of=8), checkpoint("llama-3-blocks"), tmp_path / "out")
    gone = Checkpoint(checkpoint("llama-3-blocks")).nbytes - Checkpoint(tmp_path / "out").nbytes
    per_group, per_channel = (16 + 16 + 32 + 32) * 64 * 4, 3 * 64 * 4
    assert gone == 3 * (per_group + 48 * per_channel)


@pytest.mark.parametrize("method", METHODS)
def test_keeping_everything_changes_no_byte(method: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(pruning(method=method, keep=1.0), checkpoint("llama", torch.bfloat16), tmp_path / "out")
    before, after = weights(checkpoint("llama", torch.bfloat16)), weights(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "random"])
def test_units_that_do_nothing_go_first(method: str, copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy("llama")
    dead = {"kv_group": [1], "ffn_channel": [3, 17, 18, 40, 41, 60, 70, 95]}
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("o_proj.weight"):
                tensor[:, 32:] = 0
            if name.endswith("down_proj.weight"):
                tensor[:, dead["ffn_channel"]] = 0
            if method == "magnitude":  # which looks at what makes the channels too
                for part, rows in (("v_proj", [*range(16, 32)]), ("k_proj", [*range(16, 32)]), ("q_proj", [*range(32, 64)])):
                    if name.endswith(f"{part}.weight"):
                        tensor[rows] *= 1e-3
                if name.endswith(("up_proj.weight", "gate_proj.weight")):
                    tensor[dead["ffn_channel"]] *= 1e-3
        save_file(tensors, path, {"format": "pt"})
    compress(pruning(method=method, keep={"kv_group": 0.5, "ffn_channel": 88 / 96}, multiple_of=8), folder, tmp_path / "out")
    for record in records(tmp_path / "out"):
        assert sorted(set(range(record["before"])) - set(indices(record["kept"]))) == dead[record["kind"]]
    ids = torch.randint(4, tiny.VOCABULARY, (1, 12))
    with torch.no_grad():
        assert float((tiny.plain(tmp_path / "out")(input_ids=ids).logits - tiny.plain(folder)(input_ids=ids).logits).abs().max()) < 1e-5


@pytest.mark.parametrize("method", ["wanda_sp", "flap", "taylor", "heapr"])
def test_the_order_of_channels_does_not_matter(method: str, copy: Callable[..., Path], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    order = torch.randperm(96, generator=torch.Generator().manual_seed(5))
    folder = copy("llama")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if "mlp" in name:
                tensors[name] = (tensors[name][:, order] if "down" in name else tensors[name][order]).contiguous()
        save_file(tensors, path, {"format": "pt"})
    options = pruning(method=method, keep={"ffn_channel": 0.5})
    compress(options, checkpoint("llama"), tmp_path / "one")
    compress(options, folder, tmp_path / "other")
    for one, other in zip(records(tmp_path / "one"), records(tmp_path / "other"), strict=True):
        assert set(indices(one["kept"])) == {int(order[index]) for index in indices(other["kept"])}


@pytest.mark.parametrize(
    ("model", "keep"), [("llama", {"ffn_channel": 0.5}), ("llama-bias", {"kv_group": 0.5, "ffn_channel": 0.5}), ("qwen3", {"kv_group": 0.5})]
)
@pytest.mark.parametrize("method", [{"method": "flap"}, {"method": "ddp", "steps": 3, "batch": 2}], ids=["flap", "ddp"])
def test_a_bias_makes_up_for_the_mean_of_what_was_removed(
    method: dict[str, Any], model: str, keep: dict[str, float], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Over the calibration data, what the first block's linears give is the same on average as before."""
    result = compress(pruning(**method, keep=keep, compensate=True), checkpoint(model), tmp_path / "out")
    assert result["verification"]["logits_max_difference"] < 1e-3
    samples = calibration("demo:text", 4, 48, 0, Tokenizer(checkpoint(model)))
    path = {"kv_group": "self_attn.o_proj", "ffn_channel": "mlp.down_proj"}[next(iter(keep))]
    means = []
    for folder in (checkpoint(model), tmp_path / "out"):
        opened, given = tiny.plain(folder), []
        opened.model.layers[0].get_submodule(path).register_forward_hook(lambda _, arguments, output, given=given: given.append(output.flatten(0, 1)))
        with torch.no_grad():
            for item in samples.items:
                opened(input_ids=item.ids[None])
        means.append(torch.cat(given).mean(0))
    assert torch.allclose(means[0], means[1], atol=1e-5)


def test_trained_gates_are_folded_into_the_weights(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The gated model is the source with what reads each unit multiplied by its gate."""
    compress(pruning(method="ddp", keep={"ffn_channel": 0.5}, steps=30, batch=2), checkpoint("llama"), tmp_path / "out")
    before, after = weights(checkpoint("llama")), weights(tmp_path / "out")
    for record in records(tmp_path / "out"):
        prefix, kept = record["name"].removesuffix("ffn_channel"), indices(record["kept"])
        ratio = after[f"{prefix}mlp.down_proj.weight"] / before[f"{prefix}mlp.down_proj.weight"][:, kept]
        assert torch.equal(after[f"{prefix}mlp.up_proj.weight"], before[f"{prefix}mlp.up_proj.weight"][kept])
        assert torch.allclose(ratio, ratio.mean(0, keepdim=True).expand_as(ratio), rtol=1e-5) and len(ratio.mean(0).unique()) > 1
        assert record["scales"] == pytest.approx([float(ratio.min()), float(ratio.max())], rel=1e-5)


@pytest.mark.parametrize("model", ["llama", "qwen3_moe"])
def test_training_of_gates_goes_on_where_it_was_killed(
    model: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress import gating

    monkeypatch.setattr(gating, "SAVED_EVERY", 2)
    kind = "ffn_channel" if model == "llama" else "expert_channel"
    options = pruning(method="ddp", keep={kind: 0.5}, steps=5, batch=2)
    compress(options, checkpoint(model), tmp_path / "one")
    real, left = gating._step, [3]  # of five steps; the last is for what stays

    def dies(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(gating, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(options, checkpoint(model), tmp_path / "out")
    left[0] = 3  # it had done three and kept two
    compress(options, checkpoint(model), tmp_path / "out")
    assert left[0] == 0 and contents(tmp_path / "out") == contents(tmp_path / "one")


def test_what_follows_sees_the_smaller_model_and_the_plan_knows_its_size(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    steps = [
        {"prune_structured": {"method": "flap", "keep": {"ffn_channel": 0.67}, "multiple_of": 32}},
        {"gptq": {"group_size": 64, "min_tokens": 0}},
    ]
    plain = QUICK | {"passes": steps}
    layout = Layout(Checkpoint(checkpoint("llama")))
    expected = plan(recipe.validate(plain, "r"), layout, recipe.check(recipe.validate(plain, "r"), layout, "r"))["size"]
    result = compress(plain, checkpoint("llama"), tmp_path / "out")
    assert result["size"]["after_bytes"] == expected["after_bytes"] and result["verification"]["logits_max_difference"] < 1e-3
    fate = next(item for item in result["ledger"] if item["name"] == "model.layers.0.mlp.down_proj.weight")
    assert fate["action"] == "quantized" and "pruned by prune_structured before" in fate["why"] and fate["shape"] == [64, 96]


@pytest.mark.parametrize(
    ("model", "steps", "message"),
    [
        ("llama", [{"prune_structured": {"keep": 0.1, "multiple_of": 16}}], "none would be left; keep at least 0.5"),
        ("llama", [{"prune_structured": {"keep": {"ffn_channel": 0.9}, "multiple_of": 96}}], "none would be removed"),
        (
            "llama",
            [{"prune_structured": {"keep": {"expert_channel": 0.5}}}],
            "the model has no expert_channel; it has ffn_channel, kv_group, query_head",
        ),
        ("llama", [{"prune_structured": {"keep": {}}}], "names no units"),
        ("llama", [{"prune_structured": {"keep": {"kv_group": 0.5, "query_head": 0.5}}}], "kv_group takes query heads with it"),
        ("mistral", [{"prune_structured": {"keep": {"kv_group": 0.5}, "compensate": True}}], "knows no bias of o_proj"),
        ("qwen3", [{"prune_structured": {"keep": {"ffn_channel": 0.5}, "multiple_of": 8, "compensate": True}}], "knows no bias of down_proj"),
        ("llama", [{"prune_structured": {"keep": 0.5, "method": "taylor", "compensate": True}}], "compensate: is an option of flap and ddp"),
        ("llama", [{"prune_structured": {"keep": 0.5, "steps": 100}}], "steps: is an option of ddp, which flap does not read"),
        (
            "llama",
            [{"prune_structured": {"keep": {"ffn_channel": 0.67}, "multiple_of": 16}}, {"rtn": {"group_size": 48}}],
            "group_size: 48 does not divide the width 64",
        ),
        ("llama", [{"rtn": {"group_size": 32}}, {"prune_structured": {"keep": 0.5}}], "prune_structured belongs to stage restructure"),
        ("llama", [{"prune_depth": {"drop": 2}}], "2 of 2 blocks leaves none; drop at most 1"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_load(model: str, steps: list[Any], message: str, checkpoint: Callable[..., Path]) -> None:
    layout = Layout(Checkpoint(checkpoint(model)))
    with pytest.raises(InputError) as caught:
        recipe.check(recipe.validate(QUICK | {"passes": steps}, "r.yaml"), layout, "r.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("model", "options", "after"),
    [
        ("demo:dense", {}, {"kv_group": (4, 4), "ffn_channel": (768, 640)}),
        ("demo:moe", {}, {"kv_group": (4, 3), "expert_channel": (128, 96)}),
        ("demo:moe", {"method": "heapr"}, {"expert_channel": (128, 96)}),
    ],
    ids=str,
)
def test_without_options_about_a_fifth_goes_as_far_as_the_config_can_say_it(
    model: str, options: dict[str, Any], after: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    plain = QUICK | {"passes": [{"prune_structured": options}], "verify": "full"}
    result = compress(plain, model, tmp_path / "out")
    found = {record["kind"]: (record["before"], record["after"]) for record in result["transforms"]}
    assert found == after  # those of which none could go too: nobody said so
    assert recipe.load(tmp_path / "out" / "recipe.yaml").resolved() == recipe.validate(plain, "r.yaml").resolved()


def test_of_too_few_units_none_can_go_without_options(copy: Callable[..., Path], edit_config: Callable[..., None]) -> None:
    layout = Layout(Checkpoint(copy("llama")))
    plain = QUICK | {"passes": [{"prune_structured": {"multiple_of": 96}}]}
    with pytest.raises(InputError, match=r"keep: of ffn_channel, kv_group there are too few to keep 0.8; name shares by kind"):
        recipe.check(recipe.validate(plain, "r.yaml"), layout, "r.yaml")


def test_llamas_keep_numbers_of_heads_that_divide_the_hidden_size(copy: Callable[..., Path], edit_config: Callable[..., None]) -> None:
    """transformers refuses others, so nothing may be handed over that has them."""
    layout = Layout(Checkpoint(copy("llama")))
    layout.text_config["hidden_size"] = 60
    with pytest.raises(InputError, match=r"leaves 2 query heads|shares that work"):
        layout.text_config["hidden_size"] = 63
        recipe.check(recipe.validate(pruning(keep={"kv_group": 0.5}), "r.yaml"), layout, "r.yaml")


def test_an_expert_that_saw_nothing_is_an_error(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy("qwen3_moe")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("mlp.gate.weight"):
                tensor[3] = 0
                tensor[[0, 1]] *= 50
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match="saw no calibration token"):
        compress(pruning(method="wanda_sp", keep={"expert_channel": 0.5}) | {"calibration": {"samples": 1, "length": 2}}, folder, tmp_path / "out")


# Whole blocks -----------------------------------------------------------------------------------------------------------------------


def test_a_block_that_does_nothing_goes_first_and_nothing_changes(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy("llama-3-blocks")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.startswith("model.layers.1.") and name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor.zero_()
        save_file(tensors, path, {"format": "pt"})
    result = compress(QUICK | {"passes": [{"prune_depth": {"drop": 1}}, {"rtn": {"group_size": 32, "bits": 8}}]}, folder, tmp_path / "out")
    (record,) = result["transforms"]
    assert record["block"] == 1 and abs(record["influence"]) < 1e-6
    gone = [item["name"] for item in result["ledger"] if item["action"] == "removed"]
    assert gone and all(name.startswith("model.layers.1.") for name in gone)
    moved = next(item for item in result["ledger"] if item["name"] == "model.layers.2.mlp.up_proj.weight")
    assert moved["why"].endswith("now called model.layers.1.mlp.up_proj.weight")
    compress(QUICK | {"passes": [{"prune_depth": {"drop": 1}}]}, folder, tmp_path / "dense")
    ids = torch.randint(4, tiny.VOCABULARY, (1, 12))
    with torch.no_grad():
        small, large = tiny.plain(tmp_path / "dense"), tiny.plain(folder)
        assert torch.equal(small(input_ids=ids).logits, large(input_ids=ids).logits)
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(small.generate(ids, **settings), large.generate(ids, **settings))
        assert small.config.num_hidden_layers == 2


@pytest.mark.parametrize("model", ["qwen2-sliding", "qwen3_moe-dense-first"])
def test_what_the_config_says_of_each_block_moves_with_it(model: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(QUICK | {"passes": [{"prune_depth": {"drop": 1}}]}, checkpoint(model), tmp_path / "out")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint(model), tmp_path / "out"))
    (record,) = json.loads((tmp_path / "out" / "report.json").read_text())["transforms"]
    left = 1 - record["block"]
    assert after["num_hidden_layers"] == 1
    if model == "qwen2-sliding":
        assert after["layer_types"] == [before["layer_types"][left]]
    else:
        assert after["mlp_only_layers"] == ([0] if left == 0 else [])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["verification"]["logits_max_difference"] < 1e-3


def test_cutting_twice_and_dropping_a_block_between_is_told_in_full(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    steps = [
        {"prune_structured": {"method": "magnitude", "keep": {"ffn_channel": 0.67}, "multiple_of": 32}},
        {"prune_depth": {"drop": 1}},
        {"prune_structured": {"method": "magnitude", "keep": {"ffn_channel": 0.5}, "multiple_of": 32}},
    ]
    result = compress(QUICK | {"passes": steps}, checkpoint("llama-3-blocks"), tmp_path / "out")
    fates = {item["name"]: item for item in result["ledger"]}
    assert len(fates) == len(Checkpoint(checkpoint("llama-3-blocks")).tensors)
    removed = {name for name, item in fates.items() if item["action"] == "removed"}
    assert len({name.split(".")[2] for name in removed}) == 1
    assert tiny.plain(tmp_path / "out").config.intermediate_size == 32


def test_ranges_are_written_as_people_do() -> None:
    assert prune_structured.ranges(torch.tensor([0, 1, 2, 5, 8, 9])) == "0-2, 5, 8-9"
    assert indices("0-2, 5, 8-9") == [0, 1, 2, 5, 8, 9]


def test_only_one_file_is_left_beside_the_source(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(pruning(method="random", keep=0.5), checkpoint("llama"), tmp_path / "out")
    assert (tmp_path / "out" / SINGLE).exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


def curvature(folder: Path, samples: Any) -> dict[str, torch.Tensor]:
    """HEAPr as it is written: the Gram matrix of the gradients in what an MLP or an expert gives, between what each channel adds to that."""
    model = tiny.plain(folder)
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def expert_of(name: str) -> Callable[..., torch.Tensor]:
        experts = model.get_submodule(name)

        def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            total = torch.zeros_like(hidden)
            for number, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
                token, place = torch.where(index == number)
                gate, up = (hidden[token] @ gate_up.T).chunk(2, -1)
                inner = torch.nn.functional.silu(gate) * up
                given = inner @ down.T
                given.retain_grad()
                seen.setdefault(f"{name}.{number}.down_proj", []).append((inner, given))
                total = total.index_add(0, token, given * weights[token, place, None])
            return total

        return forward

    def note(module: Any, inputs: tuple[torch.Tensor], given: torch.Tensor) -> None:
        given.retain_grad()
        seen.setdefault(names[module], []).append((inputs[0], given))

    names = {module: name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            module.forward = expert_of(name)
        elif name.endswith("down_proj"):
            module.register_forward_hook(note)
    for item in samples.items:
        logits = model(input_ids=item.ids[None].requires_grad_(False), use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], item.ids[1:], reduction="sum").backward()
    found = {}
    for name, pairs in seen.items():
        inner, gradient = (torch.cat(each).flatten(0, -2).double() for each in zip(*((inner, given.grad) for inner, given in pairs), strict=True))
        number = name.split(".")[-2]
        weight = (
            model.get_submodule(name.rpartition(f".{number}.")[0]).down_proj[int(number)] if number.isdigit() else model.get_submodule(name).weight
        ).double()
        gram = gradient.T @ gradient / len(gradient)
        found[name] = torch.stack([0.5 * (inner[:, k] ** 2).mean() * (weight[:, k] @ gram @ weight[:, k]) for k in range(inner.shape[1])]).detach()
    return found


@pytest.mark.parametrize("model", ["llama", "qwen3_moe", "qwen2_moe", "olmoe"])
def test_second_order_scores_are_those_of_the_gram_matrix_of_gradients(model: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    keep = {"expert_channel" if "moe" in model else "ffn_channel": 0.5}
    compress(pruning(method="heapr", keep=keep), checkpoint(model), tmp_path / "out")
    expected = curvature(checkpoint(model), calibration("demo:text", 4, 48, 0, Tokenizer(checkpoint(model))))
    layout = Layout(Checkpoint(checkpoint(model)))
    readers = {units.name: units.columns for block in layout.blocks for units in block.units}
    for record in records(tmp_path / "out"):
        score = expected[readers[record["name"]]]
        assert sorted(indices(record["kept"])) == sorted(score.topk(record["after"]).indices.tolist())


def test_second_order_scores_are_of_channels(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="heapr judges channels, not kv_group"):
        recipe.check(recipe.validate(pruning(method="heapr", keep=0.5), "r.yaml"), Layout(Checkpoint(checkpoint("llama"))), "r.yaml")


@pytest.mark.parametrize("step", [{"prune_structured": {"keep": {"ffn_channel": 0.5}, "method": "magnitude"}}, {"low_rank": {"keep": 0.5}}])
def test_a_quantised_source_is_refused(step: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(QUICK | {"passes": [{"rtn": {"group_size": 32}}]}, checkpoint("llama"), tmp_path / "w4")
    with pytest.raises(InputError, match="already quantised"):
        compress(QUICK | {"passes": [step]}, tmp_path / "w4", tmp_path / "out")


def test_gates_have_nothing_to_learn_where_all_stays(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(pruning(method="ddp", keep=1.0, steps=4), checkpoint("llama"), tmp_path / "out")
    before, after = weights(checkpoint("llama")), weights(tmp_path / "out")
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


def test_the_card_of_what_only_compress_opens_says_so(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    compress(pruning(method="magnitude", keep={"ffn_channel": 0.75}, widths="per_layer"), checkpoint("llama"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    widths = Layout(Checkpoint(tmp_path / "out")).of_blocks
    assert ("compress.load" in card) == bool(widths) and ("AutoModelForCausalLM" in card) != bool(widths)
    assert "14 linears are not quantised" in card and "Parts of the model were taken out" in card
