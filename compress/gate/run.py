"""The table of contents of `compress gate`: open both sides, check what must be the same, measure, decide."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress import __version__, manifest
from compress.checkpoint import Checkpoint
from compress.data import Tokenizer
from compress.errors import InputError, Problems
from compress.gate import decide, integrity, observe, record
from compress.gate.integrity import Exact
from compress.gate.observe import Given, Progress
from compress.gate.record import Record
from compress.gate.rules import Rules
from compress.layout import Layout
from compress.source import locate_model


def save_baseline(rules: Rules, model: str, path: Path, progress: Progress) -> None:
    """Measure a model and write what a later candidate is compared with. Raises `InputError` for what is wrong with the model or the data."""
    record.check_new(path)
    layout = _opened(rules, model)
    problems = Problems()
    for each in (integrity.finite(layout.checkpoint), integrity.whole(layout.checkpoint.folder, rules.integrity.allow)):
        if each and each.what:
            problems.add(model, f"is no baseline: {each.what[0]}", "fetch it again")
    problems.raise_if_any()
    record.save(measured(rules, model, layout, inputs(rules, layout, progress), None, progress), path)


def judge(rules: Rules, candidate: str, against: str, progress: Progress) -> dict[str, Any]:
    """Compare `candidate` with `against`, a model or the JSON file of a baseline: the whole result as plain data, with ``verdict``, ``checks`` and
    ``notes``. Raises `InputError` for whatever keeps the two from being compared."""
    problems = Problems()
    sides: list[Layout | Record | None] = []
    for name, stored in ((candidate, False), (against, Path(against).suffix == ".json")):
        try:
            sides.append(record.load(Path(name)) if stored else _opened(rules, name))
        except InputError as error:
            problems.absorb(error)
    try:
        observe.data(rules)
    except InputError as error:
        problems.absorb(error)
    problems.raise_if_any()
    layout, other = sides
    assert isinstance(layout, Layout) and other is not None
    notes = []
    if isinstance(other, Record):
        _refuse_another_protocol(other.protocol, observe.protocol(rules, other.protocol["stored"], layout), against)
        base, facts, data = other, other.facts, other.data
        notes += [f"{name} {other.versions.get(name)} measured the baseline, {now} the candidate" for name, now in observe.versions().items()
                  if other.versions.get(name) != now]  # fmt: skip
    else:
        observe.protocol(rules, _stored(other), other)  # says which tasks are missing
        facts = integrity.facts(other)
    progress.step("integrity", 1)
    exact = [*integrity.compared(facts, integrity.facts(layout), rules.integrity.allow), integrity.finite(layout.checkpoint)]
    if whole := integrity.whole(layout.checkpoint.folder, rules.integrity.allow):
        exact.append(whole)
    notes += [
        f"{name} has no manifest.json any more: nothing tells whether its files are as they were written"
        for name, side in ((candidate, layout), (against, other))
        if isinstance(side, Layout) and manifest.lost(side.checkpoint.folder)
    ]
    given = inputs(rules, layout, progress)
    if not isinstance(other, Record):
        of_base = inputs(rules, other, progress)
        data = {title: each.digest for title, each in of_base.items()}
    exact.append(
        Exact("tokens", tuple(f"{title} is other tokens than the baseline's" for title, each in given.items() if each.digest != data[title]))
    )
    if failed := [each.name for each in exact if each.what and each.name in ("finite", "tokens", "tensors")]:
        # Figures of models that are given other tokens, or that compute no numbers, say nothing.
        why = f"says nothing while this fails: {', '.join(failed)}"
        checks, protocol = decide.exact(exact) + decide.not_run(rules, why), observe.protocol(rules, _stored(layout), layout)
    else:
        if not isinstance(other, Record):
            base = measured(rules, against, other, of_base, None, progress)
        found = measured(rules, candidate, layout, given, base, progress)
        _refuse_another_protocol(base.protocol, found.protocol | {key: base.protocol[key] for key in ("stored", "dtype")}, against)
        if base.protocol["dtype"] != found.protocol["dtype"]:
            notes.append(f"the baseline computes in {base.protocol['dtype']}, the candidate in {found.protocol['dtype']}")
        if rules.integrity.max_gain is not None:
            exact.append(integrity.gains(base.norms, found.norms, rules.integrity.max_gain, rules.integrity.allow))
        checks, protocol = decide.exact(exact) + decide.decide(rules, base.arrays, found.arrays), base.protocol
    return {
        "verdict": decide.verdict(checks),
        "candidate": candidate,
        "against": against,
        "alpha": rules.alpha,
        "checks": [asdict(check) for check in checks],
        "notes": notes,
        "rules": rules.model_dump(mode="json"),
        "protocol": protocol,
        "protocol_sha256": record.digest(protocol),
        "versions": {"compress": __version__} | observe.versions(),
    }


def _opened(rules: Rules, name: str) -> Layout:
    layout = Layout(Checkpoint(locate_model(name)))
    observe.check(rules, layout)
    # What is wrong with these is told with all else.
    integrity.filled(layout.checkpoint.config, str(layout.checkpoint.folder / "config.json"), "fetch it again")
    manifest.read(layout.checkpoint.folder)
    return layout


def inputs(rules: Rules, layout: Layout, progress: Progress) -> dict[str, Given]:
    """What each suite gives a model, by the tokenizer beside it."""
    return observe.given(rules, layout, Tokenizer(layout.checkpoint.folder), progress)


def measured(rules: Rules, name: str, layout: Layout, given: dict[str, Given], base: Record | None, progress: Progress) -> Record:
    """Everything about a model, for a comparison with `base` or as a baseline of its own."""
    protocol = observe.protocol(rules, _stored(layout), layout)
    arrays, told = observe.observe(name, layout, rules, given, base.arrays if base else None, progress)
    protocol["suites"] = {title: about | told.get(title, {}) for title, about in protocol["suites"].items()}
    norms = integrity.norms(layout) if rules.integrity.max_gain is not None else {}
    data = {title: each.digest for title, each in given.items()}
    return Record(name, protocol, integrity.facts(layout), observe.versions(), data, arrays, norms)


def _stored(layout: Layout) -> str:
    from compress.model import Model

    return str(Model(layout).stored).removeprefix("torch.")


def _refuse_another_protocol(before: dict[str, Any], now: dict[str, Any], place: str) -> None:
    """Raise `InputError` with all that differs, but for what is known only after measuring, where one of them has not been measured yet."""
    known = {title: about.keys() for title, about in now["suites"].items()}
    suites = {title: {key: about[key] for key in about if key not in ("items_sha256", "task_versions") or key in known.get(title, ())}
              for title, about in before["suites"].items()}  # fmt: skip
    problems = Problems()
    for what in record.differences(before | {"suites": suites}, now):
        problems.add(place, f"was measured in another way: {what}", "make the baseline again with --save-baseline, or gate as it was made")
    problems.raise_if_any()
