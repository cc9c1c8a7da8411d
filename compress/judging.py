"""Which engines will serve what a recipe makes, told before it runs: the exports' verdicts, put to the engines that a user names."""

from __future__ import annotations

from compress.engines.base import REFUSES, Engine, find, tables
from compress.errors import Problems
from compress.layout import Layout
from compress.planning import mixture
from compress.recipe import Recipe, check_copy, expected, export_module, export_names, verdicts
from compress.scheme import Scheme


def judge(engines: list[Engine], recipe: Recipe, layout: Layout, schemes: dict[str, tuple[str, Scheme]], problems: Problems) -> dict[str, str]:
    """What each of `engines` makes of what `recipe` writes, the layout that it reads first; one that reads none of them is a problem.

    For recipes that `recipe.check` has found nothing wrong with; `schemes` are what it returned.
    """
    plan, made = mixture(recipe, layout, schemes), expected(recipe, layout)[-1]

    def reading(engine: Engine, target: str) -> str:
        return engine.verdict(target, verdicts(recipe, made, plan, target))

    found = {}
    for engine in engines:
        read = {target: reading(engine, target) for target in recipe.export}
        taken = [f"{target}: {verdict}" for target, verdict in read.items() if not verdict.startswith(REFUSES)]
        found[engine.text] = taken[0] if taken else "; ".join(read.values())
        if not taken:
            could = [name for name in export_names() if not reading(engine, name).startswith(REFUSES) and _holds(name, recipe, made, plan)]
            others = [name for name in tables() if any(not reading(find(name), target).startswith(REFUSES) for target in recipe.export)]
            remedy = f"add {could[0]} to its export" if could else "change the recipe"
            problems.add(f"--engine {engine.text}", found[engine.text], f"{remedy}, or serve it with one of {', '.join(others)}")
    return found


def _holds(target: str, recipe: Recipe, layout: Layout, plan: dict[str, Scheme]) -> bool:
    """Whether the artifact can be exported so afterwards."""
    problems = Problems()
    if not export_module(target).READABLE:
        check_copy("", target, recipe, layout, plan, problems)
    return not export_module(target).READABLE and not len(problems)
