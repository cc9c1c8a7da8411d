"""The command line. Everything heavy is imported where it is used, so that `compress --help` answers at once."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from compress.errors import Exit, InputError, Interrupted, Problems

if TYPE_CHECKING:
    from compress.layout import Layout
    from compress.places import Places
    from compress.recipe import Recipe
    from compress.scheme import Scheme

app = typer.Typer(
    help="A compiler for LLM and VLM checkpoints: a recipe and a model in, a packed checkpoint and a report of what was lost out.",
    epilog="Exit codes: 0 accepted, 1 a bug of ours, 2 bad recipe, model or data, 3 a gate failed (`gate`: or cannot tell; `pattern`: none is so "
    "fast; `serve-check`: an engine answers otherwise), 4 interrupted (the same command continues).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe file, or the name of one that `compress recipes` lists")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="a local folder, a hub id, or demo:dense, demo:moe, demo:vlm")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


def _version(wanted: bool) -> None:
    if wanted:
        from compress import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")] = False,
) -> None:
    """What stands before any command."""


@app.command()
def run(
    recipe: RecipeArgument,
    model: ModelArgument,
    out: Annotated[Path | None, typer.Option(help="folder of the artifact [default: the model's and the recipe's name]")] = None,
    work: Annotated[Path | None, typer.Option(help="folder for unfinished blocks, to continue from [default: OUT.work]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT if it exists")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compress MODEL as RECIPE says, measure what was lost and judge it."""
    with _errors(as_json):
        from compress import pipeline
        from compress.places import Places

        path = _find(recipe)
        target = out or Path(f"{_called(model)}-{path.stem}")
        places = Places(target, work or target.with_name(target.name + ".work"), overwrite)
        chosen, path, _, _, _ = _planned(path, model, places=places)
        from compress import view

        options = {"--out": out, "--work": work, "--overwrite": overwrite, "--json": as_json}
        words = [word for name, value in options.items() if value for word in ((name,) if value is True else (name, str(value)))]
        command = shlex.join(["compress", "run", str(recipe), model, *words])
        request = pipeline.Request(chosen, path.name, model, places.out, places.work, overwrite, command)
        with _interruptible(), view.watch(as_json) as progress:
            result = pipeline.run(request, progress)
        if as_json:
            typer.echo(json.dumps(result))
        else:
            view.run(result, target)
        raise typer.Exit(Exit.ACCEPTED if result["accepted"] else Exit.GATE_FAILED)


@app.command()
def check(
    recipe: RecipeArgument,
    model: ModelArgument,
    engine: Annotated[
        list[str] | None, typer.Option(help="what shall serve the result, such as vllm or vllm==0.33: a problem if it cannot; may be repeated")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Everything that can be known before weights load; all mistakes at once."""
    with _errors(as_json):
        chosen, _, layout, plan, told = _planned(recipe, model, engine or [])
        inside = len(plan.keys() - layout.outside.keys())
        if as_json:
            counts = {"linears": len(layout.linears), "quantized": len(plan), "outside": len(plan) - inside}
            typer.echo(json.dumps({"ok": True} | counts | {"engines": told}))
        else:
            steps = ", ".join(name for name, _ in chosen.instances())
            beyond = f", and {len(plan) - inside} outside them" if len(plan) > inside else ""
            typer.echo(f"ok: {steps}; {inside} of {len(layout.linears)} linears in {len(layout.blocks)} blocks{beyond} will be quantised")
            for name, verdict in told.items():
                typer.echo(f"{name}: {verdict}")


@app.command()
def plan(recipe: RecipeArgument, model: ModelArgument, as_json: JsonOption = False) -> None:
    """What a run will cost and give: memory, disk and time per pass, size, and a verdict per engine."""
    with _errors(as_json):
        chosen, _, layout, schemes, _ = _planned(recipe, model)
        from compress import planning, view

        result = planning.plan(chosen, layout, schemes)
        if as_json:
            typer.echo(json.dumps(result))
        else:
            view.plan(result)


@app.command()
def advise(
    model: ModelArgument,
    memory: Annotated[str, typer.Option(help="what weights and cache may take, such as 12GiB; what the engine itself needs comes on top")],
    engine: Annotated[str, typer.Option(help="what will serve it: vllm, sglang or transformers")],
    goal: Annotated[str, typer.Option(help="lossless, balanced (least loss that fits) or smallest (that may be taken)")] = "balanced",
    use: Annotated[str, typer.Option(help="chat or reasoning, which suffers first")] = "chat",
    context: Annotated[int | None, typer.Option(help="tokens the cache must hold [default: 4096, or as many as the model takes]", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="write the recipe here rather than to standard output")] = None,
    as_json: JsonOption = False,
) -> None:
    """A recipe for MODEL that fits a memory and an engine, with its reasons, what it may lose and how to find out."""
    with _errors(as_json):
        from compress import advice, view
        from compress.pipeline import open_layout

        layout = open_layout(model)
        result = advice.advise(layout, model, advice.wish(layout, memory, engine, goal, use, context), str(out or "recipe.yaml"))
        if out:
            _write_new(out, result["recipe"], "choose another --out")
        if as_json:
            typer.echo(json.dumps(result))
            return
        view.advice(result)
        if not out:
            typer.echo(result["recipe"], nl=False)


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="what to continue")],
    tokens: Annotated[int, typer.Option(help="at most this many new tokens", min=1)] = 100,
    digits: Annotated[int, typer.Option(help="8-bit digits per input of a packed linear: 2 costs next to nothing, 1 is faster", min=1, max=2)] = 2,
) -> None:
    """Continue PROMPT with MODEL, packed weights staying packed, and print tokens as they come."""
    with _errors(False):
        from compress import runtime

        with _interruptible():
            loaded = runtime.load(model, digits=digits)
            for line in runtime.remarks(loaded):
                typer.echo(line, err=True)
            for piece in runtime.stream(loaded, model, prompt, tokens):
                typer.echo(piece, nl=False)
        typer.echo()


@app.command()
def bench(
    model: ModelArgument,
    tokens: Annotated[int, typer.Option(help="so many to decode, three times", min=1)] = 32,
    threads: Annotated[int | None, typer.Option(help="to compute with [default: as many as torch takes]", min=1)] = None,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write everything measured here too, as JSON")] = None,
) -> None:
    """How fast MODEL runs here, packed: decoding beside the speed of memory, reading a prompt, and the memory it takes."""
    with _errors(False):
        from compress import speed, view

        _check_new(out, "choose another --json")
        with _interruptible():
            result = speed.measure(model, tokens, threads)
        if out is not None:
            _write_new(out, json.dumps(result, indent=2) + "\n", "choose another --json")
        view.speed(result)


@app.command()
def retrieval(
    model: ModelArgument,
    task: Annotated[
        str, typer.Option(help="lines (one of many is asked for), passkey (a number hidden in filler) or recall (pairs of tokens)")
    ] = "lines",
    lengths: Annotated[str, typer.Option(help="of prompts in tokens, parted by commas")] = "512,1024",
    depths: Annotated[str, typer.Option(help="where it stands, from 0 (the beginning) to 1 (the end), parted by commas")] = "0,0.25,0.5,0.75,1",
    cases: Annotated[int, typer.Option(help="prompts for each length and depth")] = 10,
    seed: Annotated[int, typer.Option(help="of names and numbers")] = 0,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write every answer here too, as JSON")] = None,
) -> None:
    """Whether MODEL, packed, finds what it was told far back: accuracy by length of the prompt and depth in it."""
    with _errors(False):
        from compress import view
        from compress.pipeline import open_layout

        _check_new(out, "choose another --json")
        layout = open_layout(model)
        from compress import runtime
        from compress.checkpoint import write_text
        from compress.data import Tokenizer
        from compress.evaluate import retrieval

        wanted = retrieval.wish(task, lengths, depths, cases, seed, layout.text_config.get("max_position_embeddings"))
        with _interruptible(), view.watch(False) as progress:
            tokenizer = Tokenizer(layout.checkpoint.folder).plain
            made = retrieval.prompts(wanted, tokenizer, progress)
            loaded = runtime.load(model)
            result = {"model": model} | retrieval.measure(loaded, tokenizer, wanted, made, progress) | {"remarks": runtime.remarks(loaded)}
        if out is not None:
            write_text(out, json.dumps(result, indent=2) + "\n")
        view.retrieval(result)


@app.command()
def pattern(
    model: ModelArgument,
    speedup: Annotated[float, typer.Option(help="how many times as fast products of one token shall be, such as 1.5")],
    threads: Annotated[int | None, typer.Option(help="to compute with [default: as many as torch takes]", min=1)] = None,
    as_json: JsonOption = False,
) -> None:
    """The V:N:M pattern for MODEL that is so fast on this machine and loses least; exits with 3 if none is so fast."""
    with _errors(as_json):
        from compress import patterns, view

        with _interruptible(), view.watch(as_json) as progress:
            result = patterns.search(model, speedup, threads, progress)
        if as_json:
            typer.echo(json.dumps(result))
        else:
            view.patterns(result)
        raise typer.Exit(Exit.ACCEPTED if result["chosen"] else Exit.GATE_FAILED)


@app.command("eval")
def evaluate(
    model: ModelArgument,
    data: Annotated[str, typer.Option(help="a .txt file, a folder of images with data.jsonl, or demo:heldout")] = "demo:heldout",
    context: Annotated[int, typer.Option(help="tokens per window", min=2)] = 512,
    windows: Annotated[int | None, typer.Option(help="at most this many windows [default: all]", min=1)] = None,
    pairs: Annotated[str | None, typer.Option(help="minimal pairs for accuracy, e.g. demo:pairs")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="an lm-eval task or task file; may be repeated")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure MODEL, compressed or not: perplexity, accuracy, lm-eval tasks."""
    with _errors(as_json):
        from compress import recipe, view
        from compress.pipeline import open_layout

        options = recipe.Evaluation(data=data, context=context, windows=windows, pairs=pairs, tasks=tuple(tasks or ()))
        layout = open_layout(model)
        from compress.data import Tokenizer
        from compress.evaluate import measure

        with _interruptible(), view.watch(as_json) as progress:
            progress.step("evaluate", len(layout.blocks))
            result = measure.alone(layout, options, Tokenizer(layout.checkpoint.folder), progress)
        if as_json:
            typer.echo(json.dumps(result))
        else:
            view.evaluation(model, result)


@app.command()
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="a finished artifact, any checkpoint compressed-tensors wrote, or demo:dense, demo:moe")
    ],
    to: Annotated[str, typer.Option(help="layouts, parted by commas: gptq, awq, mlx, gguf, compressed-tensors")],
    out: Annotated[Path | None, typer.Option(help="folder to write, with several layouts one inside it for each [default: DIR-LAYOUT]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what an earlier export wrote there")] = False,
    rejected: Annotated[bool, typer.Option("--rejected", help="also where the artifact's gates failed")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the codes of DIR in other layouts, for engines that read no other: no calibration, and what is lost is measured."""
    with _errors(as_json):
        targets = list(dict.fromkeys(name.strip() for name in to.split(",") if name.strip()))
        if not targets:
            raise InputError.one("--to", "names no layout")
        from compress import exporting, view

        if str(folder).startswith("demo:"):
            from compress.source import demo_model

            artifact, beside = demo_model(str(folder)), Path(str(folder).replace(":", "-"))
        else:
            artifact = beside = Path(os.path.abspath(folder))  # so that it has a name where it was given as a dot
        places = exporting.folders(beside, targets, out)
        with _interruptible(), view.watch(as_json) as progress:
            results = exporting.export(artifact, places, progress, overwrite=overwrite, rejected=rejected)
        if as_json:
            typer.echo(json.dumps(results))
        else:
            view.exports(results)


@app.command("serve-check")
def serve_check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="an artifact, or what `compress export` made of one")],
    engine: Annotated[str, typer.Option(help="what shall serve it: vllm, llama.cpp, transformers, gptqmodel, mlx or compress")],
    python: Annotated[Path | None, typer.Option(help="the interpreter that has the engine [default: this one]")] = None,
    prompts: Annotated[Path | None, typer.Option(help="a text file with a prompt per line [default: four of ours]")] = None,
    tokens: Annotated[int, typer.Option(help="so many to continue each prompt with", min=1)] = 32,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16, to compute in [default: what suits the engine]")] = None,
    reference: Annotated[Path | None, typer.Option(help="the artifact that DIR was exported from [default: DIR]")] = None,
    timeout: Annotated[float, typer.Option(help="seconds to start and answer in", min=1)] = 900,
    as_json: JsonOption = False,
) -> None:
    """Start an engine on DIR, and compare what it answers with what the artifact means; exits with 3 where they differ."""
    with _errors(as_json):
        with _interruptible():  # from here on: what follows imports for seconds
            from compress import serving, view

            result = serving.check(serving.wish(folder, engine, python, prompts, tokens, dtype, reference, timeout))
        if as_json:
            typer.echo(json.dumps(result))
        else:
            view.serving(result)
        raise typer.Exit(Exit.ACCEPTED if result["agrees"] else Exit.GATE_FAILED)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of artifacts, or their files report.json")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write one page with plots too, which needs nothing else")] = None,
    as_json: JsonOption = False,
) -> None:
    """Runs of one model beside each other: which are worth their bytes, and what their recipes do differently."""
    with _errors(as_json):
        from compress import compare, view
        from compress.report import comparison

        _check_new(html, "choose another --html")
        result = compare.compare(compare.read(runs))
        if html is not None:
            _write_new(html, comparison.page(result), "choose another --html")
        if as_json:
            typer.echo(json.dumps(result))
        else:
            view.comparison(result, {run["name"]: comparison.worth(run["name"], result)[0] for run in result["runs"]})


@app.command()
def gate(
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="the model to judge: a folder, a hub id, or demo:dense, demo:moe, demo:vlm")],
    rules: Annotated[Path, typer.Option("--gate", metavar="FILE", help="what is measured and how much worse it may get")] = Path("gate.yaml"),
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="the model it must not be worse than, or the .json of a baseline")] = None,
    baseline: Annotated[
        Path | None, typer.Option("--save-baseline", metavar="FILE", help="judge nothing; keep what is measured as a baseline")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the whole result here")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="write JUnit XML here")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="write a comment for a pull request here")] = None,
) -> None:
    """Whether CANDIDATE got worse: exact checks, and paired tests that noise does not fail; exits with 3 if it did."""
    with _errors(False):
        from compress.gate import rules as files

        problems = Problems()
        try:
            chosen = files.load(rules)
        except InputError as error:
            problems.absorb(error)
        if (against is None) == (baseline is None):
            problems.add("compress gate", "takes either --against or --save-baseline", "give one of them")
        reports = [path for path in (out, junit, markdown) if path is not None]
        if baseline is not None and reports:
            problems.add(str(reports[0]), "is for a verdict, and --save-baseline gives none", "leave it out")
        for path in [*reports, *filter(None, [baseline])]:
            _check_writable(path, problems)
        problems.raise_if_any()
        from compress import view
        from compress.checkpoint import write_text
        from compress.gate import report, run

        with _interruptible(), view.watch(False) as progress:
            if baseline is not None:
                run.save_baseline(chosen, candidate, baseline, progress)
                raise typer.Exit(Exit.ACCEPTED)
            assert against is not None
            result = run.judge(chosen, candidate, against, progress)
        view.gate(result)
        for file, text in ((out, json.dumps(result, indent=2) + "\n"), (junit, report.junit(result)), (markdown, report.markdown(result))):
            if file is not None:
                try:
                    write_text(file, text)
                except OSError as error:
                    problems.add(str(file), f"cannot be written ({error.strerror})", "choose another file")
        problems.raise_if_any()
        raise typer.Exit(Exit.ACCEPTED if result["verdict"] == "passed" else Exit.GATE_FAILED)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="an artifact, or any checkpoint folder")],
    as_json: JsonOption = False,
) -> None:
    """What each tensor became."""
    with _errors(as_json):
        from compress import inspection, view

        result = inspection.inspect(folder)
        if as_json:
            typer.echo(json.dumps(result))
        else:
            view.inspection(result)


@app.command()
def allocate(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="the plan.json of an artifact whose recipe allocated bits")],
    average_bits: Annotated[float | None, typer.Option(help="budget: bits of a code, averaged over the weights")] = None,
    bits_per_weight: Annotated[float | None, typer.Option(help="budget: everything stored per weight, in bits")] = None,
    budget: Annotated[str | None, typer.Option(help="budget: bytes of all tensors of the artifact, such as 12GiB")] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="budget: decoding one sequence, by --bandwidth alone")] = None,
    bandwidth: Annotated[str | None, typer.Option(help="of memory per second, such as 900GB")] = None,
    score: Annotated[str | None, typer.Option(help="which scores of the plan to go by [default: those its choice went by]")] = None,
    out: Annotated[Path | None, typer.Option(help="file for the new plan, for `allocate: {reuse: FILE}` in a recipe")] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose bits anew for another budget, from the scores of PLAN and without the model."""
    with _errors(as_json):
        from compress import allocation, view

        wanted = allocation.budget(
            {
                "average_bits": average_bits,
                "bits_per_weight": bits_per_weight,
                "budget": budget,
                "tokens_per_second": tokens_per_second,
                "bandwidth": bandwidth,
            },
            "allocate",
        )
        chosen = allocation.read(plan).solved(wanted, score, "allocate")
        if out is not None:
            if out.exists():
                raise InputError.one(str(out), "exists already", "choose another --out")
            allocation.write(chosen, out)
        if as_json:
            typer.echo(json.dumps(chosen.summary()))
        else:
            view.allocation(chosen.summary())


@app.command()
def recipes(as_json: JsonOption = False) -> None:
    """The recipes that ship with the project."""
    with _errors(as_json):
        found = [{"name": path.stem, "path": str(path), "summary": _summary(path)} for path in _shipped()]
        if as_json:
            typer.echo(json.dumps(found))
        else:
            for item in found:
                typer.echo(f"{item['name']:<12} {item['summary']}")


def main() -> None:
    """The console script."""
    app(prog_name="compress")


def _check_new(path: Path | None, remedy: str) -> None:
    """Raise `InputError` for a file that is there already or cannot be, before it takes long to find out."""
    if path is not None and (path.exists() or not path.parent.is_dir()):
        raise InputError.one(str(path), "exists already" if path.exists() else "lies in no folder that exists", remedy)


def _check_writable(path: Path, problems: Problems) -> None:
    """Report a file that cannot be written or replaced, by trying: permissions do not tell all."""
    if path.is_dir() or not path.parent.is_dir():
        problems.add(str(path), "is a folder" if path.is_dir() else "lies in no folder that exists", "choose another file")
        return
    tried = path.with_name(f"{path.name}.arrays.partial")  # the longest name that is needed on the way
    try:
        tried.open("ab").close()
        tried.unlink()
    except OSError as error:
        problems.add(str(path), f"cannot be written ({error.strerror})", "choose another file")


def _write_new(path: Path, text: str, remedy: str) -> None:
    """Write a file that must not exist yet."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError.one(str(path), f"cannot be written ({error.strerror})", remedy) from error


def _find(path: Path) -> Path:
    """A recipe file, or one that ships, by its name; a folder, such as the artifact that it made, may be called the same."""
    if not path.is_file() and path.parent == Path():
        return next((shipped for shipped in _shipped() if path.name in (shipped.name, shipped.stem)), path)
    return path


def _called(model: str) -> str:
    """What a model is called in the name of what is made of it: the last part of a path or hub id."""
    if Path(model).name in ("", "..") and not model.startswith("demo:"):
        model = os.path.abspath(model)
    return model.rstrip("/").replace(":", "-").rpartition("/")[2]


def _planned(
    path: Path, model: str, engines: Sequence[str] = (), places: Places | None = None
) -> tuple[Recipe, Path, Layout, dict[str, tuple[str, Scheme]], dict[str, str]]:
    """Recipe and model, opened and checked against each other, for `places` and for `engines`, whose verdicts come last; every mistake is reported
    at once."""
    from compress import judging, recipe
    from compress import places as folders
    from compress.engines.base import find_all
    from compress.pipeline import open_layout

    problems = Problems()
    named = find_all(engines, problems)
    told: dict[str, str] = {}
    path = _find(path)
    chosen = layout = None
    plain: object = None
    schemes: dict[str, tuple[str, Scheme]] = {}
    try:
        plain = recipe.read(path)
        chosen = recipe.validate(plain, path.name)
    except InputError as error:
        problems.absorb(error)
    try:
        layout = open_layout(model)
    except InputError as error:
        problems.absorb(error)
    sound = chosen or recipe.salvage(plain)
    if layout and sound:
        try:
            schemes = recipe.check(sound, layout, path.name)
            told = judging.judge(named, sound, layout, schemes, problems)
        except InputError as error:
            problems.absorb(error)
    if places:
        folders.check(places, chosen, layout, schemes, problems)
    problems.raise_if_any()
    assert chosen and layout
    return chosen, path, layout, schemes, told


def _shipped() -> list[Path]:
    """Recipes lie inside an installed package, and beside the package in a clone."""
    here = Path(__file__).resolve().parent
    folder = next((folder for folder in (here / "recipes", here.parent / "recipes") if folder.is_dir()), None)
    return sorted(folder.glob("*.yaml")) if folder else []


def _summary(path: Path) -> str:
    """The second line of a recipe says what it is for; the first is the command that runs it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[1].removeprefix("#").strip() if len(lines) > 1 else ""


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    """Turn what the user can mend into messages and exit code 2, and an interruption into 4."""
    try:
        yield
    except InputError as error:
        if as_json:
            typer.echo(json.dumps({"errors": [{"place": p.place, "what": p.what, "remedy": p.remedy} for p in error.problems]}))
        else:
            for problem in error.problems:
                typer.echo(f"error: {problem}", err=True)
        raise typer.Exit(Exit.BAD_INPUT) from error
    except (Interrupted, KeyboardInterrupt) as error:
        typer.echo("interrupted, with nothing half-written; a run continues where it stopped if the same command is given again", err=True)
        raise typer.Exit(Exit.INTERRUPTED) from error


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let a polite kill end a run like Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Interrupted

    before: Any = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
