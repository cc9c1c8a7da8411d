"""lm-eval tasks, on the model as plain transformers opens it. The whole model is in memory for this."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import InputError
from compress.hardware import device


def find(tasks: tuple[str, ...]) -> tuple[Any, list[str]]:
    """lm-eval's task manager and the names of `tasks`: names that it knows, or paths of task files (``.yaml``), which work offline."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError.one("evaluate: tasks", "lm-eval is not installed", "pip install 'compress[tasks]'") from error
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise InputError.one(f"evaluate: tasks: {file}", "no such file", "give the path of an lm-eval task file")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None, include_defaults=len(files) < len(tasks))
    names = [Path(task).stem if Path(task) in files else task for task in tasks]
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        raise InputError.one("evaluate: tasks", f"lm-eval knows no task {unknown[0]!r}", "a task file must be named after its task")
    return manager, names


@dataclass(frozen=True)
class Answered:
    """What a model made of each item of a task: ``values`` of one metric, in the order of the data; ``digest`` says which items these were, and
    ``versions`` of which task, by name."""

    values: tuple[float, ...]
    digest: str
    versions: dict[str, str]


def run(folder: Path, tasks: tuple[str, ...], limit: int | None = None) -> dict[str, dict[str, float]]:
    """Figures by task and metric."""
    results, _ = _evaluated(folder, tasks, limit, log_samples=False)
    return {
        task: {
            metric.partition(",")[0]: float(value)
            for metric, value in figures.items()
            if isinstance(value, int | float) and "," in metric and "stderr" not in metric  # what has no filter is no metric: sample_len
        }
        for task, figures in results["results"].items()
    }


def items(folder: Path, task: str, metric: str, limit: int | None = None) -> Answered:
    """The same item by item, of one metric of one task, or of a group of tasks one after the other. Where answers are filtered in several ways, the
    first counts. Raises `InputError` for a metric that the task does not have."""
    results, names = _evaluated(folder, (task,), limit, log_samples=True)
    values, identity = [], hashlib.sha256()
    for name, samples in sorted(results["samples"].items()):
        kept = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        for sample in kept:
            if metric not in sample["metrics"] or not isinstance(sample[metric], bool | int | float | np.number | np.bool_):
                raise InputError.one(f"tasks: {task}", f"{name} gives no number called {metric!r} for each item", f"it has {sample['metrics']}")
            values.append(float(sample[metric]))
            identity.update(f"{name} {sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}\n".encode())
    if not values:
        raise InputError.one(f"tasks: {task}", "has no items", "is the data set there?")
    versions = {name: str(version) for name, version in sorted(results["versions"].items()) if name in {*names, *results["samples"]}}
    return Answered(tuple(values), identity.hexdigest(), versions)


def _evaluated(folder: Path, tasks: tuple[str, ...], limit: int | None, *, log_samples: bool) -> tuple[dict[str, Any], list[str]]:
    """What lm-eval says of a model, and the names of the tasks."""
    manager, names = find(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device=str(device()), batch_size=8)
    try:
        return simple_evaluate(model=model, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=log_samples), names
    except OSError as error:  # what datasets and hub raise, without a network too
        reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise InputError.one(
            "evaluate: tasks", f"lm-eval cannot read the data of {', '.join(names)} ({reason})", "is there a network, and the data set?"
        ) from error
