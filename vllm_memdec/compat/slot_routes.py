"""The HTTP server: memories of slots are loaded, unloaded and listed beside other requests.

POST /v1/load_memory, POST /v1/unload_memory and GET /v1/memories, where the variable of ALLOWED
says so: whoever may ask for these decides what others are answered with, and what is read.
register_api_routers, which server.py wraps, adds them. They answer as vLLM's own for LoRA do.

May go when vLLM lets a plugin add routes.
Relies on what its server keeps in the state of the application, and on its way to ask all workers.
"""

import asyncio
import os
from typing import Any

from vllm_memdec.compat.model_names import offer
from vllm_memdec.request import choices_of
from vllm_memdec.slots import UnknownMemory, run_beside, slots_of

ALLOWED = "MEMDEC_ALLOW_RUNTIME_LOADING"
SIGNATURES = {
    "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc": "self method timeout args kwargs",
}
ATTRIBUTES = {
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": "base_model_paths lora_requests",
}
_tasks: set[asyncio.Task] = set()  # so that none is collected while it runs


def is_allowed() -> bool:
    """Return whether memories may come and go over HTTP."""
    return os.environ.get(ALLOWED, "0").strip().lower() in ("1", "true")


def served(engine: Any) -> list[str]:
    """Return the names of models that are memories, or the base alone."""
    choices = choices_of(engine)
    return [*choices.served] if choices else []


def attach(app: Any) -> None:
    """Add the routes to an application, if they are allowed."""
    if not is_allowed():
        return
    from fastapi import Depends, Request
    from fastapi.responses import JSONResponse, PlainTextResponse
    from pydantic import BaseModel, ConfigDict
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request

    class UnloadMemoryRequest(BaseModel):
        model_config = ConfigDict(extra="forbid")
        memory_name: str

    class LoadMemoryRequest(UnloadMemoryRequest):
        memory_path: str
        revision: str | None = None
        # As they came: the settings' own checks are stricter than pydantic, which converts.
        alpha: Any = None
        served_as: Any = None
        gate: Any = None
        alpha_by_context: Any = None
        with_images: Any = None

    async def is_json(raw_request: Request) -> None:
        # Not overridden as the others' is (server.py): "memory_name" asks for no memory here.
        await validate_json_request(raw_request)

    async def answered(raw_request: Request, change: Any) -> Any:
        """Return the response to a change, which goes on to its end if the client hangs up."""
        state = raw_request.app.state
        models, engine = state.openai_serving_models, state.engine_client

        async def changed() -> str:
            async with slots_of(engine).lock:
                before = served(engine)
                said = await change(engine, models)
                offer(models, before, served(engine))
                return said

        task = asyncio.create_task(changed())
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)
        try:
            return PlainTextResponse(await asyncio.shield(task))
        except ValueError as error:
            code, kind = 400, "BadRequestError"
            if isinstance(error, UnknownMemory):
                code, kind = 404, "NotFoundError"
            sentence = str(error).encode(errors="replace").decode()  # half a character of a path
            said = {"message": sentence, "type": kind, "param": None, "code": code}
            return JSONResponse({"error": said}, code)

    @app.post("/v1/load_memory", dependencies=[Depends(is_json)])
    async def load_memory(request: LoadMemoryRequest, raw_request: Request) -> Any:
        async def load(engine: Any, models: Any) -> str:
            ours = served(engine)
            bases = [path.name for path in models.base_model_paths if path.name not in ours]
            taken = dict.fromkeys(models.lora_requests, "a LoRA adapter")
            taken |= dict.fromkeys(bases, "the base")
            settings = request.model_dump(exclude={"memory_name", "memory_path"})
            settings["model"] = request.memory_path
            steps = slots_of(engine).load(request.memory_name, settings, taken)
            return await run_beside(engine, steps)

        return await answered(raw_request, load)

    @app.post("/v1/unload_memory", dependencies=[Depends(is_json)])
    async def unload_memory(request: UnloadMemoryRequest, raw_request: Request) -> Any:
        async def unload(engine: Any, models: Any) -> str:
            return slots_of(engine).unload(request.memory_name)

        return await answered(raw_request, unload)

    @app.get("/v1/memories")
    async def memories(raw_request: Request) -> Any:
        engine = raw_request.app.state.engine_client
        return JSONResponse(await run_beside(engine, slots_of(engine).listing()))
