"""Write the tables of results in docs/results.md, and the most telling rows in README.md, from bench/results/*.json: no figure is typed by hand.

    python scripts/results.py          # write them
    python scripts/results.py --check  # exit 1 if either says anything else

Each file says which benchmark it is of (bench/README.md). Of each tool's methods the one with the smallest mean loss is shown; the JSON
has them all.
"""

import argparse
import json
import statistics
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README, ALL = ROOT / "README.md", ROOT / "docs" / "results.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
OURS, BASELINE = "ours", "rtn"

Rows = list[tuple[str, dict[str, str]]]

GRIDS = {
    "w4g128": "W4 g128 symmetric",
    "w4g128-asym": "W4 g128 asymmetric",
    "w3g128": "W3 g128 symmetric",
    "w3g128-asym": "W3 g128 asymmetric",
    "w2g64": "W2 g64 symmetric",
    "w2g64-asym": "W2 g64 asymmetric",
    "mixed-2.5": "2.5 bits stored per weight, mixed",
    "w8a8": "W8A8 integers",
    "fp8": "W8A8 FP8",
    "nvfp4": "NVFP4 weights",
    "mxfp4": "MXFP4 weights",
    "nvfp4-a4": "NVFP4 weights and inputs",
    "mxfp4-a4": "MXFP4 weights and inputs",
}
"""What a grid of bench/rivals/protocol.py is called here, in the order of the rows."""


def losses(row: dict[str, Any]) -> list[float]:
    """Mean excess loss by evaluation text; empty if the tool did not run."""
    return [text["excess_loss"] for text in row["summary"].values()]


def column(cell: dict[str, Any]) -> str:
    """The column a row of the quality benchmark belongs to: a tool's, or that of plain rounding."""
    return BASELINE if (cell["tool"], cell["method"]) == (OURS, BASELINE) else str(cell["tool"])


def draws(row: dict[str, Any]) -> int:
    """Draws of the calibration windows that a row is the mean of."""
    return sum("losses" in run for run in row["runs"])


def quality(document: dict[str, Any]) -> Rows:
    """One row per grid: excess loss by text, of each tool's methods the best; `*` where it is the mean of fewer draws than others."""
    most = max(map(draws, document["results"]))
    rows = []
    for grid, label in GRIDS.items():
        tools: dict[str, list[dict[str, Any]]] = {}
        for row in document["results"]:
            if row["cell"]["grid"] == grid:
                tools.setdefault(column(row["cell"]), []).append(row)
        shown = {}
        for tool, candidates in tools.items():
            worked = [row for row in candidates if losses(row)]
            if not worked:
                shown[tool] = brief(candidates[0]["status"])
                continue
            best = min(worked, key=lambda row: statistics.mean(losses(row)))
            shown[tool] = " / ".join(f"{loss:.4f}" for loss in losses(best))
            shown[tool] += "*" if best["calibrated"] and draws(best) < most else ""
            shown[tool] += f" ({best['cell']['method']})" if tool == OURS else ""
        if shown:
            rows.append((f"{label}{', outliers planted' if document['protocol']['planted_outliers'] else ''}, excess loss", shown))
    return rows


def brief(status: str) -> str:
    """Why there is no figure, in a word or two."""
    return status if status == "not installed" else "failed"


TABLES = {
    "structured": "a fifth of each block's parameters taken out of MLPs",
    "nm": "half of the weights removed, 2:4",
    "healed": "2:4, then healed",
    "low_rank": "four fifths of the parameters at low rank",
}
"""What a table of bench/pruning.py is called here."""
EXPERT_TABLES = {
    "three quarters": "three quarters of the experts, or of their channels",
    "half": "half of the experts, or of their channels",
    "quarter": "a quarter of the experts",
    "active": "two experts to a token instead of four",
    "quantised": "half of the experts, the rest in 4 bits",
}
"""The same of bench/experts.py."""


def pruning(document: dict[str, Any]) -> Rows:
    """One row per table: excess loss by method, the least first; methods that are random are one."""
    return _losses(document, TABLES)


def experts(document: dict[str, Any]) -> Rows:
    """The same of experts, and what is lost of a task, in percent of its items."""
    rows = _losses(document, EXPERT_TABLES)
    for table in ("half", "quarter"):
        if shown := _by_method(document, table, "accuracy_drop", 100):
            rows.append((f"{EXPERT_TABLES[table].partition(',')[0]}, points of accuracy lost on minimal pairs", {OURS: shown}))
    return rows


VLM_TABLES = {
    "w4": "W4 g128",
    "w3": "W3 g128",
    "w2": "W2 g64",
    "w4a8": "W4A8",
    "w8a8": "W8A8",
    "w3, outliers": "W3 g128 with outlier channels",
    "w4a8, outliers": "W4A8 with outlier channels",
}
"""What a table of bench/vision.py is called here."""


def vlm(document: dict[str, Any]) -> Rows:
    """Three rows per table: what answers about images lose by method, how far predictions are from the source's, and how many answers are lost, the
    least first, with the standard error over draws."""
    rows: Rows = []
    for table, label in VLM_TABLES.items():
        found = {name.partition("/")[2]: runs for name, runs in document["results"].items() if name.startswith(f"{table}/")}
        for key, what, places, times in (
            ("excess_loss", "excess loss of answers", 4, 1),
            ("kl", "KL divergence of answers", 4, 1),
            ("accuracy_drop", "points of answers lost", 1, 100),
        ):
            values = {method: [times * run[key] for run in runs if "error" not in run] for method, runs in found.items()}
            ordered = sorted((each for each in values.items() if each[1]), key=lambda each: statistics.mean(each[1]))
            shown = ", ".join(f"{statistics.mean(each):.{places}f}{_error(each, places)} ({method})" for method, each in ordered)
            if shown:
                rows.append((f"{label} of a model that sees, {what}", {OURS: shown}))
    return rows


GATE_KINDS = {"layer": "a block's scales x 1.05", "linear": "one linear's", "expert": "an expert zeroed", "tokenizer": "a merge gone"}
"""What a regression of bench/gate.py is called here."""


def gate(document: dict[str, Any]) -> Rows:
    """Per model: planted regressions that were caught, by what; and how often a model that did not change failed."""
    rows: Rows = []
    for model, found in document["results"].items():
        shown = ", ".join(
            f"{each['caught']} of {each['runs']} ({GATE_KINDS[kind]}; {each['caught_by_tests']} by tests alone)"
            for kind, each in found["planted"].items()
        )
        rows.append((f"`compress gate`, {model} in 4 bits, planted regressions caught", {OURS: shown}))
        what = {"seeds": "other calibration", "order": "other order of sums, bounds of 0"}
        shown = ", ".join(f"{each['failed']} of {each['runs']} ({what[kind]})" for kind, each in found["unchanged"].items())
        rows.append((f"`compress gate`, {model}, failures where nothing got worse", {OURS: shown}))
    return rows


def kv(document: dict[str, Any]) -> Rows:
    """Two rows per share of the channels that a cache keeps: what text loses by method, and by how much predictions differ, the least first."""
    tokens = document["protocol"]["length"]
    tables = dict.fromkeys(name.partition("/")[0] for name in document["results"])
    rows: Rows = []
    for key, what in (("excess_loss", "excess loss"), ("kl", "KL divergence")):
        for share in tables:
            if shown := _by_method(document, share, key):
                rows.append((f"cache of {share} of the channels, {tokens} tokens, {what}", {OURS: shown}))
    return rows


def kv_recall(document: dict[str, Any]) -> Rows:
    """Answers about what lies far back, by method, at half and at about a fifth of the channels."""
    rows: Rows = []
    for rank, label in (("64", "half of the channels"), ("24", "24 of 128 channels")):
        found = {method: by_rank[rank] for method, by_rank in document["results"].items() if rank in by_rank}
        for place, what, times in ((0, "answers right, %", 100), (1, "loss of answers", 1)):
            ordered = sorted(found.items(), key=lambda item: (-item[1][0], item[1][1]))
            shown = ", ".join(f"{times * each[place]:.{1 if times > 1 else 3}f} ({method})" for method, each in ordered)
            rows.append((f"associative recall through a cache of {label}, {what}", {OURS: shown}))
    return rows


def kv_decode(document: dict[str, Any]) -> Rows:
    """A step of decoding behind each cache, and what it holds."""
    rows: Rows = []
    keep = f"{100 * document['protocol']['keep']:g} %"
    for context, sides in document["results"].items():
        dense = sides["dense"]
        for key, what, shown in (
            ("seconds", "ms a step", lambda value: f"{1e3 * value:.1f}"),
            ("held_bytes", "MB held", lambda value: f"{value / 1e6:.1f}"),
        ):
            ours = ", ".join(f"{shown(side[key])} ({name})" for name, side in sides.items() if name != "dense" and side[key] is not None)
            rows.append((f"cache of {keep} of the channels, a Llama-3-8B layer, {context} tokens, {what}", {OURS: ours, "torch": shown(dense[key])}))
    return rows


def _error(values: list[float], places: int) -> str:
    """The standard error of a mean of several draws."""
    return f" ± {statistics.stdev(values) / len(values) ** 0.5:.{places}f}" if len(values) > 1 else ""


def _losses(document: dict[str, Any], tables: dict[str, str]) -> Rows:
    shown = {label: _by_method(document, table, "excess_loss") for table, label in tables.items()}
    return [(f"{label}, excess loss", {OURS: text}) for label, text in shown.items() if text]


def _by_method(document: dict[str, Any], table: str, key: str, times: float = 1) -> str:
    """The mean of a figure for each method of a table, the least first."""
    most = max(map(len, document["results"].values()))
    found: dict[str, list[float]] = {}
    for name, runs in document["results"].items():
        if name.startswith(f"{table}/") and not name[-3:].replace(":", "").isdigit():  # other patterns are another table's
            method = name.partition("/")[2].partition("-")[0]
            found.setdefault(method, []).extend(times * run[key] for run in runs if "error" not in run)
    means = {method: statistics.mean(values) for method, values in found.items() if values}
    fewer = {method: "*" * (len(found[method]) < most) for method in means}
    places = 3 if times == 1 else 1
    return ", ".join(f"{value:.{places}f}{fewer[method]} ({method})" for method, value in sorted(means.items(), key=lambda item: item[1]))


def speed(document: dict[str, Any]) -> Rows:
    """CPU and wall seconds of one more block, per tool."""
    shape, rows = document["protocol"]["shape"], []
    for key, name in (("cpu_seconds", "CPU seconds"), ("seconds", "wall seconds")):
        shown = {tool: f"{side[key]['median']:.1f}" if side.get(key) else brief(side["status"]) for tool, side in document["sides"].items()}
        mlp = f"{experts} experts of {shape['ffn']}" if (experts := shape.get("experts")) else f"MLP {shape['ffn']}"
        name += ", whole run" if len(shape["layers"]) == 1 else ""
        rows.append((f"GPTQ of one {'Qwen3-MoE' if experts else 'Llama'} block ({shape['hidden']} wide, {mlp}), {name}", shown))
    return rows


def memory(document: dict[str, Any]) -> Rows:
    """Peak memory beside the checkpoint."""
    peak, size = document["run"]["peak_rss_bytes"] / 1e9, document["checkpoint_bytes"] / 1e9
    return [(f"GPTQ of a checkpoint of {size:.2f} GB, peak memory", {OURS: f"{peak:.2f} GB ({document['ratio']:.0%})"})]


def kill(document: dict[str, Any]) -> Rows:
    """Runs that were killed and started again."""
    return [(f"killed at random moments, {document['kills']} times, and started again", {OURS: f"{document['identical']} byte-identical"})]


def decode(document: dict[str, Any]) -> Rows:
    """Tokens per second of a whole model, per width, beside llama.cpp."""
    rows: dict[str, dict[str, str]] = {}
    for row in document["results"]:
        rate, label = row["tokens_per_second"], f"decoding {document['preset']} in {row['bits']} bits, {threads(row)}, tokens/s"
        cells = rows.setdefault(label, {OURS: f"{rate['ours']:.1f}"} if row["digits"] == 2 else {})
        if row["digits"] == 1:
            cells[OURS] += f" ({rate['ours']:.1f} with one digit)"
        elif "llamacpp" in rate:
            cells["llamacpp"] = f"{rate['llamacpp']:.1f} ({row['rival']})"
    return list(rows.items())


def gguf(document: dict[str, Any]) -> Rows:
    """Texts of llama.cpp that are those meant, of all files together."""
    rows = document["results"]
    asked = sum(row["texts"] for row in rows)
    right, alone, plain = (sum(row[key]["texts"] for row in rows) for key in ("following", "alone", "plain"))
    models = " and ".join(dict.fromkeys(f"demo:{row['model']}" for row in rows))
    label = f"{len(rows)} GGUF files of {models} in llama.cpp, texts all of whose {document['tokens']} tokens are those meant"
    return [(label, {OURS: f"{right} of {asked} ({alone} with steps of our own, {plain} with inputs that are not rounded)"})]


def gemv(document: dict[str, Any]) -> Rows:
    """Products with one packed weight: shares of the speed of reading memory, and several inputs beside torch."""
    shares: dict[tuple[int, int], list[float]] = {}
    for row in document["results"]:
        if row["threads"] == 1:
            shares.setdefault((row["bits"], row["digits"]), []).append(row["share"])
    widths = sorted({bits for bits, _ in shares}, reverse=True)
    rows = [
        (
            f"W{bits} times one input, one thread, share of the speed of reading memory",
            {OURS: " / ".join(f"{statistics.median(shares[bits, digits]):.0%}" for digits in (2, 1)) + " (two digits / one)"},
        )
        for bits in widths
    ]
    for row in document["batches"]:
        if row["inputs"] in (16, 512):
            taken = row["milliseconds"]
            cells = {OURS: f"{taken['two digits']:.1f} ({taken['one digit']:.1f} with one digit)"}
            cells["torch"] = f"{taken['torch int4']:.1f} (int4), {taken['torch bfloat16']:.1f} (bfloat16)"
            rows.append((f"W4 {row['rows']} x {row['columns']} times {row['inputs']} inputs, one thread, ms", cells))
    return rows


def sass(document: dict[str, Any]) -> Rows:
    """Machine instructions per weight on GPUs, for one input."""
    rows = []
    for target in dict.fromkeys(row["target"] for row in document["results"]):
        found = {(row["bits"], row["digits"]): row["per_weight"] for row in document["results"] if row["target"] == target and row["tokens"] == 1}
        shown = ", ".join(f"W{bits} {found[bits, 2]:.2f} / {found[bits, 1]:.2f}" for bits in sorted({bits for bits, _ in found}, reverse=True))
        rows.append((f"GPU instructions per weight, {target} (two digits / one; speed not measured)", {OURS: shown}))
    return rows


def threads(row: dict[str, Any]) -> str:
    """`one thread`, `2 threads`."""
    return "one thread" if row["threads"] == 1 else f"{row['threads']} threads"


TITLES = {
    OURS: "compress",
    BASELINE: "plain rounding",
    "autoround": "AutoRound",
    "llmcompressor": "LLM Compressor",
    "gptqmodel": "GPTQModel",
    "hqq": "HQQ",
    "torchao": "torchao",
    "llamacpp": "llama.cpp",
    "torch": "torch",
}
ROWS = {
    "quality": quality,
    "pruning": pruning,
    "experts": experts,
    "vlm": vlm,
    "kv": kv,
    "kv-recall": kv_recall,
    "speed": speed,
    "memory": memory,
    "gate": gate,
    "kill": kill,
    "gguf": gguf,
    "gemv": gemv,
    "decode": decode,
    "sass": sass,
    "kv-decode": kv_decode,
}
"""What makes rows of a result, in the order in which they are shown."""
LOSSES = ("quality", "pruning", "experts", "vlm", "kv", "kv-recall")
"""Those that say what was lost."""


HEADLINES = (
    "W4 g128 symmetric, excess loss",
    "W3 g128 symmetric, excess loss",
    "W2 g64 symmetric, excess loss",
    "2.5 bits stored per weight, mixed, excess loss",
    "W8A8 integers, excess loss",
    "NVFP4 weights, excess loss",
    "a fifth of each block's parameters taken out of MLPs, excess loss",
    "half of the weights removed, 2:4, excess loss",
    "three quarters of the experts, or of their channels, excess loss",
    "W3 g128 with outlier channels of a model that sees, KL divergence of answers",
    "cache of 20 % of the channels, 512 tokens, KL divergence",
    "GPTQ of one Qwen3-MoE block (2048 wide, 128 experts of 768), wall seconds",
    "GPTQ of one Llama block (2048 wide, MLP 5632), wall seconds",
    "GPTQ of a checkpoint of 6.03 GB, peak memory",
    "killed at random moments, 30 times, and started again",
    "`compress gate`, demo:dense in 4 bits, planted regressions caught",
    "`compress gate`, demo:dense, failures where nothing got worse",
    "17 GGUF files of demo:dense and demo:moe in llama.cpp, texts all of whose 64 tokens are those meant",
    "decoding 3b in 4 bits, one thread, tokens/s",
    "decoding 3b in 3 bits, one thread, tokens/s",
    "cache of 20 % of the channels, a Llama-3-8B layer, 32768 tokens, ms a step",
)
"""The rows that README.md shows."""


def which(document: dict[str, Any]) -> str:
    """The benchmark that wrote a file."""
    return str(document.get("benchmark") or ("kill" if "kills" in document else "?"))


def read(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every result that is shown, in the order in which it is shown."""
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(((which(document), document) for document in documents if which(document) in ROWS), key=lambda item: list(ROWS).index(item[0]))


def halves(documents: list[tuple[str, dict[str, Any]]]) -> list[Rows]:
    """What was lost, and what it cost: few tools are in both."""
    return [[row for name, document in documents if (name in LOSSES) is lost for row in ROWS[name](document)] for lost in (True, False)]


def render(documents: list[tuple[str, dict[str, Any]]]) -> str:
    """All tables and what has to be known to read them."""
    tools = {tool for rows in halves(documents) for _, cells in rows for tool in cells}
    return "\n\n".join([*(table(rows) for rows in halves(documents) if rows), "\n".join(f"* {note}" for note in notes(documents, tools))])


def brief_tables(documents: list[tuple[str, dict[str, Any]]], wanted: Collection[str]) -> str:
    """The `wanted` rows. Exits with a message if there is no such row any more."""
    found = halves(documents)
    if missing := set(wanted) - {label for rows in found for label, _ in rows}:
        raise SystemExit(f"no results have the rows {sorted(missing)}: mend HEADLINES")
    return "\n\n".join(table([row for row in rows if row[0] in wanted]) for rows in found)


def table(rows: Rows) -> str:
    """In Markdown, with the columns that have anything."""
    columns = [
        tool for tool in (OURS, *(tool for tool in TITLES if tool not in (OURS, BASELINE)), BASELINE) if any(tool in cells for _, cells in rows)
    ]
    lines = ["| | " + " | ".join(TITLES[tool] for tool in columns) + " |", "|---|" + "---:|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join([label, *(cells.get(tool, "") for tool in columns)]) + " |" for label, cells in rows)])


def notes(documents: list[tuple[str, dict[str, Any]]], shown: Iterable[str]) -> Iterable[str]:
    """Protocol, versions of the tools that are `shown`, and hardware, one sentence each."""
    seen = set()
    for name, document in documents:
        if name == "quality":
            protocol, baseline = document["protocol"], document["baseline"]
            texts = " / ".join(f"{text} (perplexity {value['perplexity']:.2f})" for text, value in baseline.items())
            most, calibration = max(map(draws, document["results"])), protocol["calibration"]
            yield (
                f"Excess loss over the unquantised `{protocol['model']}` in nats on {texts}, windows of {protocol['context']} tokens, "
                f"calibrated on {calibration['samples']} x {calibration['length']} tokens, mean of {most} draw{'s' if most > 1 else ''} "
                "(where marked *, of fewer); of each tool's methods the best."
            )
        if name in ("pruning", "experts"):
            protocol, most = document["protocol"], max(map(len, document["results"].values()))
            yield (
                f"{name.capitalize()}: "
                f"nats above `{protocol['model']}` on {protocol['windows']} windows of {protocol['length']} tokens of demo:heldout, "
                f"calibrated on {protocol['samples']} x {protocol['length']} tokens of demo:text, mean of {most} draw{'s' if most > 1 else ''} "
                "(where marked *, of fewer)."
            )
        if name == "vlm":
            protocol, most = document["protocol"], max(map(len, document["results"].values()))
            yield (
                f"Model that sees: nats per token of answers above `{protocol['model']}` on {protocol['windows']} questions of demo:images-heldout, "
                f"calibrated on {protocol['samples']} questions of demo:images, or of as many x {protocol['length']} tokens of demo:text; mean and "
                f"standard error of {most} draws, one where no error stands."
            )
        if name == "kv":
            protocol = document["protocol"]
            yield (
                f"Caches: nats above `{protocol['model']}` on {protocol['windows']} windows of {protocol['length']} tokens of demo:heldout, each "
                f"token with the 32 before it exactly, older ones from the cache; calibrated on {protocol['samples']} x {protocol['length']} tokens."
            )
        if name == "gate":
            protocol = document["protocol"]
            windows = f"{protocol['windows']} windows of {protocol['context']} tokens of demo:heldout"
            yield f"Gate: {windows}, alpha 0.05, beside a stored baseline of another calibration."
        if name == "kv-recall":
            protocol = document["protocol"]
            yield f"Recall: {protocol['pairs']} pairs, {protocol['questions']} questions, no window, the model of tests/recall.py."
        if name == "kv-decode":
            protocol = document["protocol"]
            yield f"Decoding behind caches: {protocol['dtype']}, one row, {protocol['steps']} steps, medians; torch: the dense cache of transformers."
        if name == "gguf":
            yield (
                f"GGUF: one file for each type, {document['results'][0]['texts']} prompts of {document['prompt']} tokens of demo:heldout; meant are "
                "inputs rounded as llama.cpp rounds them, to its side where they are within a 32nd of a step of an edge (docs/export.md)."
            )
        if name == "gemv":
            yield (
                "Shares: median over shapes, of what the same thread reads in the same run; inputs are written with two digits of 8 bits unless it "
                "says one, which is what llama.cpp does."
            )
        if name == "speed":
            options, dtype = (document["protocol"].get(key) for key in ("our_options", "rival_dtype"))
            yield f"Speed and memory: `gptq` with {options or 'its defaults, so without QEP'}; rivals compute in {dtype or 'auto'}."
        for tool, versions in document.get("stamp", {}).get("versions", {}).items():
            # Some packages have a hyphen where the tool has none.
            found = {package.replace("-", ""): version for package, version in (versions or {}).items()}
            if tool in shown and tool in found:
                seen.add((TITLES[tool], found[tool]))
    if seen:
        yield ", ".join(f"{tool} {version}" for tool, version in sorted(seen)) + "."
    machines = {
        f"{stamp['hardware']['cpu']}, {stamp['hardware']['cores']} cores, {stamp['date'][:10]}, commit {stamp['commit'][:9]}"
        for _, document in documents
        if (stamp := document.get("stamp"))
    }
    yield from (f"{machine}." for machine in sorted(machines))


def replaced(text: str, block: str) -> str:
    """A document with `block` between the markers."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"there is no {BEGIN} ... {END} to write between")
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document differs")
    arguments = parser.parse_args()
    documents = read(RESULTS)
    differing = 0
    for path, block in ((README, brief_tables(documents, HEADLINES)), (ALL, render(documents))):
        before = path.read_text()
        after = replaced(before, block)
        if not arguments.check:
            path.write_text(after)
        elif before != after:
            print(f"{path.name} says something else: run python scripts/results.py")
            differing = 1
    return differing


if __name__ == "__main__":
    raise SystemExit(main())
