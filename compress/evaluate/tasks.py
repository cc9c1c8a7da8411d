"""lm-eval tasks, on the model as plain transformers opens it. The whole model is in memory for this.

A model that sees may be asked about images too, one question at a time, so that no padding enters; images are placed by the model's chat template,
if it has one. Other tasks are put as lm-eval puts them, without one.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from compress.checkpoint import sha256
from compress.errors import InputError, Problems
from compress.hardware import device
from compress.layout import Layout

PLACE = "evaluate: tasks"
BATCH = 8


def find(tasks: tuple[str, ...], layout: Layout) -> tuple[Any, dict[str, bool]]:
    """lm-eval's task manager and, by the name of each of `tasks`, whether it shows images. They are names that lm-eval knows, or paths of task files
    (``.yaml``), which work offline. Raises `InputError` for those that cannot be, that have no data, or that a model of this layout cannot be given.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError.one(PLACE, "lm-eval is not installed", "pip install 'compress[tasks]'") from error
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise InputError.one(f"{PLACE}: {file}", "no such file", "give the path of an lm-eval task file")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None, include_defaults=len(files) < len(tasks))
    names = [Path(task).stem if Path(task) in files else task for task in tasks]
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        raise InputError.one(PLACE, f"lm-eval knows no task {unknown[0]!r}", "a task file must be named after its task")
    problems = Problems()
    shows = {name: _shows_images(manager, name, layout, problems) for name in names}
    problems.raise_if_any()
    return manager, shows


def _shows_images(manager: Any, name: str, layout: Layout, problems: Problems) -> bool:
    """Whether a task, or one of a group, shows images; what is wrong with that is reported."""
    try:
        members = manager.load([name])["tasks"].values()
    except OSError as error:  # what datasets and hub raise, without a network too
        reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
        problems.add(PLACE, f"lm-eval cannot read the data of {name} ({reason})", "is there a network, and the data set?")
        return False
    seeing = [task for task in members if getattr(task, "MULTIMODAL", False)]
    if any(getattr(task.config, "doc_to_audio", None) is not None for task in seeing):
        problems.add(PLACE, f"{name} plays sounds, which no model here hears", "leave it out")
    elif seeing and not layout.arch.image:
        problems.add(PLACE, f"{name} shows images, but a {layout.arch.model_type} reads text only", "leave it out")
    elif others := sorted({task.OUTPUT_TYPE for task in seeing} - {"generate_until"}):
        what = f"{name} is a task of {others[0]} about images, and lm-eval has answers about images written alone (generate_until)"
        problems.add(PLACE, what, "take a task that has the answer written")
    return bool(seeing)


@dataclass(frozen=True)
class Answered:
    """What a model made of each item of a task: ``values`` of one metric, in the order of the data; ``digest`` says which items these were, and
    ``versions`` of which task, by name."""

    values: tuple[float, ...]
    digest: str
    versions: dict[str, str]


def protocol(tasks: tuple[str, ...]) -> dict[str, Any]:
    """What figures of `run` depend on beside the model, as far as can be told without lm-eval's data."""
    files = {task: sha256(Path(task)) for task in tasks if task.endswith((".yaml", ".yml"))}
    return {"tasks": tasks, "files": files, "lm_eval": metadata.version("lm_eval")}


def run(folder: Path, tasks: tuple[str, ...], layout: Layout, limit: int | None = None) -> dict[str, dict[str, float]]:
    """Figures by task and metric of the model in a folder, which is of this layout."""
    results, _ = _evaluated(folder, tasks, layout, limit, log_samples=False)
    return {
        task: {
            metric.partition(",")[0]: float(value)
            for metric, value in figures.items()
            if isinstance(value, int | float) and "," in metric and "stderr" not in metric  # what has no filter is no metric: sample_len
        }
        for task, figures in results["results"].items()
    }


def items(folder: Path, task: str, metric: str, layout: Layout, limit: int | None = None) -> Answered:
    """The same item by item, of one metric of one task, or of a group of tasks one after the other. Where answers are filtered in several ways, the
    first counts. Raises `InputError` for a metric that the task does not have."""
    results, names = _evaluated(folder, (task,), layout, limit, log_samples=True)
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


def _evaluated(folder: Path, tasks: tuple[str, ...], layout: Layout, limit: int | None, *, log_samples: bool) -> tuple[dict[str, Any], list[str]]:
    """What lm-eval says of the model in a folder, which is of this layout, and the names of the tasks."""
    manager, shows = find(tasks, layout)
    from lm_eval import simple_evaluate
    from lm_eval.models.hf_vlms import HFMultimodalLM
    from lm_eval.models.huggingface import HFLM

    if layout.arch.image:
        from compress.images import Processor

        Processor(folder)  # which says what is wrong with the one that lm-eval will load
    kind = HFMultimodalLM if layout.arch.image else HFLM
    model = kind(pretrained=str(folder), device=str(device()), batch_size=1 if any(shows.values()) else BATCH)
    found: dict[str, Any] = {"results": {}, "samples": {}, "versions": {}}
    for images in sorted(set(shows.values())):  # those with images last: from then on lm-eval leaves marks of images to the chat template
        names = [name for name, each in shows.items() if each == images]
        template = images and bool(model.processor.chat_template)
        said = simple_evaluate(
            model=model, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=log_samples, apply_chat_template=template
        )
        for part, known in found.items():
            known |= said.get(part, {})
    return found, list(shows)
