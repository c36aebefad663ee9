"""The body of an HTTP request: a memory or weight asked for where nothing reads it is refused.

vLLM's servers ignore fields that they do not know, so the answer would have the default weight.
"""

from collections.abc import Collection
from typing import Any

from vllm_memdec.checkpoint import brief
from vllm_memdec.memory_weights import as_text
from vllm_memdec.request import (
    ALPHA,
    EXTRA_FIELDS,
    MEMORY,
    Choices,
    asks,
    bare,
    check_extra_args,
    names_within,
)

XARGS, PARAMS, EXTRA = "vllm_xargs", "sampling_params", "extra_args"
# Labels, schemas and biases: the names in them are the user's.
DATA = ("metadata", "response_format", "structured_outputs", "text", "prompt", "logit_bias")


def check_body(
    body: Any, fields: Collection[str], passes_on: bool, choices: Choices, query: Collection[str]
) -> None:
    """Raise ValueError for a memory or weight outside the place that the endpoint reads.

    fields: what the endpoint's request has, by its class. passes_on: whether it hands what it does
    not know to one that has vllm_xargs. query: the names in the address.
    """
    in_params = PARAMS in fields and XARGS not in fields
    place = f"{PARAMS}.{EXTRA}" if in_params else None
    if XARGS in fields or passes_on:
        place = XARGS
    for name in query:
        if asks(name):
            raise misplaced(name, place)
    if not isinstance(body, dict):
        return
    for name, value in body.items():
        if name == XARGS == place:
            given = value
        elif name == PARAMS and in_params and isinstance(value, dict):
            given = value.get(EXTRA)
            search({k: v for k, v in value.items() if k not in (EXTRA, *DATA)}, name, True, place)
        else:
            if name not in fields and asks(name):
                raise misplaced(name, place)
            if name not in DATA:
                search(value, name, bare(name) in EXTRA_FIELDS, place)
            continue
        if isinstance(given, dict):
            check_extra_args(choices.asked(body.get("model"), given), choices)


def write_weights(body: Any) -> None:
    """Write weights of several memories within a body as the string that vLLM's classes take."""
    given = body.get(XARGS) if isinstance(body, dict) else None
    if isinstance(given, dict) and isinstance(given.get(MEMORY), dict):
        given[MEMORY] = as_text(given[MEMORY])


def search(value: Any, field: str, plain: bool, place: str | None) -> None:
    """Refuse names within a field; plain: "alpha" and "memory" by themselves, too."""
    for path, name in names_within(value, field):
        if asks(name, plain):
            raise misplaced(path, place)


def misplaced(name: str, place: str | None) -> ValueError:
    """Return the sentence for a name that nothing would read."""
    if place is None:
        return ValueError(
            f"{brief(name)} asks for a memory or weight, but this endpoint has the server's own: "
            "leave it out, or ask /v1/completions or /v1/chat/completions."
        )
    return ValueError(
        f"{brief(name)} asks for a memory or weight where nothing reads it: put it into {place}, "
        f"as {ALPHA!r} or {MEMORY!r}."
    )
