"""`vllm serve` in forks of a process that has vLLM imported: python -m support.forked_serve.

A server's API process, engine and worker each import vLLM for 13 s, more than all that a tiny one
does. Here a fork becomes the first, and its fork the engine, as vLLM makes one on a GPU; the worker
is in the engine's process. The servers that test_http.py asks, and with three drafts, start as a
user starts them.

Stdin: lines of JSON [words after `vllm`, path of the log]. Stdout: the process id of each.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil


class Process(psutil.Process):
    """A server's first process, which is no child of this one."""

    def poll(self) -> int | None:
        """Return None while it runs."""
        return None if self.is_running() else -1


class Launcher:
    """Starts servers."""

    def __init__(self, env: dict[str, str]) -> None:
        path = [str(Path(__file__).parents[1]), env.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.forked_serve"],
            env=env
            | {
                "PYTHONPATH": os.pathsep.join(filter(None, path)),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, words: Sequence[str], log: Path) -> Process:
        """Run `vllm WORDS`."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps([*words, str(log)]), file=self.process.stdin, flush=True)
        return Process(int(self.process.stdout.readline()))

    def stop(self) -> None:
        """End the process that is forked."""
        self.process.communicate()


def reap(*_) -> None:
    """Let no fork that has ended stay a zombie, which would look as if it ran."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def wait_to_be_forked() -> None:
    """Fork for each line, and return in the fork only."""
    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        *words, log = json.loads(line)
        if pid := os.fork():
            print(pid, flush=True)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(file, number)
        sys.argv = ["vllm", *words]
        return
    sys.exit()


if __name__ == "__main__":
    import vllm.entrypoints.openai.api_server  # noqa: F401
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.entrypoints.cli.main import main
    from vllm.v1.engine import utils

    import vllm_memdec.model  # noqa: F401

    fork = multiprocessing.get_context("fork")
    utils.get_mp_context = lambda: fork
    # Several API servers would be spawned.
    multiprocessing.get_context = lambda method=None: fork  # type: ignore[assignment]
    wait_to_be_forked()
    main()
