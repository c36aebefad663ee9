"""The playground's own server: one page, the models of the vLLM server, and answers as they come.

The page asks this server alone, so that the vLLM server needs no CORS and its key stays here.
"""

import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from vllm_memdec.checkpoint import brief, check_alpha
from vllm_memdec.errors import MemdecError
from vllm_memdec.train.evaluation.token_page import KEY, STYLE, head
from vllm_memdec.train.playground.answers import BASE, MIXTURE, Answer, Question
from vllm_memdec.train.playground.vllm_server import Models, VllmServer

HERE = Path(__file__).parent
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
EVERYWHERE = ("0.0.0.0", "::", "")
ALLOWED = "; img-src data:; connect-src 'self'"  # an empty icon, and questions to this server


def application(server: VllmServer, host: str) -> Starlette:
    """Return the app; host: where it listens, which is its only name unless it is everywhere."""
    name = f"[{host}]" if ":" in host else host
    hosts = ["*"] if host in EVERYWHERE else [*LOOPBACK, name]

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page())

    async def show_models(request: Request) -> Response:
        try:
            return JSONResponse(_shown(server, await server.models()))
        except MemdecError as error:
            return JSONResponse({"error": str(error)}, 502)

    async def answer(request: Request) -> Response:
        try:
            if request.headers.get("content-type") != "application/json":  # of another site's page
                raise MemdecError("The question must be JSON: send Content-Type application/json.")
            asked = json.loads(await request.body())
            models = await server.models()
            question = _question(asked, models)
        except (MemdecError, json.JSONDecodeError, UnicodeDecodeError) as error:
            return JSONResponse({"error": str(error)}, 400)
        lines = _lines(Answer(server, models, question))
        return StreamingResponse(lines, media_type="application/x-ndjson")

    routes = [
        Route("/", show_page),
        Route("/models", show_models),
        Route("/answer", answer, methods=["POST"]),
    ]
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    return Starlette(routes=routes, middleware=[guard])


class WebServer(uvicorn.Server):
    """Ends at once, and quietly: answers that are being written are dropped."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self.force_exit = True
        super().handle_exit(sig, frame)


def web_server(app: Starlette) -> WebServer:
    """Return what serves the app; it prints errors alone."""
    return WebServer(uvicorn.Config(app, log_level="warning", lifespan="off"))


def page() -> str:
    """Return the page, whole."""
    text = (HERE / "page.html").read_text(encoding="utf-8")
    parts = {"head": head(ALLOWED), "style": STYLE, "key": KEY}
    parts["script"] = (HERE / "page.js").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"<!--{name}-->", part)
    return text


def _shown(server: VllmServer, models: Models) -> dict[str, Any]:
    memories = [
        {"name": m.name, "alpha": m.alpha, "gate": m.gate, "by_context": bool(m.by_context)}
        for m in models.memories
    ]
    return {
        "server": server.url,
        "base": models.base,
        "max_model_len": models.max_model_len,
        "memories": memories,
    }


def _question(asked: Any, models: Models) -> Question:
    """Return what the page asks for, or raise MemdecError."""
    if not isinstance(asked, dict):
        raise MemdecError("The question must be a JSON object.")
    prompt, tokens = asked.get("prompt"), asked.get("tokens")
    if not isinstance(prompt, str) or not prompt:
        raise MemdecError("The prompt is empty: write a few words.")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise MemdecError("The prompt has half a character, a lone surrogate: delete it.")
    if type(tokens) is not int or not 0 < tokens < models.max_model_len:
        raise MemdecError(
            f"Tokens must be a number from 1 to {models.max_model_len - 1}, got {brief(tokens)}."
        )
    writes = asked.get("writes")
    if writes not in (BASE, MIXTURE):
        raise MemdecError(f"'writes' must be {BASE!r} or {MIXTURE!r}, got {brief(writes)}.")
    named = [memory for memory in models.memories if memory.name == asked.get("memory")]
    if not named:
        raise MemdecError(
            f"The server has no memory {brief(asked.get('memory'))} any more: load the page again."
        )
    alpha = asked.get("alpha")
    if alpha is not None:
        alpha = check_alpha(alpha, "The weight")
    return Question(prompt, writes, named[0], alpha, tokens)


async def _lines(answer: Answer) -> AsyncIterator[str]:
    async for event in answer.events():
        yield json.dumps(event) + "\n"
