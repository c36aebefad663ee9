"""The class of what users can mend; every other error is a defect and keeps its traceback."""


class MemdecError(ValueError):
    """One sentence for a person: what is wrong, and what to do about it."""
