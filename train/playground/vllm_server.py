"""A vLLM server with memories, asked over HTTP: its models, a stream of tokens, probabilities.

What the server refuses, and a server that is not there, is a MemdecError: one sentence with the
remedy, for the page or the terminal.
"""

import ipaddress
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
LISTS = 10.0  # seconds until a server that is there lists its models
ROUNDING = 1e-3  # by which a probability may be above 1
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
class StreamChunk:
    """What a stream brings at once."""

    prompt: list[int]  # in the first chunk alone
    tokens: list[Written]
    finish: str | None  # why the text ends: "stop" or "length"


class VllmServer:
    """A server by its address."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """url: with or without /v1; key: what the server was given as --api-key."""
        try:
            address = httpx.URL(url.strip())
        except httpx.InvalidURL:
            address = httpx.URL("")
        if address.scheme not in ("http", "https") or not address.host:
            raise MemdecError("--server must be an address such as http://localhost:8000.")
        self.address = address
        self.path = address.path.rstrip("/").removesuffix("/v1")
        # What is shown: without a password and without a query, which may hold one too.
        shown = httpx.URL(
            scheme=address.scheme, host=address.host, port=address.port, path=self.path
        )
        self.url = str(shown).rstrip("/")
        self.client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=None),
            trust_env=not _is_loopback(address.host),  # no proxy leads to this machine
        )

    async def models(self) -> Models:
        """Return the base and its memories, by GET /v1/models."""
        async with self._response("GET", "/v1/models") as response:
            cards = _json(await response.aread())["data"]
            known = [(c, c["memdec"]) for c in cards if isinstance(c.get("memdec"), dict)]
            bases = [card for card, memdec in known if "memory" not in memdec]
            memories = [
                ServedMemory(
                    card["id"], m["positions"], m["alpha"], m["gate"], m.get("alpha_by_context")
                )
                for card, m in known
                if m.get("memory", NONE) != NONE and "memories" not in m  # else it is several
            ]
            if not bases or not memories:
                raise MemdecError(
                    f"The server at {self.url} runs without a memory: start it with `{SERVE}`."
                )
            return Models(bases[0]["id"], bases[0]["max_model_len"], memories)

    async def stream(self, choice: Choice, prompt: str, tokens: int) -> AsyncIterator[StreamChunk]:
        """Yield what the choice writes after a prompt, its likeliest tokens, as it comes."""
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 1}
        asked |= {"stream": True, "return_token_ids": True}
        asked["repetition_penalty"] = 1.0  # vLLM has another one of some models' own
        done = False
        async with self._response("POST", "/v1/completions", choice | asked) as response:
            async for line in _lines(response):
                data = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:"):
                    continue
                if data == b"[DONE]":
                    done = True
                    continue
                event = _json(data)
                if "error" in event:
                    raise MemdecError(_refusal(event, 500))
                for written in event["choices"]:
                    yield _chunk(written)
            if not done:
                raise MemdecError(self._cut())

    async def probabilities(self, choice: Choice, ids: list[int], start: int) -> list[Likely]:
        """Return what the choice gives to each id from `start` on, after those before it.

        One prefill of all ids: asked for log-probabilities of a prompt, vLLM reads no cache.
        """
        asked = {"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
        async with self._response("POST", "/v1/completions", choice | asked) as response:
            rows = _json(await response.aread())["choices"][0]["prompt_logprobs"]
            return [_likely(rows[n], ids[n]) for n in range(start, len(ids))]

    @asynccontextmanager
    async def _response(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """Yield an answer to be read; whatever is wrong with it, or in reading it: MemdecError."""
        address = self.address.copy_with(path=self.path + path)
        timeout = httpx.Timeout(None, connect=CONNECT, read=LISTS if body is None else None)
        request = self.client.build_request(method, address, json=body, timeout=timeout)
        response = None
        try:
            response = await self.client.send(request, stream=True)
            if response.status_code != 200:
                raise MemdecError(await self._refused(response))
            yield response
        except httpx.ReadTimeout:
            raise MemdecError(
                f"The server at {self.url} is silent: look at its log, or check --server."
            ) from None
        except httpx.RequestError:
            nobody = f"No server answers at {self.url}: start it with `{SERVE}`, or check --server."
            raise MemdecError(nobody if response is None else self._cut()) from None
        except MemdecError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # not as vLLM's are
            unread = f"The server at {self.url} sent an answer that cannot be read: see its log."
            raise MemdecError(self._no_vllm() if body is None else unread) from error
        finally:
            if response is not None:
                await response.aclose()

    async def _refused(self, response: httpx.Response) -> str:
        status = response.status_code
        if status in (401, 403) and "Authorization" in response.request.headers:
            return f"The server at {self.url} refuses the key: check --api-key, or VLLM_API_KEY."
        if status in (401, 403):
            return f"The server at {self.url} wants a key: give --api-key, or set VLLM_API_KEY."
        if status == 404 and response.request.method == "GET":
            return self._no_vllm()
        try:
            return _refusal(json.loads(await response.aread()), status)
        except ValueError:
            return _refusal(None, status)

    def _no_vllm(self) -> str:
        return f"{self.url} is no vLLM server: check --server."

    def _cut(self) -> str:
        return f"The server at {self.url} ended in mid-answer: look at its log and start it again."


def _is_loopback(host: str) -> bool:
    """Return whether a host, an IPv6 address without brackets, is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the lines; httpx's own end at U+2028 too, which stands as it is in vLLM's JSON."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line
    yield rest


def _json(data: bytes) -> dict[str, Any]:
    found = json.loads(data)
    if not isinstance(found, dict):
        raise TypeError("no JSON object")
    return found


def _refusal(found: Any, status: int) -> str:
    """Return what an answer that is none says."""
    error = found.get("error") if isinstance(found, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return str(message or f"The server answered with HTTP {status}: look at its log.")


def _chunk(written: dict[str, Any]) -> StreamChunk:
    ids, logprobs = written.get("token_ids") or [], written.get("logprobs") or {}
    names = logprobs.get("tokens") or []
    texts = token_texts(written.get("text") or "", names)
    tokens = [
        Written(token, texts[n], Likely(_probability(logprobs["token_logprobs"][n]), names[n]))
        for n, token in enumerate(ids)
    ]
    return StreamChunk(written.get("prompt_token_ids") or [], tokens, written.get("finish_reason"))


def _likely(row: dict[str, Any], token: int) -> Likely:
    best = min(row.values(), key=lambda entry: entry["rank"])
    return Likely(_probability(row[str(token)]["logprob"]), best["decoded_token"] or "")


def _probability(logprob: float) -> float:
    if not logprob <= math.log1p(ROUNDING):  # NaN neither
        raise MemdecError(
            "The server sends no log-probabilities: start it with --logprobs-mode raw_logprobs."
        )
    return math.exp(logprob)


def token_texts(text: str, tokens: list[str]) -> list[str]:
    """Return the text of each token: together they are `text`, which the last has the rest of.

    Decoded alone, a token of SentencePiece loses the space that it begins with.
    """
    found = []
    for token in tokens[:-1]:
        own = next((t for t in (token, f" {token}") if token and text.startswith(t)), "")
        found.append(own)
        text = text[len(own) :]
    return [*found, text][: len(tokens)]
