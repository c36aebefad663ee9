"""What an error is, told to people: a full disk, too few file handles, storage that is away, ...

Libraries wrap the operating system's errors in their own, or print them into a text. fault() finds
the one inside, so that nobody is told to delete what is whole.
"""

import errno
import os
from collections.abc import Iterator

from vllm_memdec.errors import MemdecError

AGAIN = "and run again, finished parts are kept."
INSTALL = "is not installed: pip install 'vllm-memdec[train,cpu]', or [train,cuda]."
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HANDLES = (errno.EMFILE, errno.ENFILE)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
STORAGE = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EREMOTEIO,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.ENODEV,
)
NUMBERS = (*FULL, *HANDLES, *NOT_ALLOWED, *STORAGE, errno.ENOMEM)
# In a library's text a time-out or a lost connection may be that of a network.
IN_TEXT = tuple(n for n in NUMBERS if n not in (errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN))
# Errors of Python's own that say what was wrong with a value: their text may hold any words.
OF_VALUES = (ValueError, LookupError, TypeError, AttributeError, ImportError)
# How libraries say that a disk or a quota is full, where they do not raise an OSError that does.
FULL_WORDS = (
    "Not enough free space",
    "requested and",  # numpy: "10 requested and 3 written"
    "PytorchStreamWriter failed",
    "inline_container.cc",
)
# How CUDA, PyTorch, numpy and C++ say that there is too little RAM or GPU memory.
OOM_WORDS = ("out of memory", "t allocate", "std::bad_alloc", "Unable to allocate")


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from or while handling, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def fault(error: BaseException) -> OSError | None:
    """Return what the operating system refused, as an OSError with its number; None if nothing.

    Found by number where there is one, else by the system's words in a library's text. A file that
    is missing is none: it means damage, or a path that is wrong.
    """
    for each in chain(error):
        if isinstance(each, MemdecError):
            return None  # a sentence that knew better
        if isinstance(each, MemoryError):
            return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        if isinstance(each, OSError) and each.errno in NUMBERS:
            return each
        if isinstance(each, OF_VALUES) and not isinstance(each, OSError):
            continue
        text = str(each)
        for number in IN_TEXT:
            if os.strerror(number) in text:
                return OSError(number, os.strerror(number), getattr(each, "filename", None))
        if any(words in text for words in OOM_WORDS):
            return OSError(errno.ENOMEM, text.splitlines()[0])
        if any(words in text for words in FULL_WORDS):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def reraise(error: BaseException, path: object = None) -> None:
    """Raise what the operating system refused, if that is what the error is; else return.

    For the handlers that would call a file damaged; path: the file that was read.
    """
    refused = fault(error)
    if refused is error:
        raise error
    if refused is not None:
        place = str(path or refused.filename or "")
        raise OSError(refused.errno, refused.strerror, place) from error


def out_of_memory(error: BaseException) -> bool:
    """Tell whether the machine's RAM, or a GPU's memory, was too small."""
    refused = fault(error)
    return refused is not None and refused.errno == errno.ENOMEM


def sentence_of(error: BaseException) -> str | None:
    """Return one sentence for an error a user can mend, None for a defect of ours."""
    if isinstance(error, MemdecError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} {INSTALL}"
    refused = fault(error)
    if refused is None:
        if isinstance(error, OSError) and error.strerror and error.filename:
            return f"{error.filename}: {error.strerror}: check the path and run again."
        return None
    place, what = refused.filename or "a file", refused.strerror or os.strerror(refused.errno or 0)
    if refused.errno in FULL:
        return f"the disk is full: free some space {AGAIN}"
    if refused.errno == errno.EMFILE:
        return f"too many open files (at {place}): raise the limit with `ulimit -n 4096` {AGAIN}"
    if refused.errno == errno.ENFILE:
        return f"the machine has too many open files: close other programs {AGAIN}"
    if refused.errno == errno.ENOMEM:
        return f"out of memory: close other programs or take a larger machine {AGAIN}"
    if refused.errno in NOT_ALLOWED:
        return f"no permission for {place}: choose a place you may read or write."
    return f"{place} cannot be read or written now ({what}): check the storage {AGAIN}"
