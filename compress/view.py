"""What a terminal shows: progress while a run lasts, tables when it is over."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class MemoryColumn(ProgressColumn):
    """Most memory resident so far."""

    def render(self, task: Task) -> Text:
        from compress.hardware import peak_bytes

        return Text(f"{human(peak_bytes())} peak", style="dim")


class Watch:
    """Shows one bar per step: what, how far, how long yet, memory."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def step(self, name: str, total: int) -> None:
        self._finish()
        self._task = self._bars.add_task(name, total=total)

    def done(self, units: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=units)

    def blocks(self, done: int, total: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        self._bars.console.print(text, style="dim")

    def _finish(self) -> None:
        if self._task is not None:
            task = next(task for task in self._bars.tasks if task.id == self._task)
            self._bars.update(self._task, completed=task.total)


@contextmanager
def watch(quiet: bool) -> Iterator[Watch]:
    """Progress on standard error; with `quiet` nothing is shown."""
    import warnings

    # Libraries print bars and advice of their own, which would tear ours apart.
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", module="transformers|compressed_tensors|torch")
    columns = (
        SpinnerColumn(finished_text="·"),
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        MemoryColumn(),
    )
    bars = Progress(*columns, console=Console(file=sys.stderr), disable=quiet)
    with bars:
        shown = Watch(bars)
        yield shown
        shown._finish()


def run(result: dict[str, Any], out: Path) -> None:
    """The table that ends a run."""
    console = Console()
    size, evaluation = result["size"], result["evaluation"]
    table = Table(title=f"{result['model']} -> {out}", title_justify="left", show_edge=False)
    for heading in ("", "before", "after", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("size", human(size["before_bytes"]), human(size["after_bytes"]), f"{size['before_bytes'] / size['after_bytes']:.2f}x smaller")
    if size["bits_per_weight"]:
        table.add_row("bits per quantised weight", "", f"{size['bits_per_weight']:.3f}", "")
    if evaluation:
        before, after, low_high = evaluation["baseline"], evaluation["compressed"], evaluation["intervals"]["perplexity_ratio"]
        ratio = evaluation["figures"]["perplexity_ratio"]
        table.add_row(
            "perplexity", f"{before['perplexity']:.3f}", f"{after['perplexity']:.3f}", f"x {ratio:.4f}  [{low_high[0]:.4f}, {low_high[1]:.4f}]"
        )
        table.add_row("accuracy", f"{before['accuracy']:.2%}", f"{after['accuracy']:.2%}", evaluation["protocol"]["accuracy"])
        table.add_row("KL divergence", "", f"{after['kl']:.5f}", "nats")
        table.add_row("same top token", "", f"{after['top1_agreement']:.2%}", "")
        if found := evaluation.get("retrieval"):
            lost = evaluation["intervals"]["retrieval_drop"]
            told = f"{found['task']}, lost {evaluation['figures']['retrieval_drop']:.2%}  [{lost[0]:.2%}, {lost[1]:.2%}]"
            table.add_row("retrieval", f"{found['baseline']['accuracy']:.2%}", f"{found['compressed']['accuracy']:.2%}", told)
        for task, figures in after.get("tasks", {}).items():
            for metric, value in figures.items():
                table.add_row(f"{task} {metric}", f"{before['tasks'][task][metric]:.4f}", f"{value:.4f}", "")
    console.print(table)
    for gate in result["gates"]:
        bounds = ", ".join(f"{kind} {value:g}" for kind, value in gate["bound"].items())
        noise = "" if gate["certain"] else "  (within noise)"
        console.print(f"gate {gate['name']}: {gate['value']:.4g} ({bounds}) {'passed' if gate['passed'] else 'FAILED'}{noise}", highlight=False)
    if result["fallbacks"]:
        console.print(f"{len(result['fallbacks'])} fallbacks taken, see the report", style="yellow")
    console.print(f"{result['seconds']:.0f} s, {human(result['peak_bytes'])} peak memory, report: {out / 'report.html'}", highlight=False)
    console.print("accepted" if result["accepted"] else "not accepted", style="bold green" if result["accepted"] else "bold red")


def comparison(result: dict[str, Any], worth: dict[str, str]) -> None:
    """The tables of `compress compare`; `worth` says by run whether it is worth its bytes."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    runs = result["runs"]
    table = Table(title=f"{result['model']}, {len(runs)} run{'s' if len(runs) > 1 else ''}", title_justify="left", show_edge=False)
    for heading in ("run", "size", "bits/weight", "perplexity x", "KL, nats", "time", "peak", "worth its bytes?", "verdict"):
        table.add_column(heading, justify="left" if heading in ("run", "worth its bytes?", "verdict") else "right", overflow="fold")
    for run in runs:
        bits = run["bits_per_weight"]
        table.add_row(
            run["name"], _known(run["after_bytes"], human), "" if bits is None else f"{bits:.3f}", _with_interval(run, "perplexity_ratio", 4),
            _with_interval(run, "kl", 5), _known(run["seconds"], _duration), _known(run["peak_bytes"], human), worth[run["name"]],
            {True: "accepted", False: "NOT ACCEPTED"}.get(run["accepted"], "not judged"),
        )  # fmt: skip
    console.print(table)
    for title, rows in (
        ("what differs between the recipes", [[row["key"], *row["values"]] for row in result["recipes"]]),
        ("gates", _by_run(runs, lambda run: {gate["name"]: _gate_text(gate) for gate in run["gates"]})),
        ("engines", _by_run(runs, lambda run: run["engines"])),
    ):
        if rows:
            table = Table("", *(run["name"] for run in runs), title=title, title_justify="left", show_edge=False)
            for row in rows:
                table.add_row(*row)
            console.print()
            console.print(table, markup=False)


def _known(value: float | None, told: Callable[[float], str]) -> str:
    return "" if value is None else told(value)


def _by_run(runs: list[dict[str, Any]], told: Callable[[dict[str, Any]], dict[str, str]]) -> list[list[str]]:
    """A row per name that any run tells something of."""
    each = [told(run) for run in runs]
    return [[name, *(said.get(name, "") for said in each)] for name in dict.fromkeys(name for said in each for name in said)]


def _with_interval(run: dict[str, Any], name: str, digits: int) -> str:
    if run[name] is None:
        return "not measured"
    low, high = run["intervals"].get(name) or (None, None)
    return f"{run[name]:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if low is not None and high is not None else "")


def _gate_text(gate: dict[str, Any]) -> str:
    value = "not measured" if gate["value"] is None else f"{gate['value']:.4g}"
    noise = "" if gate["certain"] or gate["value"] is None else ", within noise"
    return f"{value} ({'passed' if gate['passed'] else 'FAILED'}{noise})"


def plan(result: dict[str, Any]) -> None:
    """The table of `compress plan`."""
    console = Console()
    table = Table(show_edge=False)
    for heading in ("pass", "peak memory", "disk", "time"):
        table.add_column(heading, justify="left" if heading == "pass" else "right")
    for step in result["passes"]:
        table.add_row(step["name"], human(step["peak_bytes"]), human(step["disk_bytes"]), _duration(step["seconds"]))
    console.print(table)
    console.print("passes only; reading the source, reopening and evaluating come on top", style="dim", highlight=False)
    size = result["size"]
    bits = f", {size['bits_per_weight']:.3f} bits per quantised weight" if size["bits_per_weight"] else ""
    most = "at most " if size["at_most"] else ""
    console.print(f"size: {human(size['before_bytes'])} -> {most}{human(size['after_bytes'])}{bits}", highlight=False)
    if result["outside"]:
        console.print(f"outside the decoder blocks: {result['outside']} linears quantised", highlight=False)
    if result["cache"]:
        console.print(f"keys and values: {result['cache']}", highlight=False)
    if result["instead"]:
        console.print(_instead(result["instead"]), highlight=False)
    for engine, verdict in result["engines"].items():
        console.print(f"{engine}: {verdict}", highlight=False)


def _instead(found: dict[str, Any]) -> str:
    """Pruning beside fewer bits, in a sentence or two."""
    pruned, quantized, bits = found["pruned"], found["quantized"], found["bits"]
    begin = f"expected to lose {pruned:.3f} nats as demo:dense did; quantising alone to as many bytes, {bits:.2f} bits per weight, "
    if quantized is None:
        return begin + "leaves fewer than 2 bits, which nothing here survives: pruning is what is left"
    if bits == 16:
        return f"expected to lose {pruned:.3f} nats as demo:dense did, and to save no bytes: what pays is hardware that skips zeros"
    worse, better = (pruned, quantized) if pruned > quantized else (quantized, pruned)
    if worse < 1.2 * better:
        return begin + f"{quantized:.3f}: neither is clearly better"
    return begin + f"{quantized:.3f}: " + ("fewer bits lose less" if pruned > quantized else "pruning loses less")


def advice(result: dict[str, Any]) -> None:
    """What was considered and why, on standard error: the recipe itself may go to standard output."""
    console = Console(stderr=True, highlight=False)
    wish, chosen = result["wish"], result["advice"]
    for part in result["parts"]:
        console.print(f"{part['part']}: {part['parameters']:,} parameters, {human(part['bytes'])}")
    table = Table(show_edge=False)
    for heading in ("scheme", "verdict", "needs", ""):
        table.add_column(heading, justify="right" if heading == "needs" else "left", overflow="fold")
    for item in result["considered"]:
        best = item["name"] == chosen["name"]
        needs = "" if item["needs"] is None else human(item["needs"])
        table.add_row(item["name"], item["verdict"], needs, item["against"] or ("taken" if best else ""), style="bold" if best else None)
    console.print(table)
    console.print(
        f"{chosen['text']}: {human(chosen['weight_bytes'])} of weights and {human(chosen['cache_bytes'])} of cache at {wish['context']:,} tokens, "
        f"of {human(wish['memory_bytes'])}; {human(chosen['file_bytes'])} on disk"
    )
    console.print(f"why: {chosen['verdict']}; {'; '.join(chosen['why'])}")
    losses = ", ".join(f"{task} {median:+.1f} % (worst {worst:+.1f} %)" for task, (median, worst) in result["expected"].items())
    console.print(f"expected change: {losses or 'not known'}")
    console.print(f"then look for: {result['gate']['look_for']}")
    for command in result["gate"]["commands"]:
        console.print(f"  {command}", soft_wrap=True)
    for text in (*result["notes"], *result["caveats"]):
        console.print(text, style="dim")


def evaluation(model: str, result: dict[str, Any]) -> None:
    """The lines of `compress eval`."""
    console = Console()
    console.print(
        f"{model}: perplexity {result['perplexity']:.4f}, accuracy {result['accuracy']:.2%} ({result['protocol']['accuracy']})", highlight=False
    )
    for task, figures in result.get("tasks", {}).items():
        console.print(f"{task}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in figures.items()), highlight=False)
    for key, value in result["protocol"].items():
        console.print(f"  {key}: {value}", style="dim", highlight=False)


def speed(result: dict[str, Any]) -> None:
    """The result of `speed.measure`."""
    console = Console()
    decode, prefill, memory, roofline = (result[part] for part in ("decode", "prefill", "memory", "roofline"))
    table = Table(title=f"{result['model']}, {result['threads']} threads, kernels: {result['kernel']}")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row(f"decoding {decode['tokens']} tokens", f"{decode['tokens_per_second']:.2f} tokens/s")
    table.add_row(f"reading {human(decode['bytes_per_token'])} of weights per token", f"{decode['bytes_per_second'] / 1e9:.2f} GB/s")
    table.add_row("of what this machine reads from memory", f"{100 * roofline['fraction']:.0f} % of {roofline['bytes_per_second'] / 1e9:.2f} GB/s")
    table.add_row(f"a prompt of {prefill['tokens']} tokens", f"{prefill['tokens_per_second']:.1f} tokens/s")
    table.add_row("its keys and values", f"{result['cache']['bytes_per_token']:,.0f} bytes a token, of tensors held")
    share = memory["resident_bytes"] / memory["file_bytes"] - 1
    table.add_row("weights in memory", f"{human(memory['resident_bytes'])} ({100 * share:+.1f} % of the file's)")
    console.print(table)
    for remark in result["remarks"]:
        console.print(remark, style="dim")


def retrieval(result: dict[str, Any]) -> None:
    """The table of `compress retrieval`: a row per depth, a column per length."""
    console = Console(highlight=False)
    cells = {(cell["length"], cell["depth"]): cell for cell in result["cells"]}
    lengths, depths = (list(dict.fromkeys(place[axis] for place in cells)) for axis in (0, 1))
    table = Table(title=f"{result['model']}, {result['task']}: right answers of {result['cases']} a cell", title_justify="left")
    table.add_column("depth", justify="right")
    for length in lengths:
        table.add_column(f"{length} tokens", justify="right")
    for depth in depths:
        table.add_row(f"{depth:g}", *(f"{cells[length, depth]['correct']} ({cells[length, depth]['accuracy']:.0%})" for length in lengths))
    console.print(table)
    correct, cases = (sum(cell[name] for cell in cells.values()) for name in ("correct", "cases"))
    console.print(f"{correct} of {cases} in all ({correct / cases:.1%}); an answer is {result['rule']}")
    for remark in result["remarks"]:
        console.print(remark, style="dim")


def gate(result: dict[str, Any]) -> None:
    """The table of `compress gate`."""
    from compress.gate import report

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    table = Table(show_edge=False)
    figures = ("change, 95 % interval", "allowed", "found from", "p, corrected")
    for heading in ("check", "", *figures, ""):
        table.add_column(heading, justify="right" if heading in figures else "left", overflow="fold")
    colours = {"passed": "green", "failed": "bold red"}
    for check in result["checks"]:
        style = colours.get(check["status"], "bold yellow")
        cells = (f"{check['suite']}: {check['name']}", check["status"], *report.figures(check), report.about(check))
        table.add_row(*(Text(cell, style=style if index == 1 else "") for index, cell in enumerate(cells)))
    console.print(table)
    for note in result["notes"]:
        console.print(note, style="dim", markup=False)
    console.print(report.headline(result), style=colours.get(result["verdict"], "bold yellow"), markup=False)


def patterns(result: dict[str, Any]) -> None:
    """The table of `compress pattern`, and what to write into a recipe."""
    console = Console(highlight=False)
    table = Table(title=f"{result['model']}, one token, {result['threads']} threads, beside dense {result['dtype']}", title_justify="left")
    for heading in ("pattern", "times as fast", "mask diversity, bits/weight", "bytes/weight"):
        table.add_column(heading, justify="right")
    for each in result["patterns"]:
        chosen = each["pattern"] == result["chosen"]
        figures = f"{each['speedup']:.2f}", f"{each['diversity']:.4f}", f"{each['bytes_per_weight']:.3f}"
        table.add_row(each["pattern"], *figures, style="bold" if chosen else None)
    console.print(table)
    for remark in result["remarks"]:
        console.print(remark, style="dim")
    if result["chosen"]:
        console.print(f'for a recipe: prune_nm: {{pattern: "{result["chosen"]}"}} and export: [nm-packed]', markup=False, soft_wrap=True)
    else:
        best = max(result["patterns"], key=lambda each: float(each["speedup"]))
        console.print(f"none is {result['speedup']:g} times as fast here; {best['pattern']} comes closest with {best['speedup']:.2f}")


def allocation(result: dict[str, Any]) -> None:
    """The table of `compress allocate`: bits by block and kind of unit."""
    console = Console()
    rows: dict[str, dict[str, int]] = {}
    for unit in result["units"]:
        place, _, kind = unit["name"].rpartition(".")
        rows.setdefault(kind, {})[place.rpartition(".")[2]] = unit["bits"]
    for kind, by_block in rows.items():
        console.print(f"{kind:<12} {' '.join(map(str, by_block.values()))}", highlight=False, soft_wrap=True)
    figures = result["figures"]
    speed = f", at most {figures['tokens_per_second']:.1f} tokens/s" if "tokens_per_second" in figures else ""
    sizes = f"{figures['average_bits']:.3f} bits on average, {figures['bits_per_weight']:.3f} per weight as stored, {human(figures['budget'])} in all"
    console.print(sizes + speed, highlight=False, soft_wrap=True)
    uniform = ", ".join(f"{each['predicted']:.4g} with {each['bits']} bits everywhere" for each in result["uniform"])
    console.print(f"{result['score']} predicts {result['predicted']:.4g}; {uniform}", highlight=False, soft_wrap=True)


def exports(results: list[dict[str, Any]]) -> None:
    """What was written, who reads it and what it lost."""
    console = Console()
    for result in results:
        lost = result["losses"]
        table = Table(title=f"{result['target']}: {result['folder']}, {human(result['bytes'])}", title_justify="left")
        table.add_column("engine")
        table.add_column("reads it")
        for engine, verdict in result["engines"].items():
            table.add_row(engine, verdict)
        console.print(table)
        exact = f"{result['exact']} of {result['exact'] + len(lost)} tensors exact"
        if lost:
            worst = max(lost, key=lambda name: lost[name])
            exact += f"; of the others {worst} lost most: {lost[worst]:.1e} of its energy (all in {result['folder']}/export.json)"
        console.print(exact if result["exact"] + len(lost) else "byte for byte what the artifact holds", markup=False, soft_wrap=True)
    if results and not results[0]["accepted"]:
        unknown = "the artifact has no manifest.json: nothing tells whether its files are as they were written, nor whether its gates passed"
        console.print(unknown if results[0]["accepted"] is None else "the gates of the artifact failed", style="yellow", soft_wrap=True)


def serving(result: dict[str, Any]) -> None:
    """What an engine answered beside what was meant."""
    console = Console()
    table = Table(title=f"{result['folder']} in {result['version']}, {result['dtype']}, by its {result['how']}", title_justify="left")
    for heading in ("prompt", "tokens of it", "answered", "as meant", "largest margin", "prompt off by"):
        table.add_column(heading, justify="right")
    for number, item in enumerate(result["prompts"], 1):
        margin, off = max((token["margin"] for token in item["other"]), default=0.0), item["prompt_logprob_difference"]
        same = item["tokens"] - len(item["other"])
        table.add_row(str(number), str(item["prompt_tokens"]), str(item["tokens"]), str(same), f"{margin:.4f}", "" if off is None else f"{off:.4f}")
    console.print(table)
    console.print("margins and differences in nats, of log probabilities", style="dim", highlight=False)
    for number, item in enumerate(result["prompts"], 1):
        for token in item["other"]:
            said = f"{token['engine']} in place of {token['reference']}, {token['margin']:.4f} nats less likely"
            console.print(f"prompt {number}, token {token['position'] + 1}: {said}", highlight=False)
    if found := result.get("inputs"):
        strayed = (
            f"{found['strayed']} of {found['blocks']} blocks are not what was meant, the others up to {found['largest']:.0e} of their largest number"
        )
        console.print(f"inputs of products: {strayed}", highlight=False)
    first = f", first token after {result['first_token_seconds']:.2f} s" if result["first_token_seconds"] is not None else ""
    speed = f"{result['tokens_per_second']:.1f} tokens/s{first}, ready after {result['load_seconds']:.1f} s"
    console.print(speed, highlight=False)
    without = f" without its {' and '.join(result['left_out'])}, which no other engine computes" if result["left_out"] else ""
    verdict = f"agrees within {result['tolerance']:g} nats of" if result["agrees"] else f"DIFFERS by more than {result['tolerance']:g} nats from"
    console.print(f"{verdict} {result['reference']}{without}", highlight=False)


def inspection(result: dict[str, Any]) -> None:
    """The table of `compress inspect`."""
    console = Console(width=None if sys.stdout.isatty() else 200)  # a name broken in two cannot be searched for
    table = Table(show_edge=False)
    for heading in ("tensor", "shape", "became", "bytes"):
        table.add_column(heading, justify="right" if heading == "bytes" else "left", overflow="fold")
    for item in result["tensors"]:
        table.add_row(item["name"], "x".join(map(str, item["shape"])), item["became"], human(item["bytes"]))
    console.print(table)
    state = {True: "accepted", False: "not accepted", None: "not made by compress"}[result["accepted"]]
    console.print(f"{len(result['tensors'])} weights, {human(result['bytes'])}, {state}", highlight=False)


def human(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
