"""The class of what users can mend; every other error is a defect and keeps its traceback."""


class MemdecError(ValueError):
    """One sentence for a person: what is wrong, and what to do about it."""


def said_by(error: Exception) -> str:
    """Return an error's message in one line, without a full stop."""
    lines = str(error).split("\n") if str(error) else [type(error).__name__]
    # "Validation error for field 'x':", and what is wrong with it below
    more = lines[1] if lines[0].endswith(":") and len(lines) > 1 else ""
    return " ".join(f"{lines[0]} {more}".split()).rstrip(".")
