"""Runs `memdec` in a process that has everything imported: a fork of one that did so once.

Most of the seconds of a short `memdec build` are imports, and the kill tests start a dozen. The
process is as real as the command's: it has its own group, signals and standard error.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "faiss",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
        "vllm_memdec.train.cli",
        "vllm_memdec.train.stages.export",
        "vllm_memdec.train.stages.targets",
        "vllm_memdec.train.stages.training",
    ]
)


def start_server(environment: dict[str, str]) -> None:
    """Start the process that is forked, once, in an environment of its own."""
    from multiprocessing import forkserver

    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(words: list[str], out: Path, err: Path) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    from vllm_memdec.train.cli import main

    sys.argv = ["memdec", *words]
    main()


class Forked:
    """The part of subprocess.Popen that the tests use."""

    def __init__(self, words: list[str], folder: Path, environment: dict[str, str]) -> None:
        start_server(environment)
        number = len(list(folder.glob("stderr-*")))
        self.files = [folder / f"{name}-{number}" for name in ("stdout", "stderr")]
        for path in self.files:
            path.touch()
        self.process = CONTEXT.Process(target=_run, args=(words, *self.files))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; return what it printed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("memdec", timeout)
        return tuple(path.read_text() for path in self.files)
