"""lm-eval tasks, on the model as plain transformers opens it. The whole model is in memory for this."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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


def run(folder: Path, tasks: tuple[str, ...], limit: int | None = None) -> dict[str, dict[str, float]]:
    """Figures by task and metric."""
    manager, names = find(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device=str(device()), batch_size=8)
    try:
        results: dict[str, Any] = simple_evaluate(model=model, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0)["results"]
    except OSError as error:  # what datasets and hub raise, without a network too
        reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise InputError.one(
            "evaluate: tasks", f"lm-eval cannot read the data of {', '.join(names)} ({reason})", "is there a network, and the data set?"
        ) from error
    return {
        task: {
            metric.partition(",")[0]: float(value)
            for metric, value in figures.items()
            if isinstance(value, int | float) and "," in metric and "stderr" not in metric  # what has no filter is no metric: sample_len
        }
        for task, figures in results.items()
    }
