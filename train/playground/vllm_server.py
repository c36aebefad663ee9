"""A vLLM server with memories, asked over HTTP: its models, a stream of tokens, probabilities.

What the server refuses, and a server that is not there, is a MemdecError: one sentence with the
remedy, for the page or the terminal.
"""

import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from vllm_memdec.errors import MemdecError

Choice = dict[str, Any]  # the fields of a request that name model, memory and weight
CONNECT = 10.0  # seconds; an answer may take as long as it takes
NONE, ALONE = "none", "alone"  # words of memdec_memory and memdec_alpha
SERVE = "vllm serve BASE --model-impl memdec --additional-config '{\"memdec\": ...}'"


@dataclass(frozen=True)
class ServedMemory:
    """A memory as the server lists it: a model of its own."""

    name: str  # of the model
    positions: int  # it reads; after as many tokens the base answers alone
    alpha: float | str  # what its requests get that ask for no weight; "auto": gate or context
    gate: bool  # whether a gate gives the weight, of which a number is the largest
    by_context: list[list[float]] | None  # [position, weight], each from its position on


@dataclass(frozen=True)
class Models:
    """What a server has."""

    base: str
    max_model_len: int
    memories: list[ServedMemory]


@dataclass(frozen=True)
class Likely:
    """What a model gives to a token, and the token that is the likeliest to it."""

    probability: float
    says: str


@dataclass(frozen=True)
class Written:
    """One token that the server wrote."""

    id: int
    text: str
    likely: Likely


@dataclass(frozen=True)
class Part:
    """What a stream brings at once."""

    prompt: list[int]  # in the first part alone
    tokens: list[Written]
    finish: str | None  # why the text ends: "stop" or "length"


class VllmServer:
    """A server by its address."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """url: with or without /v1; key: what the server was given as --api-key."""
        try:
            address = httpx.URL(url.strip().rstrip("/"))
        except httpx.InvalidURL:
            address = httpx.URL("")
        if address.scheme not in ("http", "https") or not address.host:
            raise MemdecError(
                f"--server must be an address such as http://localhost:8000, got {url!r}."
            )
        self.url = str(address).removesuffix("/v1")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(None, connect=CONNECT)
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)

    async def models(self) -> Models:
        """Return the base and its memories, by GET /v1/models."""
        async with self._asked("GET", "/v1/models") as response:
            told = _json(await response.aread())
        cards = told.get("data") if isinstance(told, dict) else None
        if not isinstance(cards, list):
            raise MemdecError(f"{self.url} is no vLLM server: check --server.")
        known = [(card, card["memdec"]) for card in cards if isinstance(card.get("memdec"), dict)]
        bases = [card for card, memdec in known if "memories" in memdec]
        memories = [
            ServedMemory(
                card["id"], m["positions"], m["alpha"], m["gate"], m.get("alpha_by_context")
            )
            for card, m in known
            if m.get("memory", NONE) != NONE
        ]
        if not bases or not memories:
            raise MemdecError(
                f"The server at {self.url} runs without a memory: start it with `{SERVE}`."
            )
        return Models(bases[0]["id"], bases[0]["max_model_len"], memories)

    async def stream(self, choice: Choice, prompt: str, tokens: int) -> AsyncIterator[Part]:
        """Yield what the choice writes after a prompt, its likeliest tokens, as it comes."""
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 1}
        asked |= {"stream": True, "return_token_ids": True}
        asked["repetition_penalty"] = 1.0  # vLLM has another one of some models' own
        async with self._asked("POST", "/v1/completions", choice | asked) as response:
            try:
                async for line in response.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data == line or data == "[DONE]":
                        continue
                    event = _json(data.encode())
                    if "error" in event:
                        raise MemdecError(_said(event, 500))
                    for told in event.get("choices", ()):
                        yield _part(told)
            except httpx.TransportError:
                raise MemdecError(
                    f"The server at {self.url} ended in mid-answer: look at its log and start it "
                    "again."
                ) from None

    async def probabilities(self, choice: Choice, ids: list[int], start: int) -> list[Likely]:
        """Return what the choice gives to each id from `start` on, after those before it.

        One prefill of all ids: asked for log-probabilities of a prompt, vLLM reads no cache.
        """
        asked = {"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
        async with self._asked("POST", "/v1/completions", choice | asked) as response:
            told = _json(await response.aread())
        rows = told["choices"][0]["prompt_logprobs"]
        return [_likely(rows[n], ids[n]) for n in range(start, len(ids))]

    @asynccontextmanager
    async def _asked(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator[httpx.Response]:
        try:
            request = self.client.build_request(method, f"{self.url}{path}", json=body)
            response = await self.client.send(request, stream=True)
        except httpx.TransportError:
            raise MemdecError(
                f"No server answers at {self.url}: start it with `{SERVE}`, or check --server."
            ) from None
        try:
            if response.status_code in (401, 403):
                raise MemdecError(
                    f"The server at {self.url} wants a key: give --api-key, or set VLLM_API_KEY."
                )
            if response.status_code == 404 and body is None:
                raise MemdecError(f"{self.url} is no vLLM server: check --server.")
            if response.status_code != 200:
                text = await response.aread()
                raise MemdecError(_said(_json(text), response.status_code))
            yield response
        finally:
            await response.aclose()


def base_alone(models: Models) -> Choice:
    """Return what asks for the base without a memory."""
    return {"model": models.base, "vllm_xargs": {"memdec_memory": NONE}}


def memory_alone(memory: ServedMemory) -> Choice:
    """Return what asks for a memory without the base."""
    return {"model": memory.name, "vllm_xargs": {"memdec_alpha": ALONE}}


def mixture(memory: ServedMemory, alpha: float | None) -> Choice:
    """Return what asks for both; alpha: the weight, None for the memory's own."""
    weight = {} if alpha is None else {"vllm_xargs": {"memdec_alpha": alpha}}
    return {"model": memory.name} | weight


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return {}


def _said(told: Any, status: int) -> str:
    """Return what an answer that is none says."""
    error = told.get("error") if isinstance(told, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return str(message or f"The server answered with HTTP {status}: look at its log.")


def _part(told: dict[str, Any]) -> Part:
    ids, logprobs = told.get("token_ids") or [], told.get("logprobs") or {}
    names = logprobs.get("tokens") or []
    texts = pieces(told.get("text") or "", names)
    tokens = [
        Written(token, texts[n], Likely(math.exp(logprobs["token_logprobs"][n]), names[n]))
        for n, token in enumerate(ids)
    ]
    return Part(told.get("prompt_token_ids") or [], tokens, told.get("finish_reason"))


def _likely(row: dict[str, Any], token: int) -> Likely:
    best = min(row.values(), key=lambda entry: entry["rank"])
    return Likely(math.exp(row[str(token)]["logprob"]), best["decoded_token"] or "")


def pieces(text: str, tokens: list[str]) -> list[str]:
    """Return the text of each token: together they are `text`, which the last has the rest of.

    Decoded alone, a token of SentencePiece loses the space that it begins with.
    """
    found = []
    for token in tokens[:-1]:
        own = next((t for t in (token, f" {token}") if token and text.startswith(t)), "")
        found.append(own)
        text = text[len(own) :]
    return [*found, text][: len(tokens)]
