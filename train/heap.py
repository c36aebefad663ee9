"""Give freed RAM back to the system, so that what a stage let go is not the next one's peak."""

import ctypes


def trim_heap() -> None:
    """Return what is free on the heap to the system, where its C library can: glibc.

    A freed index leaves thousands of holes the size of a list, which glibc keeps for itself and
    does not always fill again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
