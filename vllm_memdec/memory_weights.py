"""The weights of memories that a request mixes: {"law": 0.3, "bio": 0.2}, or the string of them.

vLLM's own classes of HTTP requests take no objects within vllm_xargs, hence "law:0.3,bio:0.2". The
weights are those of the mixture, whatever gates the memories have; the base has the rest.
"""

from collections.abc import Collection
from typing import Any

from vllm_memdec.checkpoint import brief, check_alpha

# By which weights may make more than 1, as those of floats do (0.7 + 0.2 + 0.1), and within which
# of 1 those of several memories leave the base nothing.
ROUNDING = 1e-6
EXAMPLE = "law:0.3,bio:0.2"


def are_weights(value: Any) -> bool:
    """Return whether a request's memory is meant as weights; no name holds a colon."""
    return isinstance(value, dict) or (isinstance(value, str) and ":" in value)


def read_weights(value: dict[str, Any] | str) -> dict[str, Any]:
    """Return weights by name, as they were given, or raise ValueError for a string of others."""
    if isinstance(value, dict):
        return value
    weights: dict[str, Any] = {}
    for part in value.split(","):
        name, _, weight = (word.strip() for word in part.partition(":"))
        try:
            if name in weights or "_" in weight:  # which Python reads within numbers
                raise ValueError
            weights[name] = float(weight)
        except ValueError:
            raise ValueError(
                f"{brief(part)} within {brief(value)} is no memory with its weight, or a second "
                f"one of it: give weights as in {EXAMPLE!r}."
            ) from None
    return weights


def check_weights(what: str, value: Any, names: Collection[str], at_once: int) -> None:
    """Raise ValueError for weights that a server cannot mix.

    what: the argument. names: of its memories. at_once: how many of them a request may mix.
    """
    weights = read_weights(value)
    if not weights:
        raise ValueError(f"{what} names no memory: give weights as in {EXAMPLE!r}, or a name.")
    for name, weight in weights.items():
        if name not in names:
            raise ValueError(
                f"{what} has a weight for {brief(name)}, which is none of this server's memories: "
                f"name one of {[*names]}."
            )
        check_alpha(weight, f"{what}: the weight of {name!r}")
    count, total = sum(map(bool, weights.values())), sum(weights.values())
    if count > at_once:
        raise ValueError(
            f"{what} mixes {count} memories, and this server at most {at_once}: name fewer, or "
            f'start it with "at_once": {count} beside "memories".'
        )
    if total > 1 + ROUNDING:
        raise ValueError(
            f"{what}: the weights make {total:.7g}, more than 1: lower them, the base has the rest."
        )


def as_text(weights: dict[str, float]) -> str:
    """Return weights as the string of them."""
    return ",".join(f"{name}:{weight!r}" for name, weight in weights.items())
