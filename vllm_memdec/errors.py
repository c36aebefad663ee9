"""The class of what users can mend; every other error is a defect and keeps its traceback."""

import errno


class MemdecError(ValueError):
    """One sentence for a person: what is wrong, and what to do about it."""


def of_the_machine(error: Exception) -> bool:
    """Return whether an error is of the machine, not of the content of a file that was read."""
    known = isinstance(error, OSError) and error.errno not in (None, errno.ENOENT)
    # PyTorch's own class for a full GPU is a RuntimeError.
    return known or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def said_by(error: Exception) -> str:
    """Return in one line, without a full stop, what an error says."""
    lines = str(error).split("\n") if str(error) else [type(error).__name__]
    # "Validation error for field 'x':", and what is wrong with it below
    more = lines[1] if lines[0].endswith(":") and len(lines) > 1 else ""
    return " ".join(f"{lines[0]} {more}".split()).rstrip(".")
