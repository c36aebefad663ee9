"""What is wrong with settings, in a sentence that says how it is mended."""

import difflib
from typing import Any, cast, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails


def sentence(where: list[Any], error: ErrorDetails, settings: type[BaseModel]) -> str:
    """Return what is wrong, and how it is mended; where: [], [stage] or [stage, setting]."""
    value, kind = error["input"], error["type"]
    if not where:
        return "settings must be a mapping of stages, as in configs/tiny.yaml."
    stage = settings.model_fields.get(where[0])
    if stage is None:
        return _unknown(where[0], settings, "stage")
    if len(where) == 1 and kind == "value_error":  # settings that do not go together
        return str(error["ctx"]["error"])
    if len(where) == 1:
        return f"settings of stage {where[0]} must be a mapping, got {value!r}."
    model = cast(type[BaseModel], stage.annotation)
    field = model.model_fields.get(where[1])
    if field is None:
        return _unknown(where[1], model, f"setting of stage {where[0]}")
    return f"{where[0]}.{where[1]} must be {_expected(field, value)}, got {value!r}."


def _unknown(name: Any, model: type[BaseModel], what: str) -> str:
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(name), known, 1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}."
    return f"unknown {what}: {name}; {hint}"


def _expected(field: FieldInfo, value: Any) -> str:
    """Return what a field takes, in words, where it does not take a value."""
    kinds = get_args(field.annotation)
    if kinds and all(isinstance(kind, str) for kind in kinds):
        return f"one of {', '.join(kinds)}"
    if not is_number(field):
        return "text" if str in (field.annotation, *kinds) else "true or false"
    low, high = limits(field)
    try:
        number = None if isinstance(value, bool) else float(value)
    except OverflowError:  # an integer beyond any range
        number = float("inf")
    except (ValueError, TypeError):
        number = None
    if number is None or number != number or low <= number <= high:
        return "an integer" if int in (field.annotation, *kinds) else "a number"
    return f"between {low:g} and {high:g}"


def is_number(field: FieldInfo) -> bool:
    """Return whether a setting is a number, or may be one."""
    return bool({int, float} & {field.annotation, *get_args(field.annotation)})


def limits(field: FieldInfo) -> tuple[float, float]:
    """Return the smallest and the largest value of a number."""
    low = next(rule.ge for rule in field.metadata if hasattr(rule, "ge"))
    return low, next(rule.le for rule in field.metadata if hasattr(rule, "le"))
