"""What config.json says of quantised weights is held against their tensors, before any is read and everything at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_run import compress as compress_run
from torch import Tensor

import compress
from compress import declared
from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.layout import DECLARED, Layout
from compress.model import Model

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
FORMATS: dict[str, dict[str, Any]] = {
    "w4": {"bits": 4, "group_size": 32}, "w3-asymmetric": {"bits": 3, "group_size": 32, "symmetric": False},
    "w8-channel": {"bits": 8, "group_size": "channel"}, "w8a8": {"bits": 8, "group_size": "channel", "activations": "dynamic"},
    "fp8": {"format": "fp8"}, "mxfp8": {"format": "mxfp8"}, "mxfp4": {"format": "mxfp4"}, "nvfp4": {"format": "nvfp4"},
}  # fmt: skip


@pytest.fixture(scope="module")
def artifact(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A copy of the artifact of a tiny model in one of `FORMATS`."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("made") / "out"
            compress_run(
                {"calibration": {"samples": 4, "length": 24}, "evaluate": None, "passes": [{"rtn": FORMATS[name]}]}, checkpoint("llama"), made[name]
            )
        return Path(shutil.copytree(made[name], tmp_path_factory.mktemp("copy") / "out"))

    return make


def with_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def with_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def with_weights(folder: Path, **says: Any) -> None:
    with_config(folder, lambda config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(says))


def problems(folder: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        compress.load(folder)
    return list(map(str, caught.value.problems))


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_written_agrees_with_itself(name: str, artifact: Callable[[str], Path]) -> None:
    layout = Layout(Checkpoint(artifact(name)))
    assert all(layout.checkpoint.tensors.keys() & {f"{linear}.weight_packed", f"{linear}.weight_scale"} for linear in layout.linears)
    declared.check(layout)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "bits": ("w4", {"num_bits": 3}, "weight_packed: has the shape [96, 8], config.json (group_0: int, 3 bits, group 32) makes it [96, 6]"),
    "group": ("w4", {"group_size": 16}, "weight_scale: has the shape [96, 2], config.json (group_0: int, 4 bits, group 16) makes it [96, 4]"),
    "channel": ("w4", {"strategy": "channel"}, "weight_scale: has the shape [96, 2], config.json (group_0: int, 4 bits, group channel) makes"),
    "symmetric": ("w3-asymmetric", {"symmetric": True}, "weight_zero_point: is there, but config.json (group_0: int, 3 bits, group 32) says"),
    "asymmetric": ("w4", {"symmetric": False}, "weight_zero_point: is missing from the checkpoint"),
    "blocks": ("fp8", {"strategy": "block", "block_structure": [128, 128]},
               "weight_scale: has the shape [96, 1], config.json (group_0: float, 8 bits, group 128 x 128) makes it [1, 1]"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_config_that_contradicts_the_tensors_is_refused_for_each_of_them(case: str, artifact: Callable[[str], Path]) -> None:
    name, says, what = WRONG[case]
    folder = artifact(name)
    with_weights(folder, **says)
    found = problems(folder)
    assert any(line.startswith(f"{UP}.{what}") for line in found) and len(found) >= 14  # every linear is named, and all are at once


@pytest.mark.parametrize(
    ("name", "says", "what"),
    [
        ("nvfp4", {"group_size": 32}, "group_0: says group_0: float, 4 bits, group 32, which nvfp4-pack-quantized cannot hold"),
        ("mxfp4", {"num_bits": 8}, "group_0: says group_0: float, 8 bits, group 32, which mxfp4-pack-quantized cannot hold"),
        ("fp8", {"type": "int"}, "group_0: says group_0: int, 8 bits, group channel, which float-quantized cannot hold"),
        ("w4", {"num_bits": "four"}, "group_0: has a num_bits of 'four'"),
        ("w4", {"strategy": "column"}, "group_0: has the strategy 'column', which this program does not read"),
        ("w4", {"group_size": 0}, "group_0: has a num_bits of 4 and scales for 1 x 0 weights"),
    ],
)  # fmt: skip
def test_a_config_that_means_nothing_is_refused(name: str, says: dict[str, Any], what: str, artifact: Callable[[str], Path]) -> None:
    folder = artifact(name)
    with_weights(folder, **says)
    (line,) = problems(folder)
    assert line.startswith(f"config.json: quantization_config.config_groups.{what}")


def test_another_format_and_linears_nobody_mentions_are_refused(artifact: Callable[[str], Path]) -> None:
    folder = artifact("mxfp8")
    with_config(folder, lambda config: config["quantization_config"]["config_groups"]["group_0"].update(format="mxfp4-pack-quantized"))
    (line,) = problems(folder)
    assert "says group_0: float, 8 bits, group 32, which mxfp4-pack-quantized cannot hold" in line
    with_weights(folder, num_bits=4)
    assert f"{UP}: is stored as mxfp8-quantized, but config.json (group_0) says mxfp4-pack-quantized; {declared.REMEDY}" in problems(folder)
    for change in ({"ignore": [UP, "lm_head"]}, {"config_groups": {}}, {"config_groups": []}):
        folder = artifact("w4")
        with_config(folder, lambda config, change=change: config["quantization_config"].update(change))  # type: ignore[misc]
        found = problems(folder)
        if change.get("config_groups") == []:
            assert found == [f"{DECLARED}: is not what compressed-tensors writes: config_groups must hold a mapping; fetch it again"]
        else:
            assert f"{UP}: is quantised, but config.json does not say so; {declared.REMEDY}" in found and (len(found) == 1) == ("ignore" in change)
    with_config(folder, lambda config: config.update(quantization_config=[1]))
    assert problems(folder)[0].startswith(f"{DECLARED}: is not what compressed-tensors writes")


def test_tensors_that_contradict_the_config_are_refused_all_at_once(artifact: Callable[[str], Path]) -> None:
    folder = artifact("w4")

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].repeat(1, 2)
        tensors[f"{DOWN}.weight_scale"] = tensors[f"{DOWN}.weight_scale"].int()

    with_tensors(folder, damage)
    first, second = problems(folder)
    assert first.startswith(
        f"{UP}.weight_scale: has the shape [96, 4], config.json (group_0: int, 4 bits, group 32) makes it [96, 2]; do config.json"
    )
    assert second == f"{DOWN}.weight_scale: is I32, which is no scale; the artifact is damaged; fetch it again"


@pytest.mark.parametrize("shape", [[96, 640], [95, 64], [-96, 64], [96, -64], [96, 0], [1 << 60, 1 << 60]])
def test_a_wrong_shape_is_given_as_the_reason(shape: list[int], artifact: Callable[[str], Path]) -> None:
    folder = artifact("w4")
    with_tensors(folder, lambda tensors: tensors.update({f"{UP}.weight_shape": torch.tensor(shape)}))
    found = problems(folder)
    assert f"{UP}.weight_shape: says {shape}, which [96, 8] words of 32 bits do not hold; the artifact is damaged; fetch it again" in found


def test_a_shape_that_is_none_or_another_than_the_configs_is_given_as_the_reason(artifact: Callable[[str], Path]) -> None:
    folder = artifact("w4")
    with_tensors(folder, lambda tensors: tensors.update({f"{UP}.weight_shape": torch.tensor([96.0])}))
    assert problems(folder) == [f"{UP}.weight_shape: is missing, or no shape of a matrix; the artifact is damaged; fetch it again"]
    with_tensors(
        folder, lambda tensors: [tensors.update({f"model.layers.0.mlp.{part}_proj.weight_shape": torch.tensor([96, 61])}) for part in ("up", "gate")]
    )
    assert any(line.startswith(f"{UP}.weight: has the shape [96, 61], config.json makes it [96, 64]") for line in problems(folder))


@pytest.mark.parametrize(("count", "what"), [(1, "model.layers.1: is not accounted for"), (3, "model.layers.2: has no tensors, though config")])
def test_a_wrong_number_of_blocks_is_given_as_the_reason(count: int, what: str, artifact: Callable[[str], Path]) -> None:
    folder = artifact("w4")
    with_config(folder, lambda config: config.update(num_hidden_layers=count))
    (line,) = problems(folder)
    assert line.startswith(what)


@pytest.mark.parametrize(
    ("says", "method"),
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"quant_method": "fp8"}, "fp8"), ("awq", "?"), ({"quant_method": "compressed-tensors"}, None)],
    ids=str,
)
def test_floats_that_config_calls_quantised_are_refused(says: Any, method: str | None, copy: Callable[..., Path]) -> None:
    folder = copy()
    with_config(folder, lambda config: config.update(quantization_config=says))
    if method is None:
        compress.load(folder)  # that is of the cache at most
        return
    what = f"says that weights are quantised ({method}), but all are of floats"
    assert problems(folder) == [
        f"{DECLARED}: {what}; take it out of config.json if these are the original weights, otherwise fetch the checkpoint again"
    ]
    with pytest.raises(InputError, match="but all are of floats"):
        Model(Layout(Checkpoint(folder)))
    with pytest.raises(InputError, match="but all are of floats"):
        Layout(Checkpoint(folder)).refuse_quantized()


def test_a_null_in_config_says_nothing(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy()
    with_config(folder, lambda config: config.update(quantization_config=None))
    compress.load(folder)
    compress_run({"evaluate": None, "passes": [{"rtn": FORMATS["w4"]}]}, folder, tmp_path / "out")
    ids = torch.arange(8)[None]
    assert bool(compress.load(tmp_path / "out")(ids).logits.isfinite().all())


def test_a_linear_of_floats_among_those_that_config_says_are_quantised_is_refused(artifact: Callable[[str], Path]) -> None:
    def plain(tensors: dict[str, Tensor]) -> None:
        for part in ("packed", "scale", "shape"):
            tensors.pop(f"{UP}.weight_{part}")
        tensors[f"{UP}.weight"] = torch.zeros(96, 64)

    folder = artifact("w4")
    with_tensors(folder, plain)
    assert problems(folder) == [f"{UP}: is of F32, but config.json (group_0) says pack-quantized; {declared.REMEDY}"]
    for ignored in (UP, f"model.language_{UP}", "re:.*layers.0.mlp.up_proj"):  # others put other names before the block
        with_config(folder, lambda config, name=ignored: config["quantization_config"].update(ignore=[name]))  # type: ignore[misc]
        compress.load(folder)


def test_codes_that_config_says_nothing_of_are_refused(artifact: Callable[[str], Path]) -> None:
    folder = artifact("w4")
    with_config(folder, lambda config: config.pop("quantization_config"))
    assert f"{UP}: is quantised, but config.json does not say so; {declared.REMEDY}" in problems(folder)
