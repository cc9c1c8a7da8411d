"""Everything that is wrong with a recipe is told at once, each mistake with its place and a way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from compress import demo, recipe
from compress.checkpoint import Checkpoint
from compress.cli import app
from compress.errors import InputError
from compress.layout import Layout

ROOT = Path(__file__).resolve().parents[1]
BASE: dict[str, Any] = {"calibration": {"samples": 4, "length": 64}, "passes": [{"gptq": {"group_size": 32}}], "evaluate": {"context": 64}}


def told(plain: object) -> list[str]:
    """The problems of a recipe, as text."""
    with pytest.raises(InputError) as caught:
        recipe.validate(plain, "r.yaml")
    return [str(problem) for problem in caught.value.problems]


def told_of(plain: dict[str, Any], folder: Path) -> list[str]:
    """The problems of a sound recipe with a model."""
    with pytest.raises(InputError) as caught:
        recipe.check(recipe.validate(plain, "r.yaml"), Layout(Checkpoint(folder)), "r.yaml")
    return [str(problem) for problem in caught.value.problems]


def with_passes(*steps: dict[str, Any]) -> dict[str, Any]:
    return BASE | {"passes": list(steps)}


def test_five_mistakes_are_told_at_once_with_their_places() -> None:
    wrong = {
        "calibration": {"smaples": 4},
        "passes": [{"gptq": {"bits": 9}}, {"gtpq": {}}],
        "gates": {"perplexity_ration": {"max": 1.1}},
        "export": ["onnx"],
    }
    places = [
        "r.yaml: calibration.smaples: unknown key; did you mean 'samples'?",
        "r.yaml: passes[0].gptq: bits: input should be less than or equal to 8 or 'allocated', got 9",
        "r.yaml: passes[1]: no pass is called 'gtpq'; did you mean 'gptq'?",
        "r.yaml: gates.perplexity_ration: nothing of this name is measured; did you mean 'perplexity_ratio'?",
        f"r.yaml: export: no export is called 'onnx'; known are {', '.join(recipe.export_names())}",
    ]
    assert sorted(told(wrong)) == sorted(places)


MISTAKES: dict[str, tuple[object, str]] = {
    "not a mapping": ([], "r.yaml: must be a mapping with the key passes, got list"),
    "empty": (None, "r.yaml: must be a mapping with the key passes, got nothing"),
    "no passes": ({}, "r.yaml: passes: is missing"),
    "an empty list of passes": ({"passes": []}, "r.yaml: passes: "),
    "two passes in one step": ({"passes": [{"rtn": {}, "gptq": {}}]}, "r.yaml: passes[0]: must be one pass name with its options"),
    "a pass without a mapping": ({"passes": ["rtn"]}, "r.yaml: passes[0]: must be one pass name with its options"),
    "options that are a number": ({"passes": [{"rtn": 4}]}, "r.yaml: passes[0].rtn: options must be a mapping, got 4"),
    "an unknown top key": ({"passes": [{"rtn": {}}], "gate": {}}, "r.yaml: gate: unknown key; did you mean 'gates'?"),
    "an unknown option": ({"passes": [{"rtn": {"groupsize": 64}}]}, "r.yaml: passes[0].rtn: groupsize: unknown key; did you mean 'group_size'?"),
    "an unknown key far from any": (
        {"passes": [{"rtn": {}}], "calibration": {"zzz": 1}},
        "r.yaml: calibration.zzz: unknown key; known are data, samples, length, seed",
    ),
    "an unknown key of evaluate": (
        {"passes": [{"rtn": {}}], "evaluate": {"contxt": 1}},
        "r.yaml: evaluate.contxt: unknown key; did you mean 'context'?",
    ),
    "an unknown key of a gate": ({"passes": [{"rtn": {}}], "gates": {"kl": {"maximum": 1}}}, "r.yaml: gates.kl.maximum: unknown key"),
    "too few bits": (
        {"passes": [{"rtn": {"bits": 1}}]},
        "r.yaml: passes[0].rtn: bits: input should be greater than or equal to 2 or 'allocated', got 1",
    ),
    "bits that are text": ({"passes": [{"rtn": {"bits": "four"}}]}, "r.yaml: passes[0].rtn: bits: "),
    "half a bit": ({"passes": [{"rtn": {"bits": 4.5}}]}, "r.yaml: passes[0].rtn: bits: "),
    "a group that is a word": ({"passes": [{"rtn": {"group_size": "chanel"}}]}, "r.yaml: passes[0].rtn: group_size"),
    "an unknown choice": (
        {"passes": [{"gptq": {"fallback": "ignore"}}]},
        "r.yaml: passes[0].gptq: fallback: input should be 'error' or 'round', got 'ignore'",
    ),
    "damping of nothing": ({"passes": [{"gptq": {"damp": 0}}]}, "r.yaml: passes[0].gptq: damp: input should be greater than 0, got 0"),
    "endless tokens": ({"passes": [{"gptq": {"min_tokens": float("inf")}}]}, "r.yaml: passes[0].gptq: min_tokens: input should be a finite number"),
    "a pattern that is no expression": ({"passes": [{"rtn": {"include": ["re:["]}}]}, "r.yaml: passes[0].rtn: include"),
    "a gate without a bound": ({"passes": [{"rtn": {}}], "gates": {"kl": {}}}, "r.yaml: gates.kl: needs max or min"),
    "a gate that is not a number": (
        {"passes": [{"rtn": {}}], "gates": {"kl": {"max": float("nan")}}},
        "r.yaml: gates.kl.max: input should be a finite number",
    ),
    "a gate without an evaluation": (
        {"passes": [{"rtn": {}}], "gates": {"kl": {"max": 1}}, "evaluate": None},
        "r.yaml: gates.kl: needs an evaluation, but evaluate is null",
    ),
    "two exports": ({"passes": [{"rtn": {}}], "export": ["compressed-tensors", "compressed-tensors"]}, "r.yaml: export: "),
    "no samples": (
        {"passes": [{"rtn": {}}], "calibration": {"samples": 0}},
        "r.yaml: calibration.samples: input should be greater than or equal to 1, got 0",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_its_place(mistake: str) -> None:
    plain, message = MISTAKES[mistake]
    assert any(problem.startswith(message) for problem in told(plain)), told(plain)


def test_gates_on_what_is_recorded_anyway_need_no_evaluation() -> None:
    valid = recipe.validate({"passes": [{"rtn": {}}], "gates": {"bits_per_weight": {"max": 5}}, "evaluate": None}, "r.yaml")
    assert valid.gates["bits_per_weight"].max == 5


def test_passes_out_of_the_order_of_stages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.passes import rtn

    monkeypatch.setattr(rtn.Pass, "stage", "sparsify")
    assert told({"passes": [{"gptq": {}}, {"rtn": {}}]}) == [
        "r.yaml: passes[1]: rtn belongs to stage sparsify, but comes after a pass of stage quantize; "
        "the order is restructure < sparsify < transform < allocate < quantize < cache: "
        "what may go is chosen by exact weights, and rounding keeps the zeros"
    ]


@pytest.mark.parametrize(("content", "message"), [(b"passes: [", "is not YAML"), (b"\xff\xfe\xfa", "is not YAML"), (None, "cannot be read")])
def test_a_file_that_is_no_recipe_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        recipe.load(path)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_says_how_to_run_it(path: Path) -> None:
    recipe.load(path)
    assert path.read_text().startswith(f"# compress run recipes/{path.name} ")


def test_a_shipped_recipe_is_found_beside_an_artifact_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w4").mkdir()
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["check", "w4", "demo:dense"]).exit_code == 0
    (tmp_path / "w4.yaml").write_text("passes: 3")
    assert CliRunner().invoke(app, ["check", "w4.yaml", "demo:dense"]).exit_code == 2  # a file of one's own goes first


FITTING: dict[str, tuple[str, dict[str, Any], str]] = {
    "a pattern that matches nothing": (
        "llama",
        with_passes({"rtn": {"group_size": 32, "include": ["*.qproj"]}}),
        "r.yaml: passes[0].rtn: include: '*.qproj' matches none of the 14 linears; one of them is model.layers.0.self_attn.q_proj",
    ),
    "an exclusion that matches nothing": (
        "llama",
        with_passes({"rtn": {"group_size": 32, "exclude": ["re:lm_head"]}}),
        "r.yaml: passes[0].rtn: exclude: 're:lm_head' matches none of the 14 linears",
    ),
    "everything excluded": ("llama", with_passes({"rtn": {"group_size": 32, "exclude": ["*"]}}), "r.yaml: passes[0].rtn: takes no linear at all"),
    "a group that divides no width": (
        "llama-688",
        with_passes({"rtn": {"group_size": 64}}),
        "r.yaml: passes[0].rtn: group_size: 64 does not divide the width 688 of model.layers.0.mlp.down_proj and 1 more; "
        "widths that work: 16, 344, 688, or channel",
    ),
    "a group that is too small": ("llama", with_passes({"rtn": {"group_size": 8}}), "r.yaml: passes[0].rtn: group_size: must be at least 16, got 8"),
    "a group of nothing": ("llama", with_passes({"rtn": {"group_size": 0}}), "r.yaml: passes[0].rtn: group_size: must be at least 16, got 0"),
    "half of a fused group": (
        "llama",
        with_passes({"rtn": {"group_size": 32, "include": ["*.q_proj"]}}),
        "r.yaml: export: model.layers.0.qkv is one matrix to serving engines, but its linears get different schemes",
    ),
    "two schemes for a fused group": (
        "llama",
        with_passes({"rtn": {"group_size": 32, "include": ["*.gate_proj"]}}, {"rtn": {"bits": 8, "group_size": 32, "include": ["*.up_proj"]}}),
        "r.yaml: export: model.layers.0.gate_up is one matrix",
    ),
    "asymmetric experts": (
        "qwen3_moe",
        with_passes({"rtn": {"group_size": 32, "symmetric": False}}),
        "r.yaml: export: the experts of model.layers.0 are asymmetric",
    ),
    "experts treated differently": (
        "mixtral",
        with_passes({"rtn": {"group_size": 32, "exclude": ["*.experts.3.*"]}}),
        "r.yaml: export: the experts of model.layers.0 get different schemes",
    ),
    "experts left dense": (
        "qwen3_moe",
        with_passes({"rtn": {"group_size": 32, "exclude": ["*.experts.*"]}}),
        "r.yaml: export: the experts of model.layers.0 stay as they are, and of 1 blocks more; transformers opens no dense experts",
    ),
    "experts in nvfp4, to be opened by transformers": (
        "mixtral",
        with_passes({"rtn": {"format": "nvfp4"}}) | {"verify": "full"},
        "r.yaml: verify: full opens the artifact with transformers, which refuses experts in nvfp4: unpacks them wrongly or not at all; "
        "take auto, or streamed",
    ),
    "a linear taken twice": (
        "llama",
        with_passes({"rtn": {"group_size": 32}}, {"gptq": {"group_size": 32}}),
        "r.yaml: passes[1].gptq: model.layers.0.self_attn.q_proj is already quantised by rtn; use include and exclude",
    ),
    "experts that are certain to starve": (
        "qwen3_moe",
        with_passes({"gptq": {"group_size": 32, "include": ["*.experts.*"], "min_tokens": 2}}),
        "r.yaml: passes[0].gptq: min_tokens: of 256 calibration tokens model.layers.0.experts.gate_up.0 sees 64 on average (2 of 8 experts serve a "
        "token), but needs 128; set calibration.samples to 8 or more, min_tokens lower, or fallback: round",
    ),
    "experts that are certain to starve while they are pruned": (
        "mixtral",
        with_passes({"prune_nm": {"include": ["*.experts.*"], "min_tokens": 3}}),
        "r.yaml: passes[0].prune_nm: min_tokens: of 256 calibration tokens model.layers.0.experts.down.0 sees 128 on average (2 of 4 experts serve a "
        "token), but needs 288; set calibration.samples to 9 or more, min_tokens lower, or fallback: magnitude",
    ),
    "calibration too small for what all tokens go to": (
        "llama",
        with_passes({"autoround": {"group_size": 32, "min_tokens": 4}}),
        "r.yaml: passes[0].autoround: min_tokens: of 256 calibration tokens model.layers.0.down sees all, but needs 384; set "
        "calibration.samples to 6 or more",
    ),
    "calibration longer than the model": (
        "llama",
        BASE | {"calibration": {"length": 512}},
        "r.yaml: calibration.length: 512 tokens exceed the model's 256; set it to 256 or less",
    ),
    "windows longer than the model": (
        "llama",
        BASE | {"evaluate": {"context": 512}},
        "r.yaml: evaluate.context: 512 tokens exceed the model's 256",
    ),
    "data that do not exist": (
        "llama",
        BASE | {"calibration": {"length": 64, "data": "no.txt"}},
        "r.yaml: calibration.data: no.txt is no file or folder",
    ),
    "demonstration data that do not exist": (
        "llama",
        BASE | {"evaluate": {"context": 64, "data": "demo:no"}},
        "r.yaml: evaluate.data: demo:no: no demonstration data 'no'",
    ),
    "data that are neither text nor a data set": (
        "llama",
        BASE | {"calibration": {"length": 64, "data": "/proc/self/maps"}},
        "r.yaml: calibration.data: /proc/self/maps is neither a .txt nor a .jsonl file; give one, a folder, a hub id or demo:text",
    ),
    "data whose name no disk takes": (
        "llama",
        BASE | {"calibration": {"length": 64, "data": "a" * 5000}},
        f"r.yaml: calibration.data: {'a' * 100}...: is no path (File name too long)",
    ),
    "data of somebody who is not there": (
        "llama",
        BASE | {"evaluate": {"context": 64, "data": "~nobody-of-this-name/x.txt"}},
        "r.yaml: evaluate.data: ~nobody-of-this-name/x.txt: is no path (Could not determine home directory.)",
    ),
    "pairs that do not exist": (
        "llama",
        BASE | {"evaluate": {"context": 64, "pairs": "no.jsonl"}},
        "r.yaml: evaluate.pairs: no.jsonl is no file or folder",
    ),
}


@pytest.mark.parametrize("mistake", FITTING)
def test_a_recipe_that_does_not_fit_the_model_is_refused_with_the_place(mistake: str, checkpoint: Callable[..., Path]) -> None:
    kind, plain, message = FITTING[mistake]
    found = told_of(plain, checkpoint(kind))
    assert any(problem.startswith(message) for problem in found), found


def test_all_that_does_not_fit_is_told_at_once(checkpoint: Callable[..., Path]) -> None:
    plain = with_passes({"gptq": {"group_size": 64, "include": ["*.nothing", "*"]}}) | {"evaluate": {"context": 9999, "data": "no.txt"}}
    assert len(told_of(plain, checkpoint("llama-688"))) == 4


@pytest.mark.parametrize("options", [{}, {"fallback": "round"}, {"pool": True}, {"include": ["*.self_attn.*"]}], ids=str)
def test_experts_may_have_few_tokens_where_that_stops_no_run(options: dict[str, Any], checkpoint: Callable[..., Path]) -> None:
    few = {} if options else {"min_tokens": 1}  # as many as there are on average may do
    calls = {"gptq": {"group_size": 32, "min_tokens": 2, "scales": "mse"} | few | options}
    rest = [{"rtn": {"group_size": 32, "exclude": ["*.self_attn.*"]}}] * ("include" in options)
    layout = Layout(Checkpoint(checkpoint("qwen3_moe")))
    assert recipe.check(recipe.validate(with_passes(calls, *rest), "r.yaml"), layout, "r.yaml").keys() == layout.linears.keys()


@pytest.mark.parametrize("indivisible", ["keep", "channel"])
def test_an_indivisible_width_is_dealt_with_as_the_recipe_says(indivisible: str, checkpoint: Callable[..., Path]) -> None:
    plain = with_passes({"rtn": {"group_size": 64, "indivisible": indivisible}})
    plan = recipe.check(recipe.validate(plain, "r.yaml"), Layout(Checkpoint(checkpoint("llama-688"))), "r.yaml")
    down = plan.get("model.layers.0.mlp.down_proj")
    assert (down and down[1].group_size) == {"keep": None, "channel": 688}[indivisible]


def test_calibration_is_not_judged_where_no_pass_needs_it(checkpoint: Callable[..., Path]) -> None:
    plain = with_passes({"rtn": {"group_size": 32}}) | {"calibration": {"data": "no.txt", "length": 9999}}
    layout = Layout(Checkpoint(checkpoint("llama")))
    assert recipe.check(recipe.validate(plain, "r.yaml"), layout, "r.yaml").keys() == layout.linears.keys()


def test_defaults_written_out_change_no_hash() -> None:
    short = recipe.validate({"passes": [{"gptq": None}]}, "r.yaml")
    assert recipe.validate(yaml.safe_load(yaml.safe_dump(short.resolved())), "r.yaml").hash == short.hash


def test_the_hash_is_the_same_in_every_version_of_the_interpreter() -> None:
    one = {"passes": [{"rtn": {"bits": 3, "group_size": 64}}], "gates": {"kl": {"max": 1}, "fallbacks": {"max": 0}}}
    other = {"gates": {"fallbacks": {"max": 0}, "kl": {"max": 1}}, "passes": [{"rtn": {"group_size": 64, "bits": 3}}]}
    assert recipe.validate(one, "r.yaml").hash == recipe.validate(other, "r.yaml").hash


CHANGES: list[dict[str, Any]] = [
    *({"passes": [{"gptq": {key: value}}]} for key, value in {
        "bits": 3, "group_size": "channel", "symmetric": False, "include": ["*"], "exclude": ["*.o_proj"], "indivisible": "keep", "act_order": False,
        "damp": 0.02, "scales": "mse", "fallback": "round", "min_tokens": 0.5, "qep": 0.5, "pool": True,
        "format": "nvfp4", "activations": "dynamic",
    }.items()),
    *({"calibration": {key: value}} for key, value in {"data": "x", "samples": 9, "length": 9, "seed": 1}.items()),
    *({"evaluate": {key: value}} for key, value in {"data": "x", "context": 9, "windows": None, "pairs": "x", "tasks": ["x"]}.items()),
    {"evaluate": None}, {"gates": {"kl": {"max": 1}}}, {"gates": {"kl": {"min": 1}}}, {"verify": "full"}, {"passes": [{"rtn": {}}]},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_any_option_changes_the_hash(change: dict[str, Any]) -> None:
    assert recipe.validate({"passes": [{"gptq": {}}]} | change, "r.yaml").hash != recipe.validate({"passes": [{"gptq": {}}]}, "r.yaml").hash


def test_every_option_of_gptq_is_among_those_changed_here() -> None:
    from compress.passes import gptq

    assert {key for change in CHANGES for step in change.get("passes", []) for key in step.get("gptq", {})} == set(gptq.Pass.model_fields)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("passes:\n  - rtn: {bits: 4, bits: 3}\n")
    with pytest.raises(InputError, match="the key 'bits' stands twice"):
        recipe.load(path)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"passes": ["rtn"]}, r"^r\.yaml: passes\[0\]: must be one pass name with its options; write `- gptq: \{bits: 4\}`$"),
        ({"passes": None}, r"^r\.yaml: passes: input should be a valid list, got None$"),
        ({"passes": []}, r"^r\.yaml: passes: list should have at least 1 item after validation, not 0, got \[\]$"),
        (None, r"^r\.yaml: must be a mapping with the key passes, got nothing$"),
        ({"passes": [{"rtn": {}}], "calibration": {"data": ""}}, r"^r\.yaml: calibration\.data: string should have at least 1 character, got ''$"),
    ],
)
def test_one_mistake_gives_one_message(plain: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe.validate(plain, "r.yaml")


@pytest.mark.parametrize("name", demo.MODELS)
def test_the_first_recipe_fits_the_demonstration_models(name: str) -> None:
    plain = BASE | {"passes": [{"gptq": {"group_size": 32}}]}
    layout = Layout(Checkpoint(demo.path(name)))
    assert recipe.check(recipe.validate(plain, "r.yaml"), layout, "r.yaml").keys() == layout.linears.keys()


def test_a_faulty_recipe_is_checked_against_the_model_in_the_same_go(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from compress.cli import app

    path = tmp_path / "five.yaml"
    path.write_text(
        "calibration: {data: nowhere.txt, sampels: 10}\n"
        "passes:\n  - gptq: {bits: 9, group_size: 100, exclude: ['nothing*']}\n"
        "gates: {perplexty: {max: 1.02}}\n"
    )
    result = CliRunner().invoke(app, ["check", str(path), "demo:dense"])
    assert result.exit_code == 2
    places = ("calibration.sampels", "gptq: bits", "gptq: exclude", "gptq: group_size", "calibration.data", "gates.perplexty")
    assert [place for place in places if place not in result.output] == []


def test_images_are_refused_for_a_model_that_reads_text_only() -> None:
    layout = Layout(Checkpoint(demo.path("dense")))
    plain = {"calibration": {"data": "demo:images"}, "passes": [{"gptq": {}}], "evaluate": None}
    with pytest.raises(InputError, match="reads text only"):
        recipe.check(recipe.validate(plain, "r"), layout, "r")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("rtn: {bits: true}", "bits: must be a whole number or 'allocated', got True"),
        ("rtn: {group_size: '32'}", "group_size: must be a whole number or 'channel', got '32'"),
        ("rtn: {symmetric: 1}", "symmetric: must be true or false, got 1"),
        ("prune_depth: {drop: yes}", "drop: must be a whole number"),
        ("prune_nm: {pattern: !!binary Mjo0}", "pattern: must be text, not binary"),
    ],
)
def test_a_value_of_another_kind_is_not_taken_for_one(step: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        recipe.validate(yaml.safe_load(f"passes: [{{{step}}}]"), "r.yaml")
    assert message in str(caught.value)


def test_a_recipe_nested_too_deeply_is_none(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("passes: " + "[" * 3000 + "]" * 3000)
    with pytest.raises(InputError, match=r"r\.yaml: is not YAML \(maximum recursion depth"):
        recipe.load(tmp_path / "r.yaml")
