"""Write the table of results in README.md from bench/results/*.json, so that no figure is typed by hand.

    python scripts/results.py          # write it
    python scripts/results.py --check  # exit 1 if README.md says anything else

Each file says which benchmark it is of (bench/README.md). Of each tool's variants the one with the smallest mean loss is shown; the JSON
has them all.
"""

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
OURS, BASELINE = "ours", "rtn"

Rows = list[tuple[str, dict[str, str]]]


def losses(row: dict[str, Any]) -> list[float]:
    """Mean excess loss by evaluation text; empty if the tool did not run."""
    return [text["excess_loss"] for text in row["summary"].values()]


def column(cell: dict[str, Any]) -> str:
    """The column a row of the quality benchmark belongs to: a tool's, or that of plain rounding."""
    return BASELINE if cell["tool"] == OURS and cell["method"].partition("=")[0] == BASELINE else cell["tool"]


def quality(document: dict[str, Any]) -> Rows:
    """One row per grid: excess loss by text, per tool."""
    grids: dict[tuple[int, int, bool], dict[str, list[dict[str, Any]]]] = {}
    for row in document["results"]:
        cell = row["cell"]
        grids.setdefault((cell["bits"], cell["group_size"], cell["symmetric"]), {}).setdefault(column(cell), []).append(row)
    rows = []
    for (bits, group, symmetric), tools in grids.items():
        shown = {}
        for tool, candidates in tools.items():
            found = [losses(row) for row in candidates if losses(row)]
            status = candidates[0]["status"]
            shown[tool] = " / ".join(f"{loss:.4f}" for loss in min(found, key=statistics.mean)) if found else brief(status)
        rows.append((f"W{bits} g{group} {'symmetric' if symmetric else 'asymmetric'}, excess loss", shown))
    return rows


def brief(status: str) -> str:
    """Why there is no figure, in a word or two."""
    return status if status == "not installed" else "failed"


def speed(document: dict[str, Any]) -> Rows:
    """CPU and wall seconds of one more block, per tool."""
    shape, rows = document["protocol"]["shape"], []
    for key, name in (("cpu_seconds", "CPU seconds"), ("seconds", "wall seconds")):
        shown = {tool: f"{side[key]['median']:.1f}" if side.get(key) else brief(side["status"]) for tool, side in document["sides"].items()}
        rows.append((f"GPTQ of one Llama block ({shape['hidden']} wide, MLP {shape['ffn']}), {name}", shown))
    return rows


def memory(document: dict[str, Any]) -> Rows:
    """Peak memory beside the checkpoint."""
    peak, size = document["run"]["peak_rss_bytes"] / 1e9, document["checkpoint_bytes"] / 1e9
    return [(f"GPTQ of a checkpoint of {size:.2f} GB, peak memory", {OURS: f"{peak:.2f} GB ({document['ratio']:.0%})"})]


def kill(document: dict[str, Any]) -> Rows:
    """Runs that were killed and started again."""
    return [(f"killed at random moments, {document['kills']} times, and started again", {OURS: f"{document['identical']} byte-identical"})]


TITLES = {OURS: "compress", BASELINE: "plain rounding", "llmcompressor": "LLM Compressor", "gptqmodel": "GPTQModel"}
ORDER = ("quality", "speed", "memory", "kill")
ROWS = {"quality": quality, "speed": speed, "memory": memory, "kill": kill}


def which(document: dict[str, Any]) -> str:
    """The benchmark that wrote a file."""
    return str(document.get("benchmark") or ("kill" if "kills" in document else "?"))


def read(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every result that is shown, in the order in which it is shown."""
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(((which(document), document) for document in documents if which(document) in ROWS), key=lambda item: ORDER.index(item[0]))


def render(documents: list[tuple[str, dict[str, Any]]]) -> str:
    """The table and what has to be known to read it."""
    if not documents:
        return "*No results yet: see [bench/](bench/README.md).*"
    rows = [row for name, document in documents for row in ROWS[name](document)]
    columns = [
        tool for tool in (OURS, *(tool for tool in TITLES if tool not in (OURS, BASELINE)), BASELINE) if any(tool in cells for _, cells in rows)
    ]
    lines = ["| | " + " | ".join(TITLES[tool] for tool in columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += ["| " + " | ".join([label, *(cells.get(tool, "") for tool in columns)]) + " |" for label, cells in rows]
    return "\n".join([*lines, "", " ".join(notes(documents))])


def notes(documents: list[tuple[str, dict[str, Any]]]) -> Iterable[str]:
    """Protocol, versions and hardware, one sentence each."""
    seen = set()
    for name, document in documents:
        if name == "quality":
            protocol, baseline = document["protocol"], document["baseline"]
            texts = " / ".join(f"{text} (perplexity {value['perplexity']:.2f})" for text, value in baseline.items())
            seeds = max(len(row["runs"]) for row in document["results"])
            calibration = protocol["calibration"]
            yield (
                f"Excess loss over the unquantised `{protocol['model']}` in nats on {texts}, windows of {protocol['context']} tokens, "
                f"GPTQ calibrated on {calibration['samples']} x {calibration['length']} tokens, mean of {seeds} draw{'s' if seeds > 1 else ''}; "
                "of each tool's variants the best."
            )
        if name == "speed":
            options, dtype = (document["protocol"].get(key) for key in ("our_options", "rival_dtype"))
            yield f"Speed and memory: `gptq` with {options or 'its defaults, so without QEP'}; rivals compute in {dtype or 'auto'}."
        versions = document.get("stamp", {}).get("versions", {})
        seen |= {(TITLES[tool], found[tool]) for tool, found in versions.items() if tool in TITLES and found and tool in found}
    if seen:
        yield ", ".join(f"{tool} {version}" for tool, version in sorted(seen)) + "."
    machines = {
        f"{stamp['hardware']['cpu']}, {stamp['hardware']['cores']} cores, {stamp['date'][:10]}, commit {stamp['commit'][:9]}"
        for _, document in documents
        if (stamp := document.get("stamp"))
    }
    yield from (f"{machine}." for machine in sorted(machines))


def replaced(readme: str, block: str) -> str:
    """README.md with `block` between the markers."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md has no {BEGIN} ... {END}")
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if README.md differs")
    arguments = parser.parse_args()
    block = render(read(RESULTS))
    before = README.read_text()
    after = replaced(before, block)
    print(block)
    if not arguments.check:
        README.write_text(after)
    elif before != after:
        print("README.md says something else: run python scripts/results.py")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
