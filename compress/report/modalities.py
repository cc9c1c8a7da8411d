"""What the report says of images and text: what the loss depends on, block by block, and what each of the two lost."""

from __future__ import annotations

from typing import Any

from compress.report.text import percent_text, small


def modalities(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row per block: sensitivities and what a vision token counted, of attention and of the MLP, and the share of what it gives that was lost."""
    found: dict[str, dict[str, list[str]]] = {}
    for record in result.get("transforms") or []:
        if each := record.get("sensitivity"):
            block, _, writer = record["name"].rpartition(".")[0].rpartition(".")
            row = found.setdefault(block, {"sensitivity": [], "counted": []})
            row["sensitivity"].append(f"{writer}: {small(each['vision'])} and {small(each['text'])}")
            row["counted"].append(f"{writer}: {small(each['counted'])}")
    lost = {each["block"]: each for each in (result.get("evaluation") or {}).get("modalities") or []}
    return [
        {
            "block": block,
            **{key: ", ".join(found.get(block, {}).get(key, [])) for key in ("sensitivity", "counted")},
            "vision": percent_text(lost[block]["vision"]) if block in lost else "",
            "text": percent_text(lost[block]["text"]) if block in lost else "",
        }
        for block in dict.fromkeys((*found, *lost))
    ]


def remark(result: dict[str, Any]) -> str | None:
    """What has to be said of the calibration data of a model that sees."""
    data = result.get("calibration") or {}
    if "vision_tokens" not in data:
        return None
    seen, tokens = data["vision_tokens"], data["tokens"]
    if seen is None:
        return "The processor does not say which tokens stand for images, so the two are not told apart."
    if not seen:
        return (
            "Calibrated on text alone: no pass saw what vision tokens are like in the language model, so what it kept for them is chance. "
            "Give images with questions as calibration data, such as a folder with data.jsonl."
        )
    return f"{seen:,} of the {tokens:,} calibration tokens, {percent_text(seen / tokens)}, stand for images."
