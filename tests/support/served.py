"""vLLM's own HTTP server in this process, whose imports are done: a real socket, a real engine.

The engine is a process of its own, as that of `vllm serve`: a fork of this one.
"""

import asyncio
import contextlib
import json
import multiprocessing
import socket
import threading

import uvicorn
from pytest import MonkeyPatch
from support.quick_engines import KV_CACHE
from vllm.entrypoints.launchers import run_batch
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_memdec.kernels import interpolate

START = 300  # seconds for an engine to start, for a file of requests


class Served:
    """A server of a base with a memdec block, from start() to stop().

    options: words for the engine; of_server: those that `vllm run-batch` does not know.
    """

    def __init__(self, base, block, options=(), of_server=()):
        settings = json.dumps({"memdec": block})
        words = ["--model", base, "--model-impl", "memdec", "--additional-config", settings]
        words += ["--kv-cache-memory-bytes", str(KV_CACHE["kv_cache_memory_bytes"])]
        self.words, self.base, self.of_server = [*words, *options], base, of_server
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.stack = contextlib.AsyncExitStack()

    def do(self, coroutine):
        """Return what a coroutine returns that runs where the server does."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(START)

    def start(self):
        """Start engine and server."""
        self.thread.start()
        self.do(self._start())
        return self

    async def _start(self):
        args = make_arg_parser(FlexibleArgumentParser()).parse_args([*self.words, *self.of_server])
        with MonkeyPatch.context() as patch:
            # vLLM on a CPU spawns the process, which then imports all of it again.
            fork = multiprocessing.get_context("fork")
            patch.setattr("vllm.v1.engine.utils.get_mp_context", lambda: fork)
            # The fork is a user's engine: without a GPU that runs the PyTorch path.
            patch.setattr(interpolate, "INTERPRETED", False)
            starting = build_async_engine_client(args)
            self.engine = await self.stack.enter_async_context(starting)
        tasks = await self.engine.get_supported_tasks()
        app = build_app(args, tasks, self.engine.model_config)
        await init_app_state(self.engine, app.state, args, tasks)
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.server.config.load()
        self.served = asyncio.ensure_future(self.server._serve([listening]))

    def batch(self, asked, answers):
        """Answer a file of requests as `vllm run-batch` does."""
        parser = run_batch.make_arg_parser(FlexibleArgumentParser())
        words = [*self.words, "-i", str(asked), "-o", str(answers)]
        self.do(run_batch.run_batch(self.engine, parser.parse_args(words)))

    def stop(self):
        """End both."""
        self.do(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    async def _stop(self):
        self.server.should_exit = True
        await self.served
        await self.stack.aclose()
        del self.engine  # or it ends with this process, after what it needs
