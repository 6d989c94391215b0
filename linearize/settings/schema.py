"""The base class of every schema, and one line of explanation for each of its errors."""

from collections.abc import Iterable
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, field_validator
from pydantic_core import ErrorDetails

from linearize.errors import nearest

# characters of a wrong value that an error message shows
LONGEST_SHOWN = 80


class Strict(BaseModel):
    """A frozen group of settings that refuses unknown keys, infinities, NaN and numbers of more than 63 bits."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _in_range(cls, value: Any) -> Any:
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, int) and abs(item) >= 2**63:
                raise ValueError("should be a number of at most 63 bits")
        return value


def unknown_key(dotted: str, key: str, allowed: Iterable[str]) -> str:
    """Return the message for a key that is not among `allowed`; `dotted` is its full path."""
    names = list(allowed)
    return f"{dotted}: unknown key, allowed are {', '.join(names) or 'none'}{nearest(key, names)}"


def explain(error: ErrorDetails, schema: type[BaseModel]) -> str:
    """Turn one pydantic error into a line: the key, the value, what is allowed, and the nearest name.

    A message of one of our own validators that belongs to no single key can span several lines.

    Args:
        error: an item of `ValidationError.errors()`.
        schema: the schema that was validated.
    """
    location = error["loc"]
    dotted = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        return unknown_key(dotted, str(location[-1]), _group_at(schema, location[:-1]).model_fields)
    if error["type"] == "missing":
        return f"{dotted}: missing, and has no default"
    message = error["msg"].removeprefix("Value error, ")
    if not location:
        return message
    value = repr(error["input"])
    if len(value) >= LONGEST_SHOWN:
        value = value[: LONGEST_SHOWN - 3] + "..."
    return f"{dotted}: got {value}; {message[0].lower() + message[1:]}"


def _group_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the schema of the group of keys at `location`, through lists, mappings and optional groups."""
    group: Any = schema
    for part in location:
        if get_origin(group) is list:
            group = get_args(group)[0]
        elif get_origin(group) is dict:
            group = get_args(group)[1]
        else:
            group = group.model_fields[part].annotation
        if NoneType in get_args(group):  # a group that may be absent: `Group | None`
            group = get_args(group)[0]
    return group
