"""An evolutionary search over which experts stay and what each of them becomes (EEP, arXiv 2407.00945).

Individuals have one gene per group of blocks. Fitness is whatever is asked for, of the model as it would be written; no gradient is taken. First
only choices are varied, then experts become mixtures of all. Every individual that was evaluated is a line of a journal, which is how a killed
search goes on.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compress.state import line, lines

PRUNING, MERGING = "prune", "merge"
FRONT, FROM_FRONT = 6, 0.6
"""Of the parents so many of the best are taken rather than the rest, so often."""
CHANGED, REPLACED = 0.25, 0.15
"""How often the gene of a group changes, and an expert in it."""
CROSSED = 0.3
"""How often, when merging, a child has two parents."""
TOUCHED, WIDTH, RESCALED = 0.25, 0.065, 0.1
"""How often a coefficient changes, by how much, and how often rows are made to sum to one again. All these are the paper's."""
LOCAL, SCALED = 0.5, 0.05
"""How often a child is the best but for one small change, and by how much the logarithm of a size changes then. Not the paper's: with its changes
alone, 210 individuals found nothing better than a one-shot choice of half of 16 experts (docs/log.md)."""


Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Gene:
    """Of a group of blocks: the experts that are ``kept``, ascending, the ``mix`` [kept, experts] that each of them becomes, if it is one, and the
    map ``routes`` [kept, experts] of their routers, if they have one that gives not just to each its own."""

    kept: tuple[int, ...]
    mix: Matrix | None = None
    routes: Matrix | None = None

    def themselves(self, experts: int) -> Matrix:
        """What says that each expert is itself, or keeps its own probability."""
        return tuple(tuple(float(one == kept) for one in range(experts)) for kept in self.kept)


Individual = tuple[Gene, ...]


@dataclass(frozen=True)
class Found:
    """An individual, what came out, and in which phase."""

    individual: Individual
    fitness: float
    phase: str


@dataclass(frozen=True)
class Options:
    """`experts` of which `count` stay, in each of `sectors` equally many; how many generations of each phase; fitness within which a parent is as
    good as the best, for changes and for crossing; ``seed``; whether routers are `mapped`, whose maps vary as mixtures do."""

    experts: int
    count: int
    sectors: int
    prune: int
    merge: int
    near: tuple[float, float]
    seed: int
    mapped: bool = False


class Search:
    """`go` evaluates `seeds`, then one child after the other."""

    def __init__(self, options: Options, fitness: Callable[[Individual], float], seeds: Sequence[Individual], journal: Path) -> None:
        self._options, self._fitness, self._seeds, self._journal = options, fitness, seeds, journal
        self.archive = _read(journal)
        self._known = {found.individual: found.fitness for found in self.archive}

    @property
    def total(self) -> int:
        """How many individuals are looked at."""
        return len(self._seeds) + self._options.prune + self._options.merge

    def go(self, advance: Callable[[Found], None]) -> list[Found]:
        """All that were evaluated; `advance` is told of each."""
        with self._journal.open("a", encoding="utf-8") as journal:
            for number in range(len(self.archive), self.total):
                phase = PRUNING if number < len(self._seeds) + self._options.prune else MERGING
                individual = self._seeds[number] if number < len(self._seeds) else self._child(phase, random.Random(f"{self._options.seed}-{number}"))
                if individual not in self._known:
                    self._known[individual] = self._fitness(individual)
                found = Found(individual, self._known[individual], phase)
                self.archive.append(found)
                journal.write(_line(found))
                journal.flush()
                os.fsync(journal.fileno())
                advance(found)
        return self.archive

    def best(self) -> Found:
        """The first of the fittest."""
        return max(self.archive, key=lambda found: found.fitness)

    def _parents(self, near: float) -> list[Individual]:
        """Those nearly as fit as the best, and as many more as there are at the front, the fittest first."""
        ranked = sorted({found.individual: found.fitness for found in self.archive}.items(), key=lambda each: -each[1])
        return [individual for place, (individual, fitness) in enumerate(ranked) if fitness >= ranked[0][1] - near or place < FRONT]

    def _child(self, phase: str, rng: random.Random) -> Individual:
        change, cross = self._options.near
        if rng.random() < LOCAL:
            return self._neighbour(phase, rng)
        if rng.random() < CROSSED:
            parents = self._parents(cross)
            one, other = rng.choice(parents), rng.choice(parents)
            if one != other:
                return tuple(rng.choice(pair) for pair in zip(one, other, strict=True))
        parents = self._parents(change)
        parent = rng.choice(parents[:FRONT] if rng.random() < FROM_FRONT else parents)
        changes = [self._replaced] if phase == PRUNING else [self._mixed, self._rerouted] if self._options.mapped else [self._mixed]
        child = parent
        while child == parent:
            for vary in changes:
                child = tuple(vary(gene, rng) if rng.random() < CHANGED else gene for gene in child)
        return child

    def _neighbour(self, phase: str, rng: random.Random) -> Individual:
        """The best with one gene changed in one respect."""
        best = self.best().individual
        place = rng.randrange(len(best))
        ways = [self._exchanged] if phase == PRUNING else [self._scaled, self._nudged, *([self._diverted] if self._options.mapped else [])]
        return (*best[:place], rng.choice(ways)(best[place], rng), *best[place + 1 :])

    def _exchanged(self, gene: Gene, rng: random.Random) -> Gene:
        """One expert for another of its sector."""
        size = self._options.experts // self._options.sectors
        gone = rng.choice(gene.kept)
        others = [one for one in range(self._options.experts) if one not in gene.kept and one // size == gone // size]
        return Gene(tuple(sorted((set(gene.kept) - {gone}) | {rng.choice(others)})))

    def _scaled(self, gene: Gene, rng: random.Random) -> Gene:
        """One expert, or all, larger or smaller."""
        factor, which = math.exp(rng.gauss(0, SCALED)), rng.choice([None, *range(len(gene.kept))])
        rows = gene.mix or gene.themselves(self._options.experts)
        return replace(gene, mix=tuple(tuple(factor * each for each in row) if which in (None, place) else row for place, row in enumerate(rows)))

    def _nudged(self, gene: Gene, rng: random.Random) -> Gene:
        """A little more or less of another expert in one."""
        return replace(gene, mix=_nudged(gene.mix or gene.themselves(self._options.experts), rng))

    def _diverted(self, gene: Gene, rng: random.Random) -> Gene:
        """A little more or less of the probability of an expert for one."""
        return replace(gene, routes=_nudged(gene.routes or gene.themselves(self._options.experts), rng))

    def _replaced(self, gene: Gene, rng: random.Random) -> Gene:
        size = self._options.experts // self._options.sectors
        kept = set(gene.kept)
        for expert in gene.kept:
            others = [one for one in range(self._options.experts) if one not in kept and one // size == expert // size]
            if others and rng.random() < REPLACED:
                kept = kept - {expert} | {rng.choice(others)}
        return Gene(tuple(sorted(kept)))

    def _mixed(self, gene: Gene, rng: random.Random) -> Gene:
        rows = _touched(gene.mix or gene.themselves(self._options.experts), rng)
        if rng.random() < RESCALED:
            rows = tuple(tuple(value / sum(row) for value in row) if abs(sum(row)) > 0.1 else row for row in rows)
        return replace(gene, mix=rows)

    def _rerouted(self, gene: Gene, rng: random.Random) -> Gene:
        return replace(gene, routes=_touched(gene.routes or gene.themselves(self._options.experts), rng))


def _nudged(matrix: Matrix, rng: random.Random) -> Matrix:
    row, column, change = rng.randrange(len(matrix)), rng.randrange(len(matrix[0])), rng.gauss(0, WIDTH)
    return tuple(
        tuple(value + change if (place, at) == (row, column) else value for at, value in enumerate(each)) for place, each in enumerate(matrix)
    )


def _touched(matrix: Matrix, rng: random.Random) -> Matrix:
    return tuple(tuple(value + rng.gauss(0, WIDTH) if rng.random() < TOUCHED else value for value in row) for row in matrix)


def arbitrary(options: Options, genes: int, number: int) -> Individual:
    """A choice by chance."""
    rng, size = random.Random(f"{options.seed}-start-{number}"), options.experts // options.sectors

    def gene() -> Gene:
        parts = [rng.sample(range(start, start + size), options.count // options.sectors) for start in range(0, options.experts, size)]
        return Gene(tuple(sorted(one for part in parts for one in part)))

    return tuple(gene() for _ in range(genes))


def plain(individual: Individual) -> list[dict[str, Any]]:
    """An individual as JSON has it."""
    return [asdict(gene) for gene in individual]


def parsed(genes: list[dict[str, Any]]) -> Individual:
    """The inverse of `plain`."""
    return tuple(Gene(tuple(gene["kept"]), _matrix(gene["mix"]), _matrix(gene["routes"])) for gene in genes)


def _matrix(rows: list[list[float]] | None) -> Matrix | None:
    return None if rows is None else tuple(map(tuple, rows))


def _line(found: Found) -> str:
    return line(json.dumps({"phase": found.phase, "fitness": found.fitness, "genes": plain(found.individual)}))


def _read(journal: Path) -> list[Found]:
    """What a search that was cut short has found."""
    told = map(json.loads, lines(journal))
    return [Found(parsed(said["genes"]), said["fitness"], said["phase"]) for said in told]
