"""Where an artifact comes from, and how it was checked."""

from __future__ import annotations

from typing import Any

from compress.formats.base import LEFT_OUT
from compress.report.text import percent_text, plain, small, value_text


def engines(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What each engine makes of the artifact: its name, the verdict, and the class of the chip beside."""
    return [(name, verdict, verdict_state(verdict)) for name, verdict in (result.get("engines") or {}).items()]


def source(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The model that was compressed: its name, and the hash of each of its files."""
    found = result.get("source") or {}
    return [(file, digest) for file, digest in sorted((found.get("sha256") or {}).items())]


def verdict_state(verdict: str) -> str:
    """Class of a chip beside what is said of an engine."""
    return "good" if verdict.startswith("loads") else "bad" if verdict.startswith("refuses") else "partly"


def verification(found: dict[str, Any]) -> list[str]:
    """How the artifact was reopened, in sentences."""
    told = []
    if (tensors := found.get("tensors")) is not None:
        told.append(f"All {tensors:,} tensors were read back from disk and equal, bit for bit, what was meant to be written.")
    if count := found.get("weights_unpacked_by_compressed_tensors"):
        told.append(f"The compressed-tensors library unpacked {count:,} quantised weights to exactly the values that were measured.")
    if (difference := found.get("logits_max_difference")) is not None:
        differ = f"differ by at most {small(difference)} of the largest logit" if difference else "equal those of the measured model exactly"
        told.append(f"Plain transformers loaded the whole artifact; its logits {differ}.")
        if (outside := found.get("outside_max_difference")) is not None:
            gave = f"differ by at most {small(outside)} of their largest output" if outside else "give exactly what was measured"
            told.append(f"Quantised linears outside the decoder blocks, given the same inputs there, {gave}.")
        if left_out := " and ".join(what for what in LEFT_OUT if found.get(f"{what}_left_out")):
            told.append(f"It leaves {left_out} out; it was compared with the measured model without.")
    elif found.get("mode"):
        told.append("The artifact was not loaded as a whole; the tensors were compared one at a time.")
    if pruned := found.get("pruned_linears"):
        left = percent_text(found["pruned_density"])
        told.append(f"In the files, all {pruned:,} pruned linears keep their pattern; {left} of their weights are left.")
    known = {
        "pruned_linears",
        "pruned_density",
        "mode",
        "tensors",
        "weights_unpacked_by_compressed_tensors",
        "logits_max_difference",
        "outside_max_difference",
        *(f"{what}_left_out" for what in LEFT_OUT),
    }
    return told + [f"{key.replace('_', ' ')}: {value_text(value)}" for key, value in found.items() if key not in known]


def environment(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Versions, then the machine."""
    rest = {key: value for key, value in found.items() if key != "versions"}
    return [(name, str(value)) for name, value in (found.get("versions") or {}).items()] + plain(rest)
