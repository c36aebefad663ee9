"""Whether the code that a model's folder brings with it may run: only where a user says so.

The answer is kept in the environment, so that worker processes have it too. From Python:
`vllm_memdec.train.trust.allow_code(True)` before a build.
"""

import os

from vllm_memdec.errors import MemdecError

VARIABLE = "MEMDEC_TRUST_REMOTE_CODE"


def allow_code(allowed: bool) -> bool:
    """Let this process, and those it starts, run the code of model folders or not; return it."""
    if allowed:
        os.environ[VARIABLE] = "1"
    else:
        os.environ.pop(VARIABLE, None)
    return allowed


def code_allowed() -> bool:
    """Return whether the code of model folders may run, for trust_remote_code of transformers."""
    return os.environ.get(VARIABLE) == "1"


def check_needs_no_code(folder: str, error: Exception) -> None:
    """Raise MemdecError if a folder was not loaded because it needs code of its own."""
    if "trust_remote_code" in str(error) and not code_allowed():
        raise MemdecError(
            f"{folder} needs code of its own, which is not run unasked: read its .py files, then "
            "give --trust-remote-code, or give another model."
        ) from None
