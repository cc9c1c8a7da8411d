"""What everything that a recipe or another file says is made of, and what is told where it says something else."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo, field_validator

from compress.errors import InputError, Problems

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
TAKEN: dict[type, set[type]] = {bool: {bool}, int: {int, float}, float: {int, float}, str: {str}}
"""What a value may be meant as, by what YAML makes of it; that a number is not whole is told elsewhere."""
SHOWN = 100
"""Characters of a value that a message shows."""


class Options(BaseModel):
    """A mapping that does not change, with no unknown keys, no infinities, and no value of another kind that happens to stand for one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML tells yes from 1 and '4' from 4, and so must whoever writes it."""
        if isinstance(value, bytes):
            raise ValueError("must be text, not binary")
        field = cls.model_fields[str(info.field_name)]
        wanted = _kinds(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation) - {type(None)}
        words = {word for word in wanted if isinstance(word, str)}
        kinds = wanted - words
        if kinds and kinds <= KINDS.keys() and type(value) in TAKEN and value not in words and not kinds & TAKEN[type(value)]:
            raise ValueError("must be " + " or ".join([text for kind, text in KINDS.items() if kind in kinds] + sorted(map(repr, words))))
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that a value may be of, and the words it may be."""
    origin = get_origin(annotation)
    if origin is Annotated:  # what is read in a way of its own may be anything
        plain, *metadata = get_args(annotation)
        return {object} if any(isinstance(each, BeforeValidator) for each in metadata) else _kinds(plain)
    if origin in (Union, types.UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    if origin is Literal:
        return set(get_args(annotation))
    return {origin or annotation}


Read = TypeVar("Read", bound=BaseModel)


def read_json(path: Path, remedy: str) -> object:
    """The plain data of a file. Raises `InputError` if it is no JSON, with the `remedy`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError.one(str(path), f"cannot be read ({error.strerror})", remedy) from error
    except (ValueError, RecursionError) as error:  # of text, of JSON, and of numbers too long for Python
        raise InputError.one(str(path), f"is not JSON ({error})", remedy) from error


def parse(
    model: type[Read],
    plain: object,
    place: str,
    needs: str,
    check: Callable[[dict[str, Any], str, Problems], None] = lambda plain, place, problems: None,
    *,
    told: str = "",
    remedy: str = "",
) -> Read:
    """Plain data as a `model`, which is a mapping with what it `needs`. `place` starts every message, and `remedy` ends it where nothing better can.

    Raises `InputError` with every mistake: those that `check` finds in the mapping as it stands come beside those that the model does; it tells all
    that is wrong inside the key `told`.
    """
    if not isinstance(plain, dict):
        raise InputError.one(place, f"must be a mapping with {needs}, got {'nothing' if plain is None else type(plain).__name__}", remedy)
    problems = Problems()
    found = None
    try:
        found = model.model_validate(plain)
    except ValidationError as error:
        report(error, place, model, problems, told=told, remedy=remedy)
    check(plain, place, problems)
    problems.raise_if_any()
    assert found
    return found


def report(error: ValidationError, place: str, model: type[BaseModel], problems: Problems, *, told: str = "", remedy: str = "") -> None:
    """Tell `problems`, in our words, all that pydantic found wrong with data for `model`, but for what is inside the key `told`."""
    refused: dict[str, tuple[list[str], Any]] = {}
    for item in error.errors():
        if told and item["loc"][:1] == (told,) and (len(item["loc"]) > 1 or (item["type"] == "too_short" and item["input"])):
            continue
        path = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("function-", "literal[", "constrained-")))
        where = f"{place}: {path}" if path else place
        if item["type"] == "extra_forbidden":
            problems.add(where, "unknown key", suggest(str(item["loc"][-1]), _keys(model, item["loc"][:-1])))
        elif item["type"] == "missing":
            problems.add(where, "is missing", remedy)
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = (message[:1].lower() + message[1:]).replace("tuple", "list").replace("dictionary", "mapping").partition(" or instance of ")[0]
            refused.setdefault(where, ([], item["input"]))[0].append(message)
    for where, (messages, value) in refused.items():  # several where a key may be of several kinds
        rest = "".join(f" or {message.removeprefix('input should be ')}" for message in messages[1:])
        got = repr(value)
        problems.add(where, f"{messages[0]}{rest}, got {got if len(got) <= SHOWN else f'{got[:SHOWN]}...'}", remedy)


def _keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Keys allowed at a place inside a section."""
    for part in (each for each in path if not isinstance(each, int)):
        field = model.model_fields.get(part)
        inner = [kind for kind in (getattr(field.annotation, "__args__", ()) or (field.annotation,)) if isinstance(kind, type)] if field else []
        models = [kind for kind in inner if issubclass(kind, BaseModel)]
        if not models:
            return []
        model = models[0]
    return list(model.model_fields)


def suggest(name: str, known: list[str]) -> str:
    """What to write instead of an unknown `name`."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
