"""A real `vllm serve` in a process of its own, for the demo, the tests and the benchmarks."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

START_SECONDS = 300  # a cold start on a slow machine


def free_port() -> int:
    """Return a TCP port that is free on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """Return the environment of a CPU server on a small machine."""
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding fails on machines of few shared cores
    }
    return defaults | dict(os.environ)


def serve(
    base: Path, memdec: dict, log: Path, *options: str, env: dict[str, str] | None = None
) -> contextlib.AbstractContextManager[str]:
    """Run `vllm serve BASE` with a memory; see run_server."""
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(base),
        "--model-impl",
        "memdec",
        "--additional-config",
        json.dumps({"memdec": memdec}),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *options,
    ]
    return run_server(command, port, log, env)


@contextlib.contextmanager
def run_server(
    command: list[str], port: int, log: Path, env: dict[str, str] | None = None
) -> Iterator[str]:
    """Run a command that serves on a port; yield its API address when healthy; stop it at the end.

    Raises RuntimeError with the log's last lines if it does not come up.
    """
    with open(log, "w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment() if env is None else env,
            start_new_session=True,
        )
        try:
            _wait_until_healthy(process, port, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # workers a crashed server left behind
            process.wait()


def _wait_until_healthy(process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise RuntimeError(f"vllm serve did not come up; the end of {log}:\n{tail}")
