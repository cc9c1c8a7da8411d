"""Quantising a model that sees: what answers about images lose, with vision tokens counted by what the loss depends on them, and without.

    python bench/quality.py vlm --json bench/results/vlm.json
    python bench/quality.py vlm --json vlm.json --only 'w3/*' --seeds 1

As bench/pruning.py, but calibrated on questions about images (demo:images) and judged by others (demo:images-heldout): the loss is the mean
cross-entropy over the tokens of answers, accuracy the share of questions answered exactly. Rows that end in `text` are calibrated on demo:text.
Those whose table ends in `outliers` are about the model with outlier channels (bench/outliers.py), as large models have them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness
import pruning
from outliers import plant

Passes = list[dict[str, Any]]

W3 = {"bits": 3, "group_size": 128}
W2 = {"bits": 2, "group_size": 64}
W4 = {"bits": 4, "group_size": 128}
W4A8 = {"bits": 4, "group_size": "channel", "activations": "dynamic"}
W8A8 = W4A8 | {"bits": 8}
AWQ = {"method": "awq", "clip": False}
BALANCED = AWQ | {"loss": "mae", "balance": "modality"}
TEXT, OUTLIERS = ", text", ", outliers"


def weights_only(grid: dict[str, Any]) -> dict[str, Passes]:
    return {
        "rtn": [{"rtn": grid}],
        "awq": [{"smooth": AWQ}, {"rtn": grid}],
        "awq, mae": [{"smooth": AWQ | {"loss": "mae"}}, {"rtn": grid}],
        "mbq": [{"mbq": grid}],
        "mbq, mse": [{"mbq": grid | {"loss": "mse"}}],
        "awq, clipped": [{"smooth": {"method": "awq"}}, {"rtn": grid}],
        "mbq, clipped": [{"mbq": grid | {"clip": True}}],
        "gptq": [{"gptq": grid}],
        "awq, gptq": [{"smooth": AWQ}, {"gptq": grid}],
        "mbq, gptq": [{"smooth": BALANCED}, {"gptq": grid}],
        f"awq{TEXT}": [{"smooth": AWQ}, {"rtn": grid}],
        f"gptq{TEXT}": [{"gptq": grid}],
    }


def with_inputs(grid: dict[str, Any]) -> dict[str, Passes]:
    return {
        "rtn": [{"rtn": grid}],
        "smoothquant": [{"smooth": {"method": "smoothquant"}}, {"rtn": grid}],
        "awq": [{"smooth": AWQ}, {"rtn": grid}],
        "mbq": [{"mbq": grid}],
        "mbq, gptq": [{"smooth": BALANCED}, {"gptq": grid}],
        f"smoothquant{TEXT}": [{"smooth": {"method": "smoothquant"}}, {"rtn": grid}],
    }


ROWS: dict[str, Passes] = {
    f"{table}/{name}": passes
    for table, rows in {
        "w4": weights_only(W4),
        "w3": weights_only(W3),
        "w2": weights_only(W2),
        "w4a8": with_inputs(W4A8),
        "w8a8": with_inputs(W8A8),
        f"w3{OUTLIERS}": weights_only(W3),
        f"w4a8{OUTLIERS}": with_inputs(W4A8),
    }.items()
    for name, passes in rows.items()
}
"""By table and name, the passes of a row."""


DATA_FREE = tuple(name for name in ROWS if name.endswith("/rtn"))


def data(row: str) -> tuple[str, str]:
    return "demo:text" if row.endswith(TEXT) else "demo:images", "demo:images-heldout"


def source(row: str, model: str, work: Path) -> str:
    if not row.split("/")[0].endswith(OUTLIERS):
        return model
    demo = model.removeprefix("demo:")
    planted = work / "planted"
    if not planted.exists():
        plant(harness.BENCH.parent / "compress" / "demo" / demo if demo != model else Path(model), planted)
    return str(planted)


def main(argv: list[str]) -> None:
    pruning.main(argv, pruning.Bench("vlm", __doc__ or "", "demo:vlm", ROWS, data, source, DATA_FREE, seeds=5, samples=96, windows=768))
