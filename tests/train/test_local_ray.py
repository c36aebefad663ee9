"""A Ray of this machine starts wherever people start it, and its workers are what we are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.executor import ray_folder

ROOT = Path(__file__).parents[2]
# One call of a worker, which tells its Python, its folder and whether Ray uploaded that.
SCRIPT = """
import os, sys, tempfile
from vllm_memdec.train.executor.ray_executor import RayExecutor

def look():
    import ray
    return sys.executable, os.getcwd(), ray.get_runtime_context().runtime_env.get("working_dir")

if __name__ == "__main__":
    executor = RayExecutor()
    found = executor.call(look)
    import ray
    print(ray._private.worker.global_worker.node.get_session_dir_path())
    print(*found, sep="\\n")
"""


def start(folder, *prefix, executable=None, **variables):
    """Run SCRIPT in a folder; return the session's folder, then what a worker saw."""
    folder.mkdir(exist_ok=True)
    (folder / "look.py").write_text(SCRIPT)
    done = subprocess.run(
        [*prefix, sys.executable, "look.py"],
        executable=executable,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    session, *seen = done.stdout.split("\n")[:-1]
    assert seen == [sys.executable, str(folder), "None"]
    return Path(session)


def test_a_long_temporary_folder(tmp_path):
    """Slurm's and CI's are: Ray gets a short one, which is gone afterwards."""
    long = tmp_path / ("long-" * 12)
    long.mkdir()
    session = start(tmp_path / "a b#c%d", TMPDIR=str(long))  # and an odd folder to start in
    assert not session.is_relative_to(long) and not session.parent.exists()


def test_uv_run(tmp_path):
    """Ray looks for `uv run` among the parents: here Python under that name starts the script."""
    (tmp_path / "run").write_text(
        "import subprocess, sys\nraise SystemExit(subprocess.run(sys.argv[1:]).returncode)\n"
    )
    start(tmp_path, "uv", "run", executable=sys.executable)


def forbidding(folder):
    """Return os.stat, which may not enter a folder, whoever runs the tests."""
    stat = os.stat

    def forbidden(path, *args, **options):
        if str(path).startswith(f"{folder}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    return forbidden


def test_folders_that_will_not_do(tmp_path, monkeypatch):
    """Another user's folder, and none at all."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    short = Path("/tmp") / f"m{os.getpid()}"
    monkeypatch.setenv("TMPDIR", str(short))
    assert ray_folder.short_folder() is None  # as Ray would have it
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != Path("/tmp"))
    folder = Path(ray_folder.short_folder())
    assert folder.parent == Path("/var/tmp") and folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setattr(os, "stat", forbidding(closed))
    monkeypatch.setenv("TMPDIR", str(closed / "tmp"))
    folder = Path(ray_folder.short_folder())
    folder.rmdir()
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(MemdecError, match=r"neither .*/ray nor .* set RAY_TMPDIR to another, or"):
        ray_folder.short_folder()
