"""Triton's interpreter, without what it does again for each function that a kernel calls.

It puts its own functions in place of the language's, and looks through all names of five modules
and classes for them: a quarter of the time of a kernel.
"""

import inspect

import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Look for the language's functions once; to be called while no kernel runs."""
    owners = tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base
    names = {
        owner: [name for name, it in inspect.getmembers(owner) if tl.core.is_builtin(it)]
        for owner in owners
    }
    assert all(names.values())

    def patch_builtin(owner, builder, scope):
        for name in names[owner]:
            member = getattr(owner, name)
            if tl.core.is_builtin(member):  # not yet one of the interpreter's
                interpreter._patch_attr(owner, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
