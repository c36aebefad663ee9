"""How the seams put a wrapper in the place of a function of vLLM's, and take it away again."""

import functools
from collections.abc import Callable
from types import ModuleType


def wrap(owner: type | ModuleType, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace owner.name by make(original), once; unwrap() undoes it."""
    original = getattr(owner, name)
    if not hasattr(original, "memdec_original"):
        wrapper = functools.wraps(original)(make(original))
        # A function takes any attribute, which mypy does not know.
        wrapper.memdec_original = original  # type: ignore[attr-defined]
        setattr(owner, name, wrapper)


def unwrap(owner: type | ModuleType, name: str) -> None:
    """Put the original function back."""
    wrapper = getattr(owner, name)
    setattr(owner, name, getattr(wrapper, "memdec_original", wrapper))
