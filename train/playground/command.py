"""The command `memdec playground`: its options, and what they mean for web.py."""

import asyncio
import contextlib
import errno
import os
import socket
import sys
import threading
import webbrowser
from typing import Annotated

import typer

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.explained import explained
from vllm_memdec.train.progress import Progress


def playground(
    server: Annotated[
        str, typer.Option(metavar="URL", help="The vLLM server that has the memories.")
    ] = "http://localhost:8000",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="VLLM_API_KEY", help="The key of that server.", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option(help="Where the page is.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8010,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Only print where the page is.")
    ] = False,
) -> None:
    """Open a page on a vLLM server: base and mixture side by side, and who decided each token."""
    progress = Progress()
    with explained(progress), contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(server, api_key, host, port, not no_browser, progress))


async def serve(
    url: str, key: str | None, host: str, port: int, browser: bool, progress: Progress
) -> None:
    """Serve the page until Ctrl-C; raise MemdecError if there is nothing to show on it."""
    from vllm_memdec.train.playground.vllm_server import VllmServer
    from vllm_memdec.train.playground.web import application, web_server

    vllm_server = VllmServer(url, key)
    await vllm_server.models()
    listening = listen(host, port)
    place = f"[{host}]" if ":" in host else host
    page = f"http://{place}:{listening.getsockname()[1]}"
    progress.say(f"The playground is at {page} (Ctrl-C ends it).")
    if browser and has_display():
        # It may wait for the page, which is served only once this function goes on.
        threading.Thread(target=webbrowser.open, args=[page], daemon=True).start()
    await web_server(application(vllm_server, host)).serve([listening])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket on an address, or raise MemdecError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise MemdecError(f"port {port} is taken: give another --port, or 0 for any.") from None
        raise MemdecError(f"{host} port {port} cannot be had: check --host and --port.") from None


def has_display() -> bool:
    """Return whether a browser has a screen: without one Python would open one in the terminal."""
    screens = ("DISPLAY", "WAYLAND_DISPLAY")
    return sys.platform in ("darwin", "win32") or any(map(os.environ.get, screens))
