"""Memories come and go beside 16 clients of a real server: no request is disturbed or mixed up.

python -m pytest tests/serving/test_slots_http.py --loads 200 -s      # the long form: 200 loads
"""

import asyncio
import itertools
import json
import random
import shutil
import statistics
import time

import httpx
import pytest
from fastapi import FastAPI
from support import oracle, soak_client
from support.soak_client import BLOCK, VOCAB, key_rows

from vllm_memdec.compat import slot_routes

CLIENTS, ANSWERS = 16, 4  # at once, and of memories in slots from one load to the next
KEY = {"Authorization": "Bearer secret"}
JSON = {"Content-Type": "application/json"}
CONTENTS = ("one", "two", "three")
ALPHA = 0.7  # of memories in slots
FIXED = {"law": ("law", 0.6), "none": ("law", 0.0)}  # models of the settings: memory, weight


@pytest.fixture(scope="module")
def models(long_models, tiny_model, tmp_path_factory):
    long = {"positions": 1024, "spread": 0.15}
    made = {name: long_models[name] for name in ("base", "law")}
    made |= {name: tiny_model("llama", seed=5 + n, **long) for n, name in enumerate(CONTENTS)}
    cut = shutil.copytree(made["one"], tmp_path_factory.mktemp("slots") / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    malformed = shutil.copytree(made["one"], cut.with_name("malformed"))
    config = json.loads((malformed / "config.json").read_text())
    (malformed / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    made |= {"cut": str(cut), "malformed": str(malformed)}
    return made | {"other": tiny_model("llama", seed=5, tokenizer=9, **long)}


@pytest.fixture(scope="module")
def server(models, forked, tmp_path_factory):
    block = {
        "memories": {"law": {"model": models["law"], "alpha": 0.6}},
        "slots": {"model": models["one"], "count": 2},
    }
    log = tmp_path_factory.mktemp("slots_server") / "log"
    server = soak_client.Server(models, forked, log, block=block, options=("--api-key", "secret"))
    try:
        yield server.wait()
    finally:
        server.stop()


class Crowd:
    """Clients that ask the memories that are there, and what a loader has to know of them."""

    def __init__(self, client, models):
        self.client, self.models = client, models
        self.there = dict(FIXED)  # by the model's name: folder and weight
        self.starting = dict.fromkeys(("it", *FIXED), 0)  # requests without a first token yet
        self.rng, self.done, self.over = random.Random(0), [], False
        self.prompts = oracle.prompts(40, 3 * BLOCK, 5 * BLOCK, VOCAB, seed=3)

    def of_slots(self):
        """Return how many answers of memories in slots are there."""
        return sum(folder in CONTENTS for folder, *_ in self.done)

    async def one(self):
        """Ask for a completion and keep what has to be compared with its memory's mixture."""
        name = self.rng.choice([*self.there, *(n for n in self.there if n == "it")])
        folder, alpha = self.there[name]
        prompt = self.rng.choice(self.prompts)[: self.rng.randint(BLOCK + 1, 5 * BLOCK)]
        body = {"model": name, "prompt": prompt, "temperature": 0, "logprobs": 0, "stream": True}
        body |= {"max_tokens": self.rng.randint(4, 24), "return_token_ids": True}
        tokens, values = [], []
        self.starting[name] += 1
        try:
            async with self.client.stream("POST", "/v1/completions", json=body) as response:
                assert response.status_code == 200, await response.aread()
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    for choice in event["choices"]:
                        if not tokens:
                            self.starting[name] -= 1
                        tokens += choice["token_ids"] or []
                        values += (choice["logprobs"] or {}).get("token_logprobs") or []
        finally:
            if not tokens:
                self.starting[name] -= 1
        self.done.append((folder, alpha, prompt, tokens, values))

    async def ask(self):
        while not self.over:
            await self.one()

    async def unload(self):
        """Empty the slot of "it" while its requests run, all of which the server has."""
        del self.there["it"]
        while self.starting["it"]:
            await asyncio.sleep(0.005)
        answer = await self.client.post("/v1/unload_memory", json={"memory_name": "it"})
        assert answer.status_code == 200, answer.text

    async def load(self, content):
        answer = await load(self.client, "it", self.models[content])
        while "still run in all free slots" in answer.text:  # on a slow machine
            answer = await load(self.client, "it", self.models[content])
        assert answer.text == f"Success: memory 'it' loaded from {self.models[content]}."
        self.there["it"] = content, ALPHA


async def load(client, name, path, **more):
    body = {"memory_name": name, "memory_path": path, "alpha": ALPHA, **more}
    return await client.post("/v1/load_memory", json=body)


async def listed(client):
    return (await client.get("/v1/memories")).json()


async def fail_to_load(client, models):
    """A load that fails is one sentence and changes nothing."""
    before = [slot["name"] for slot in (await listed(client))["slots"]]
    for content, sentence in (
        ("cut", "cannot be read (SafetensorError"),
        ("other", "has another tokenizer than the base"),
        ("law", "has not the shape of the slots"),
    ):
        answer = await load(client, "new", models[content])
        assert answer.status_code == 400 and sentence in answer.json()["error"]["message"]
    assert [slot["name"] for slot in (await listed(client))["slots"]] == before


async def hang_up(server, client, path):
    """A client that is killed in mid-load leaves a load that goes on to its end."""
    body = json.dumps({"memory_name": "orphan", "memory_path": path, "alpha": ALPHA}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/load_memory HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer secret\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()
    while "orphan" not in [slot["name"] for slot in (await listed(client))["slots"]]:
        await asyncio.sleep(0.05)
    answer = await client.post("/v1/unload_memory", json={"memory_name": "orphan"})
    assert answer.status_code == 200


async def come_and_go(server, models, loads):
    limits = httpx.Limits(max_connections=2 * CLIENTS)
    rss, seconds = [], []
    async with httpx.AsyncClient(
        base_url=server.url, timeout=120, limits=limits, headers=KEY
    ) as client:
        crowd = Crowd(client, models)
        tasks = [asyncio.create_task(crowd.ask()) for _ in range(CLIENTS)]
        for count, content in zip(range(loads), itertools.cycle(CONTENTS), strict=False):
            if count:
                await crowd.unload()
            if count == 3:
                await fail_to_load(client, models)
                await hang_up(server, client, models["two"])
            began = time.monotonic()
            await crowd.load(content)
            seconds.append(time.monotonic() - began)
            answers = crowd.of_slots() + ANSWERS
            while crowd.of_slots() < answers and not any(task.done() for task in tasks):
                await asyncio.sleep(0.02)
            rss.append(server.rss())
        crowd.over = True
        await asyncio.gather(*tasks)
        assert sum(slot["running_requests"] for slot in (await listed(client))["slots"]) == 0
    return crowd.done, rss, seconds


def test_memories_come_and_go_under_load(server, models, request):
    loads = request.config.getoption("--loads")
    done, rss, seconds = asyncio.run(come_and_go(server, models, loads))
    for folder, alpha, prompt, tokens, values in done:
        [key_TV] = key_rows(models, folder, alpha, prompt, [tokens])
        wanted = [row[token].item() for row, token in zip(key_TV, tokens, strict=True)]
        assert values == pytest.approx(wanted, abs=oracle.TOLERANCE), folder
        best = key_TV.max(-1).values.tolist()
        assert wanted == pytest.approx(best, abs=oracle.TOLERANCE), folder
    of_slots = [each for each in done if each[0] in CONTENTS]
    assert len(of_slots) >= loads * ANSWERS and {each[0] for each in of_slots} == {*CONTENTS}
    # Its size when warm, and at the end: a load that leaves the tiny memory behind adds 1 MB.
    middle, end = statistics.median(rss[loads // 2 - 2 :][:5]), statistics.median(rss[-5:])
    print(
        f"{loads} loads of {statistics.median(seconds):.2f} s beside {len(done)} requests, "
        f"{len(of_slots)} of them of slots, {end - middle:.1f} MB more in the last half"
    )
    assert end - middle < 10


def test_what_a_client_sees(server, models):
    client = httpx.Client(base_url=server.url, headers=KEY, timeout=60)
    client.post("/v1/unload_memory", json={"memory_name": "it"})
    assert httpx.get(f"{server.url}/v1/memories").status_code == 401
    names = {"law", "none", models["base"]}
    assert {card["id"] for card in client.get("/v1/models").json()["data"]} == names

    body = {"memory_name": "bio", "memory_path": models["one"]}
    body |= {"alpha": 0.3, "served_as": {"bio": None, "bio-strong": 0.9}}
    assert client.post("/v1/load_memory", json=body).status_code == 200
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert {*cards} == names | {"bio", "bio-strong"}
    card = cards["bio-strong"]
    assert card["root"] == models["one"] and card["parent"] == models["base"]
    assert card["memdec"]["alpha"] == 0.9 and card["memdec"]["memory"] == "bio"
    assert {*cards["law"]["memdec"]} == {*card["memdec"]}
    [slot] = [each for each in client.get("/v1/memories").json()["slots"] if each["name"]]
    assert slot["model"] == models["one"] and slot["running_requests"] == 0
    ask = {"model": models["base"], "prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0}
    ask["vllm_xargs"] = {"memdec_memory": "bio"}
    assert client.post("/v1/completions", json=ask).status_code == 200
    page = httpx.get(f"{server.url}/metrics").text
    for figure in ("requests", "mixed_rows", "memory_seconds"):
        assert f'memdec:{figure}_total{{memory="bio"}}' in page

    for wrong, code, sentence in (
        ({"memory_name": "nobody"}, 404, "No slot has a memory 'nobody'"),
        ({"memory_name": "law"}, 400, "is of the server's settings"),
        ({"memory_name": "bio", "alpha": 1}, 400, "Extra inputs are not permitted"),
        ({}, 400, "Field required"),
    ):
        answer = client.post("/v1/unload_memory", json=wrong)
        assert answer.status_code == code and sentence in answer.json()["error"]["message"], wrong
    for wrong, sentence in (
        ({"memory_name": models["base"]}, "A memory cannot be called"),
        ({"served_as": models["base"]}, "would be both the base and the memory"),
        ({"alfa": 0.5}, "Extra inputs are not permitted"),
        ({"memory_path": "/nowhere"}, "/nowhere is not a model folder"),
        ({"memory_path": "/half \ud83d"}, "/half ?: config.json"),
        ({"memory_path": models["malformed"]}, "cannot be read (ZeroDivisionError"),
        ({"alpha": True}, "must be a number between 0 and 1, got True"),
        ({"served_as": {"new": True}}, "must be a number between 0 and 1, got True"),
        ({"gate": "yes"}, "must be of type bool"),
        ({"alpha_by_context": [[0.5, 0.3]]}, "must be [position, alpha] pairs"),
    ):
        new = {"memory_name": "new", "memory_path": models["one"], "alpha": 0.3}
        wrong = json.dumps(new | wrong)
        answer = client.post("/v1/load_memory", content=wrong, headers=JSON)
        assert answer.status_code == 400 and sentence in answer.json()["error"]["message"], wrong

    table = {"memory_name": "table", "memory_path": models["two"]}
    table["alpha_by_context"] = [[0, 0.3], [64, 0.1]]
    assert client.post("/v1/load_memory", json=table).status_code == 200
    assert client.post("/v1/unload_memory", json={"memory_name": "table"}).status_code == 200
    assert client.post("/v1/unload_memory", json={"memory_name": "bio"}).status_code == 200
    assert {card["id"] for card in client.get("/v1/models").json()["data"]} == names
    answer = client.post("/v1/completions", json=ask)
    assert answer.status_code == 400 and "memdec_memory must be one of" in answer.text
    ask |= {"model": "bio", "vllm_xargs": None}
    assert client.post("/v1/completions", json=ask).status_code == 404


def test_without_the_variable_there_are_no_routes(monkeypatch):
    for value, count in (("0", 0), ("", 0), ("1", 3), ("True", 3)):
        app = FastAPI()
        before = len(app.routes)
        monkeypatch.setenv(slot_routes.ALLOWED, value)
        slot_routes.attach(app)
        assert len(app.routes) - before == count, value
