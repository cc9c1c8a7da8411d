"""Where a run writes: what speaks against it, and what else may go wrong there."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from compress import exporting
from compress.errors import InputError, Problems
from compress.layout import Layout
from compress.passes.base import Prunes, Restructure, Rewrite
from compress.recipe import Recipe, expected
from compress.scheme import Scheme, output_bytes


@dataclass(frozen=True)
class Places:
    """Where a run writes: the artifact, which may take the place of another with ``overwrite``, and what is not finished."""

    out: Path
    work: Path
    overwrite: bool


def check(places: Places, recipe: Recipe | None, layout: Layout | None, plan: dict[str, tuple[str, Scheme]], problems: Problems) -> None:
    """Report all that speaks against writing there. What a recipe or a model that cannot be used would have told is left out; a `plan` that is
    not empty, which is what `check` gives, says that both can."""
    out, work = places.out.resolve(), places.work.resolve()
    if layout:
        model = layout.checkpoint.folder.resolve()
        for option, given, place in (("--out", places.out, out), ("--work", places.work, work)):
            if place == model:
                problems.add(str(given), "is the model itself", f"choose another {option}")
            elif place.is_relative_to(model):
                problems.add(str(given), "lies in the model's folder, of which all files are carried along", f"choose another {option}")
            elif model.is_relative_to(place):
                problems.add(str(given), "holds the model", f"choose another {option}")
    if out.is_relative_to(work) or work.is_relative_to(out):
        what = "are the same folder" if out == work else "lie one in the other, of which the first replaces what is there as a whole"
        problems.add(f"{places.out} and {places.work}", f"--out and --work {what}", "choose another --work")
    for option, place in (("--out", out.with_name(f".{out.name}.previous")), ("--work", work)):
        try:
            place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue  # what stands in its way is told below
        except OSError as error:
            problems.add(str(place), f"cannot be made ({error.strerror})", f"choose another {option}")
            return
    _check_target(places, recipe.export[1:] if recipe else (), problems)
    there = {option: _existing(place, option, problems) for option, place in (("--out", places.out.absolute().parent), ("--work", places.work))}
    if None in there.values():
        return
    devices = {found.stat().st_dev: option for option, found in there.items() if found}
    if len(devices) > 1:
        what = f"is on another disk than {places.out}, to which the finished artifact moves in one step"
        problems.add(str(places.work), what, "choose a --work on the disk of --out")
    if recipe and layout and plan:
        _check_disk(places, recipe, layout, plan, {option: found for option, found in there.items() if found}, problems)


def _check_target(places: Places, copies: Sequence[str], problems: Problems) -> None:
    out = places.out
    if os.path.lexists(out) and not places.overwrite:
        problems.add(str(out), "exists already", "choose another --out or pass --overwrite")
    elif os.path.lexists(out) and not (out / "manifest.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        problems.add(str(out), "exists and is no artifact of ours, so it is not overwritten", "choose another --out")
    for place in exporting.folders(out, copies).values():
        if place.exists() and not (places.overwrite and (place / exporting.FILE).is_file()):
            problems.add(str(place), "exists already", "choose another --out, or move it away")


def _existing(folder: Path, option: str, problems: Problems) -> Path | None:
    """A folder that is to be written into, or the nearest one above it that is there; None, and a problem, if it cannot be made."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    if not there.is_dir():
        problems.add(str(folder), f"cannot be made: {there} is no folder", f"choose another {option}")
    elif not os.access(there, os.W_OK | os.X_OK):
        what = "is not writable" if there == folder.absolute() else f"cannot be made: {there} is not writable"
        problems.add(str(folder), what, f"choose another {option}")
    else:
        return there
    return None


def make(folder: Path, option: str) -> None:
    """Make a folder that is to be written into, if it is not there. Raises `InputError` if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError.one(str(folder), f"cannot be made ({error.strerror})", f"choose another {option}") from error


def _check_disk(
    places: Places, recipe: Recipe, layout: Layout, plan: dict[str, tuple[str, Scheme]], there: dict[str, Path], problems: Problems
) -> None:
    """Report what has too little space of the folders ``there``, by option."""
    from compress.planning import added_bytes, evaluation_bytes, gradient_bytes, rewritten_bytes

    layouts = expected(recipe, layout)
    # Blocks of each pass, then the artifact beside them; activations between two blocks are small change beside the margin. Copies come when
    # blocks are gone.
    steps = zip(recipe.instances(), layouts[1:], strict=True)
    rewritten = sum(rewritten_bytes(layout) for (_, step), layout in steps if isinstance(step, Rewrite | Prunes | Restructure))
    made = output_bytes(layouts[-1], {name: scheme for name, (_, scheme) in plan.items()}) + added_bytes(recipe, layouts[-1])
    working = int(2.1 * made) + rewritten + gradient_bytes(recipe, layouts[0]) + evaluation_bytes(recipe, layouts[0])
    needed = max(working, int(1.1 * made) * len(recipe.export)) + (64 << 20)
    told = set()
    for option, given in (("--out", places.out), ("--work", places.work)):
        free = shutil.disk_usage(there[option]).free
        if free < needed and there[option].stat().st_dev not in told:
            told.add(there[option].stat().st_dev)
            what = f"the disk has {free / 1e9:.2f} GB free, the run needs {needed / 1e9:.2f} GB"
            problems.add(str(given), what, f"free some space or choose another {option}")


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """While inside, no other run may use the work folder. It is left only if something is in it."""
    make(work, "--work")
    descriptor = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except OSError as error:
            raise InputError.one(str(work), "another run is working here", "wait for it, or choose another --out or --work") from error
        yield
    finally:
        os.close(descriptor)
        with suppress(OSError):
            work.rmdir()


@contextmanager
def no_space_is_an_input_error(places: Places) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError.one(str(error.filename or places.out), "the disk is full", "free some space; the same command then continues") from error
