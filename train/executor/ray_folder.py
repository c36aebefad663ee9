"""The folder of a Ray on this machine: short enough for its sockets' paths, and ours to write.

A path of a socket has at most 107 bytes, and Ray puts some 60 of its own behind the folder's: where
TMPDIR is long (a Slurm job's, CI's), or another user made Ray's folder there, Ray does not start.
"""

import atexit
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from vllm_memdec.errors import MemdecError

SOCKET_BYTES = 107  # of a socket's path, as Linux has it
# What Ray puts behind the folder, with the longest process id.
SESSION = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def short_folder() -> str | None:
    """Return a folder to give to Ray, removed at exit; None where the one it would choose is good.

    Called before Ray is imported: what is registered first runs last at exit.
    """
    chosen = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if usable(Path(chosen) / "ray"):
        return None
    for place in SHORT:
        if usable(Path(place)):
            folder = tempfile.mkdtemp(prefix="ray-", dir=place)
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            return folder
    max_bytes = SOCKET_BYTES - len(f"/ray{SESSION}")
    raise MemdecError(
        f"Ray's sockets need a folder that you may write to, with a path of at most "
        f"{max_bytes} bytes, and neither {chosen}/ray nor {', '.join(SHORT)} "
        "will do: set RAY_TMPDIR to another, or use --ray-address none."
    )


def usable(folder: Path) -> bool:
    """Return whether Ray could make its sockets in a folder, which need not be there yet."""
    place = folder  # Path.exists() raises where a folder may not be entered
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    allowed = os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)
    return allowed and len(os.fsencode(f"{folder}{SESSION}")) <= SOCKET_BYTES


def ensure_token() -> None:
    """Give Ray a token for its processes where it could not keep one in the user's home."""
    home = Path("~").expanduser() if os.environ.get("HOME") else None
    given = any(os.environ.get(f"RAY_AUTH_TOKEN{more}") for more in ("", "_PATH"))
    if not given and not (home and os.access(home, os.W_OK | os.X_OK)):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
