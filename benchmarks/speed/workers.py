"""Processes of one engine each, which answer in turns: a process can hold one engine at a time."""

import multiprocessing
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

READY = "ready"


def spawn(serve: Callable[..., None], *arguments: Any) -> Connection:
    """Start serve(connection, *arguments) in a process of its own; return this end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(theirs, *arguments), daemon=True).start()
    theirs.close()  # so that the end of a process that fails raises here
    return ours


def wait_until_ready(worker: Connection) -> None:
    """Return when answer() has begun in a worker."""
    assert worker.recv() == READY


def answer(connection: Connection, reply: Callable[[Any], Any]) -> None:
    """In a worker: tell that it is ready, then send reply(message) for each message but None."""
    connection.send(READY)
    while (message := connection.recv()) is not None:
        connection.send(reply(message))


def ask(worker: Connection, message: Any) -> Any:
    """Return a worker's answer."""
    worker.send(message)
    return worker.recv()


def stop(workers: Iterable[Connection]) -> None:
    """End the workers."""
    for worker in set(workers):
        worker.send(None)
