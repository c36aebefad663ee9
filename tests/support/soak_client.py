"""A real `vllm serve` with two memories, requests of every kind, and whether answers are right."""

import asyncio
import contextlib
import json
import random
import re
import socket
import time

import httpx
import psutil
import pytest
import torch
from support import oracle
from support.choices import ALPHAS, memdec_block

LAW, BIO = "law", "bio"
BLOCK = 32  # tokens of a KV block, the fewest that the CPU attention takes
VOCAB = 1000
BLOCKS, CHUNK = 40, 512  # of the server: KV blocks, and tokens a step
# Its KV cache holds a handful of long requests, of the 32 at a time.
OPTIONS = (
    f"--host 127.0.0.1 --dtype float32 --enforce-eager --max-num-seqs 32 --block-size {BLOCK} "
    f"--num-gpu-blocks-override {BLOCKS} --max-num-batched-tokens {CHUNK} --enable-prefix-caching "
    "--enable-scale-out "  # tokens in, tokens out
    "--enable-log-requests"
).split()


def long_models(tiny_model):
    """Return the models of a base and of two memories of different sizes, for 1024 tokens."""
    long = {"positions": 1024, "spread": 0.15}  # of the weights: see tiny_config()
    return {
        "base": tiny_model("llama", **long),
        LAW: tiny_model("llama", seed=1, hidden=96, layers=3, **long),
        BIO: tiny_model("gpt2", seed=2, hidden=32, layers=1, **long),
    }


def chosen(xargs):
    """Return the memory and weight that a request with these arguments should get."""
    xargs = xargs or {}
    name = xargs.get("memdec_memory", LAW)
    if name == "none":
        return LAW, 0.0
    return name, xargs.get("memdec_alpha", ALPHAS[name])


def start(env):
    """Return a function that runs `vllm WORDS` as a user does, in an environment."""

    def run(words, log):
        with log.open("w") as out:
            return psutil.Popen(["vllm", *words], env=env, stdout=out, stderr=out)

    return run


class Server:
    """A running `vllm serve` with both memories, which may draft, or with those of a block.

    start: a function that runs `vllm WORDS` with a log, and returns the process.
    """

    def __init__(self, models, start, log, drafts=0, block=None, options=()):
        self.drafts = drafts
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log, self.model = f"http://127.0.0.1:{port}", log, models["base"]
        block = (block or memdec_block(models)) | {"speculative_tokens": drafts}
        given = ["--model-impl", "memdec", "--additional-config", json.dumps({"memdec": block})]
        given += ["--port", str(port), *options]
        self.process = start(["serve", self.model, *OPTIONS, *given], log)

    def wait(self):
        """Wait until it answers; fail if it ends instead."""
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            time.sleep(0.2)

    def tree(self):
        """Return its processes."""
        return [self.process, *self.process.children(recursive=True)]

    def rss(self):
        """Return the resident memory of all its processes, in MB."""
        total = 0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total / 1e6

    def metric(self, name):
        """Return the sum of a counter or gauge over its labels."""
        page = httpx.get(f"{self.url}/metrics").text
        found = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", page, re.M)
        assert found, f"no metric {name}"
        return sum(map(float, found))

    def stop(self):
        """End it, whatever state it is in."""
        left = self.tree() if self.process.is_running() else []
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.terminate()
        psutil.wait_procs(left, 30)
        for process in left:  # by the handle: a process id may be another's by now
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def soak_requests(count, seeded):
    """Return random /v1/completions bodies, with `abort`: after how many events to hang up.

    If `seeded` their sampling has a seed, and 32 of their prompts fit into one step: vLLM on a CPU
    dies ("CPU Generator does not use offset") when it cuts the prompt of a seeded request in two.
    """
    rng = random.Random(int(seeded))
    max_length = CHUNK // 32 if seeded else 700
    pool = oracle.prompts(60, 700, 700, VOCAB)  # their prefixes, so that the cache has hits
    bodies = []
    for _ in range(count):
        # Many short ones: a KV cache that is full to the last block makes vLLM preempt.
        length = rng.randint(1, rng.choice([max_length, max_length, max_length // 7]))
        body = {"prompt": rng.choice(pool)[:length], "max_tokens": rng.randint(1, 24)}
        xargs = {}
        if rng.random() < 0.8:
            xargs["memdec_alpha"] = rng.choice([0, 0.3, 0.6, 1, rng.random()])
        if rng.random() < 0.75:
            xargs["memdec_memory"] = rng.choice([LAW, BIO, "none"])
        if xargs:
            body["vllm_xargs"] = xargs
        body |= rng.choice(
            [
                {"temperature": 0},
                {"temperature": 0},
                {"temperature": 1, "top_k": 1, "n": rng.randint(1, 3)},  # greedy, but several
                {"temperature": 1, "n": rng.randint(1, 3)},
            ]
        )
        if seeded:
            body |= {"temperature": 1, "seed": rng.randrange(10**6)}
        if rng.random() < 0.3:
            body["stop_token_ids"] = rng.sample(range(VOCAB), 60)
        if rng.random() < 0.3:
            body["stop"] = [rng.choice(["a", "du", "mi"])]
        body["stream"] = rng.random() < 0.4
        body["abort"] = rng.choice([0, 1, 2, 4]) if body["stream"] and rng.random() < 0.5 else None
        bodies.append(body)
    return bodies


def crowd():
    """Return requests that fill the KV cache with prompts and then all need one more block."""
    prompts = oracle.prompts(20, 4 * BLOCK - 2, 4 * BLOCK - 2, VOCAB, seed=1)
    return [
        {"prompt": prompt, "max_tokens": 12, "temperature": 0, "stream": False, "abort": None}
        for prompt in prompts
    ]


def is_greedy(body):
    return body["temperature"] == 0 or body.get("top_k") == 1


async def send(client, model, body):
    """Return {index: (tokens, log-probabilities, text, finish reason, stop reason)}; raise if bad.

    What came before a hang-up is returned too.
    """
    body = {**body, "model": model, "logprobs": 0, "return_token_ids": True}
    abort = body.pop("abort")
    answers = {i: ([], [], [], None, None) for i in range(body.get("n", 1))}

    def add(choice):
        tokens, values, text, *_ = answers[choice["index"]]
        tokens += choice["token_ids"] or []
        values += (choice["logprobs"] or {}).get("token_logprobs") or []
        text.append(choice["text"])
        ended = choice["finish_reason"], choice["stop_reason"]
        answers[choice["index"]] = (tokens, values, text, *ended)

    if not body["stream"]:
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        for choice in response.json()["choices"]:
            add(choice)
    else:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            events = 0
            async for line in response.aiter_lines():
                if events == abort:
                    break
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    for choice in event["choices"]:
                        add(choice)
                    events += 1
    return {i: (t, v, "".join(x), *ended) for i, (t, v, x, *ended) in answers.items()}


async def soak(url, model, bodies, on_done):
    gate = asyncio.Semaphore(32)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits()) as client:

        async def one(body):
            async with gate:
                answer = await send(client, model, body)
                on_done()
                return answer

        return await asyncio.gather(*map(one, bodies))


@torch.no_grad()
def key_rows(models, name, alpha, prompt, sampled):
    """Return the mixture's float64 log-probabilities for each sampled token [n, T, V].

    What oracle.mixture() computes, for several continuations of a prompt and their rows only.
    """
    max_length = max(map(len, sampled))
    # Padded on the right, where no causal model looks.
    ids = torch.tensor(
        [[*prompt, *tokens, *[0] * (max_length - len(tokens))] for tokens in sampled]
    )
    p_nTV = 0
    for folder, weight in ((models["base"], 1 - alpha), (models[name], alpha)):
        if weight:
            logits = oracle.load(folder)(ids, logits_to_keep=max_length + 1).logits[:, :-1]
            p_nTV = p_nTV + weight * logits.softmax(-1)
    return p_nTV.log()


def check_against_oracle(models, body, answer):
    """Compare all log-probabilities of an answer with the mixture that was asked for.

    A neighbour's weight or memory, or keys of another prefix, would be far off. Returns the number
    of tokens compared.
    """
    name, alpha = chosen(body.get("vllm_xargs"))
    sampled = [tokens for tokens, *_ in answer.values()]
    key_nTV = key_rows(models, name, alpha, body["prompt"], sampled)
    for key_TV, (tokens, values, *_) in zip(key_nTV, answer.values(), strict=True):
        assert len(values) == len(tokens) <= body["max_tokens"]
        wanted = [row[token].item() for row, token in zip(key_TV, tokens, strict=False)]
        assert values == pytest.approx(wanted, abs=oracle.TOLERANCE), body
        if is_greedy(body):
            best = key_TV[: len(tokens)].max(-1).values.tolist()
            assert wanted == pytest.approx(best, abs=oracle.TOLERANCE), body
    return sum(map(len, sampled))
