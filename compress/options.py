"""What everything that a recipe says is made of."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
TAKEN: dict[type, set[type]] = {bool: {bool}, int: {int, float}, float: {int, float}, str: {str}}
"""What a value may be meant as, by what YAML makes of it; that a number is not whole is told elsewhere."""


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
