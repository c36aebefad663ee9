"""Long and hostile use of real servers: many requests at once, one prefix, bad input, kill -9."""

import asyncio
import contextlib
import json
import random
import re
import socket
import statistics
import sys
import threading
import time
from pathlib import Path
from subprocess import PIPE, STDOUT, run

import httpx
import oracle
import psutil
import pytest
import torch
import vllm.envs

LAW, BIO = "law", "bio"
ALPHAS = {LAW: 0.6, BIO: 0.4}
BLOCK = 32  # tokens of a KV block, the fewest that the CPU attention takes
VOCAB = 1000
BLOCKS, CHUNK = 40, 512  # of the soaked server: KV blocks, and tokens a step


@pytest.fixture(scope="module")
def folders(tiny_model):
    """Return the folders of the base (None) and of two memories of different sizes."""
    long = {"positions": 1024, "spread": 0.15}  # of the weights: see tiny_config()
    return {
        None: tiny_model("llama", **long),
        LAW: tiny_model("llama", seed=1, hidden=96, layers=3, **long),
        BIO: tiny_model("gpt2", seed=2, hidden=32, layers=1, **long),
    }


def settings(folders, **alphas):
    memories = {
        name: {"model": folders[name], "alpha": alpha}
        for name, alpha in (ALPHAS | alphas).items()
        if name in folders
    }
    return {"memories": memories, "default": LAW if LAW in folders else BIO}


def chosen(xargs):
    """Return the memory and weight that a request with these arguments should get."""
    xargs = xargs or {}
    name = xargs.get("memdec_memory", LAW)
    if name == "none":
        return LAW, 0.0
    return name, xargs.get("memdec_alpha", ALPHAS[name])


def start(engine, folders, alphas=None, **options):
    """Return an engine with both memories, for requests of 1024 tokens."""
    return engine(folders[None], settings(folders, **alphas or {}), block_size=BLOCK, **options)


def ask(llm, prompt, xargs, salt=None):
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, logprobs=5, extra_args=xargs
    )
    request = {"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {})
    return llm.generate([request], params, use_tqdm=False)[0]


def values(output):
    """Return the tokens of an answer, and all reported log-probabilities."""
    found = output.outputs[0]
    rows = [{token: entry.logprob for token, entry in row.items()} for row in found.logprobs]
    return list(found.token_ids), rows


def test_a_cached_prefix_belongs_to_its_memory(folders, engine):
    """One long prompt, asked with one memory after the other, is never read from the wrong one."""
    prompt = oracle.prompts(1, 5 * BLOCK + 3, 5 * BLOCK + 3, VOCAB)[0]
    full = 5 * BLOCK
    law, bio, none = ({"memdec_memory": name} for name in (LAW, BIO, "none"))
    steps = [  # arguments, cache_salt, tokens that may come from the cache
        (law, None, 0),
        (bio, None, 0),
        (none, None, 0),
        (law, None, full),
        ({"memdec_alpha": 0}, None, full),  # of "none": neither has a memory
        (bio | {"memdec_alpha": 0.0}, None, full),
        (None, None, full),  # the default memory, law
        (law | {"memdec_alpha": 0.3}, None, full),  # a memory's blocks do not depend on its weight
        (bio | {"memdec_alpha": 1}, None, full),
        (law, "user", 0),
        (bio, "user", 0),
        (law, "user", full),
        (law, "other", 0),
        (none, "law", 0),
        (law, None, full),
    ]
    with start(engine, folders, enable_prefix_caching=True) as llm:
        found = [ask(llm, prompt, xargs, salt) for xargs, salt, _ in steps]
    assert [output.num_cached_tokens for output in found] == [cached for *_, cached in steps]

    for (xargs, _, _), output in zip(steps, found, strict=True):
        name, alpha = chosen(xargs)
        assert oracle.gap(output, folders[None], folders[name], alpha) < oracle.TOLERANCE

    for first in (0, 1, 2, 4):
        with start(engine, folders, enable_prefix_caching=False) as llm:
            tokens, rows = values(ask(llm, prompt, steps[first][0]))
        same = [o for (x, *_), o in zip(steps, found, strict=True) if x == steps[first][0]]
        for output in same:
            assert values(output)[0] == tokens
            for row, wanted in zip(values(output)[1], rows, strict=True):
                assert row == pytest.approx(wanted, abs=oracle.TOLERANCE)


def test_a_default_weight_of_zero_leaves_no_blocks_behind(folders, engine):
    """A memory that did not run, its weight being 0, has no keys for a request that gives one."""
    prompt = oracle.prompts(1, 4 * BLOCK + 3, 4 * BLOCK + 3, VOCAB, seed=1)[0]
    with start(engine, folders, {LAW: 0.0}, enable_prefix_caching=True) as llm:
        ask(llm, prompt, None)
        output = ask(llm, prompt, {"memdec_alpha": 0.7})
    assert oracle.gap(output, folders[None], folders[LAW], 0.7) < oracle.TOLERANCE


class Server:
    """A running `vllm serve` with both memories."""

    def __init__(self, folders, env, log, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log, self.model = f"http://127.0.0.1:{port}", log, folders[None]
        given = [
            "--additional-config",
            json.dumps({"memdec": settings(folders)}),
            "--port",
            str(port),
        ]
        given += f"--host 127.0.0.1 --dtype float32 --block-size {BLOCK}".split()
        with log.open("w") as out:
            self.process = psutil.Popen(
                ["vllm", "serve", self.model, "--model-impl", "memdec", *given, *options],
                env=env,
                stdout=out,
                stderr=out,
            )

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


@pytest.fixture(scope="module")
def server(folders, subprocess_env, tmp_path_factory):
    """Yield a server whose KV cache holds a handful of long requests, of the 32 at a time."""
    # A kernel for each number of rows, up to 1024 of them, grows by 400 MB before it is full.
    env = {**subprocess_env, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}
    options = f"--enforce-eager --num-gpu-blocks-override {BLOCKS} --max-num-seqs 32"
    options += f" --max-num-batched-tokens {CHUNK} --enable-prefix-caching"
    log = tmp_path_factory.mktemp("soak") / "log"
    server = Server(folders, env, log, *options.split())
    try:
        yield server.wait()
    finally:
        server.stop()


def soak_requests(count, seeded):
    """Return random /v1/completions bodies, with `abort`: after how many events to hang up.

    If `seeded` their sampling has a seed, and 32 of their prompts fit into one step: vLLM on a CPU
    dies ("CPU Generator does not use offset") when it cuts the prompt of a seeded request in two.
    """
    rng = random.Random(int(seeded))
    longest = CHUNK // 32 if seeded else 700
    pool = oracle.prompts(60, 700, 700, VOCAB)  # their prefixes, so that the cache has hits
    bodies = []
    for _ in range(count):
        # Many short ones: a KV cache that is full to the last block makes vLLM preempt.
        length = rng.randint(1, rng.choice([longest, longest, longest // 7]))
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
def key_rows(folders, name, alpha, prompt, sampled):
    """Return the mixture's float64 log-probabilities for each sampled token [n, T, V].

    What oracle.mixture() computes, for several continuations of a prompt and their rows only.
    """
    longest = max(map(len, sampled))
    # Padded on the right, where no causal model looks.
    ids = torch.tensor([[*prompt, *tokens, *[0] * (longest - len(tokens))] for tokens in sampled])
    p_nTV = 0
    for folder, weight in ((folders[None], 1 - alpha), (folders[name], alpha)):
        if weight:
            logits = oracle.load(folder)(ids, logits_to_keep=longest + 1).logits[:, :-1]
            p_nTV = p_nTV + weight * logits.softmax(-1)
    return p_nTV.log()


def check_against_oracle(folders, body, answer):
    """Compare all log-probabilities of an answer with the mixture that was asked for.

    A neighbour's weight or memory, or keys of another prefix, would be far off. Returns the number
    of tokens compared.
    """
    name, alpha = chosen(body.get("vllm_xargs"))
    sampled = [tokens for tokens, *_ in answer.values()]
    key_nTV = key_rows(folders, name, alpha, body["prompt"], sampled)
    for key_TV, (tokens, values, *_) in zip(key_nTV, answer.values(), strict=True):
        assert len(values) == len(tokens) <= body["max_tokens"]
        wanted = [row[token].item() for row, token in zip(key_TV, tokens, strict=False)]
        assert values == pytest.approx(wanted, abs=oracle.TOLERANCE), body
        if is_greedy(body):
            best = key_TV[: len(tokens)].max(-1).values.tolist()
            assert wanted == pytest.approx(best, abs=oracle.TOLERANCE), body
    return sum(map(len, sampled))


def alone(llm, body):
    """Return the one answer that a greedy request gets with the engine to itself."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=body["max_tokens"],
        stop=body.get("stop"),
        stop_token_ids=body.get("stop_token_ids"),
        extra_args=body.get("vllm_xargs"),
    )
    prompt = {"prompt_token_ids": body["prompt"]}
    found = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
    return list(found.token_ids), found.text, found.finish_reason, found.stop_reason


def same(found, wanted, key_TV):
    """Say whether two greedy answers are equal, or part at what is a tie in the answer key."""
    for row, mine, theirs in zip(key_TV, found[0], wanted[0], strict=False):
        if mine != theirs:
            return abs(row[mine] - row[theirs]).item() < oracle.TOLERANCE
    return found == wanted


def test_soak(server, folders, engine):
    """500 requests of every kind, 32 at a time, preempted and hung up on, disturb no other."""
    waves = soak_requests(100, seeded=True), soak_requests(380, seeded=False) + crowd()
    bodies = sum(waves, [])
    again = soak_requests(len(bodies), seeded=False)  # to see the memory of a warm server
    samples, done, over, answers = [], [], threading.Event(), []

    def watch():
        while not over.wait(0.1):
            samples.append((len(done), server.rss()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for wave in waves:
            answers += asyncio.run(soak(server.url, server.model, wave, lambda: done.append(None)))
        asyncio.run(soak(server.url, server.model, again, lambda: done.append(None)))
    finally:
        over.set()
        watcher.join()

    # vLLM has finished or forgotten them all, and given back their blocks.
    deadline = time.monotonic() + 30
    while server.metric("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:num_requests_waiting") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    preempted = server.metric("vllm:num_preemptions_total")
    hits = server.metric("vllm:prefix_cache_hits_total")
    hung_up = sum(b.get("n", 1) for b in bodies + again) - server.metric(
        "vllm:request_success_total"
    )
    assert preempted > 0 and hits > 0 and hung_up > 20

    # With oneDNN's cache of kernels held small (see server()) 250 to 500 more requests took 0.5 to
    # 15 MB, as in vLLM without memories; 100 kB left behind by each request would be 50 MB.
    nearest = sorted(samples, key=lambda sample: abs(sample[0] - len(bodies)))[:5]
    halfway = statistics.median(rss for _, rss in nearest)
    growth = statistics.median(rss for count, rss in samples[-5:]) - halfway
    assert growth < 25, f"{growth:.0f} MB more in the last half"

    compared = sum(check_against_oracle(folders, *x) for x in zip(bodies, answers, strict=True))
    greedy = [
        (body, answer)
        for body, answer in zip(bodies, answers, strict=True)
        if is_greedy(body) and body["abort"] is None
    ]
    assert len(greedy) >= 100
    with start(engine, folders, enable_prefix_caching=False) as llm:
        for body, answer in greedy:
            wanted = alone(llm, body)
            key_nTV = key_rows(
                folders, *chosen(body.get("vllm_xargs")), body["prompt"], [wanted[0]]
            )
            for tokens, _, *rest in answer.values():
                assert same((tokens, *rest), wanted, key_nTV[0]), body
    print(
        f"{len(bodies)} requests, {compared} tokens compared, {len(greedy)} requests run alone, "
        f"{preempted:.0f} preemptions, {hits:.0f} cached tokens, {hung_up:.0f} hung up, "
        f"{growth:.1f} MB more in the last half"
    )


LONG = json.dumps("m" * 100_000)
WEIGHT = r"memdec_alpha must be a number between 0 and 1, got .*\."
NAME = (
    r"memdec_memory must be one of \['law', 'bio', 'none'\], the memories of this server, got .*\."
)
KEY = r"Unknown extra argument '.*': the arguments are 'memdec_alpha' and 'memdec_memory'\."
# vLLM's own words, for what it refuses before it asks anybody.
RANGE = r"extra_args integers must be between -2\*\*63 and 2\*\*64 - 1\. .*"
TYPE = r"\d+ validation errors?:\n.*'loc': 'body\.vllm_xargs.*"
JSON = r"1 validation error:\n.*JSON decode error.*"
BODY = r"There was an error parsing the body"
MALFORMED = [  # JSON of vllm_xargs, and what the answer says
    ('{"memdec_alpha": 1.0000001}', WEIGHT),
    ('{"memdec_alpha": -1e-9}', WEIGHT),
    ('{"memdec_alpha": 2}', WEIGHT),
    ('{"memdec_alpha": -1}', WEIGHT),
    ('{"memdec_alpha": NaN}', WEIGHT),
    ('{"memdec_alpha": Infinity}', WEIGHT),
    ('{"memdec_alpha": -Infinity}', WEIGHT),
    ('{"memdec_alpha": 1e400}', WEIGHT),
    ('{"memdec_alpha": -1e400}', WEIGHT),
    ('{"memdec_alpha": 1' + 400 * "0" + "}", RANGE),
    ('{"memdec_alpha": 1' + 5000 * "0" + "}", BODY),
    ('{"memdec_alpha": "0.5"}', WEIGHT),
    ('{"memdec_alpha": ""}', WEIGHT),
    ('{"memdec_alpha": "NaN"}', WEIGHT),
    ('{"memdec_alpha": "\\u0660"}', WEIGHT),  # a digit of Unicode
    ('{"memdec_alpha": [0.5]}', WEIGHT),
    ('{"memdec_alpha": []}', WEIGHT),
    ('{"memdec_alpha": [[0.5]]}', TYPE),
    ('{"memdec_alpha": {"value": 0.5}}', TYPE),
    ('{"memdec_alpha": null}', TYPE),
    (f'{{"memdec_alpha": {LONG}}}', WEIGHT),
    ('{"memdec_memory": ["law"]}', NAME),
    ('{"memdec_memory": []}', NAME),
    ('{"memdec_memory": 0}', NAME),
    ('{"memdec_memory": 1.5}', NAME),
    ('{"memdec_memory": true}', NAME),
    ('{"memdec_memory": null}', TYPE),
    ('{"memdec_memory": {"law": 1}}', TYPE),
    ('{"memdec_memory": ""}', NAME),
    ('{"memdec_memory": "LAW"}', NAME),
    ('{"memdec_memory": "law "}', NAME),
    ('{"memdec_memory": "law\\u0000"}', NAME),
    ('{"memdec_memory": "l\\u0430w"}', NAME),  # a Cyrillic a
    ('{"memdec_memory": "\\u6cd5\\ud83d\\ude00"}', NAME),
    ('{"memdec_memory": "\\ud800"}', NAME),  # half a surrogate pair
    ('{"memdec_memory": "__proto__"}', NAME),
    ('{"memdec_memory": "constructor"}', NAME),
    ('{"memdec_memory": "../law"}', NAME),
    (f'{{"memdec_memory": {LONG}}}', NAME),
    ('{"memdec_memory": "law", "memdec_alpha": 7}', WEIGHT),
    ('{"memdec_memory": "none", "memdec_alpha": 7}', WEIGHT),
    ('{"memdec_memory": "law", "memdec_memory": "bio2"}', NAME),
    ('{"memdec_": 0.5}', KEY),
    ('{"memdec_alpha ": 0.5}', KEY),
    ('{"memdec___proto__": 0.5}', KEY),
    ('{"memdec_\\u03b1": 0.5}', KEY),
    (f'{{"memdec_{LONG[1:]}: 0.5}}', KEY),
    ("[]", TYPE),
    ('"memdec_alpha"', TYPE),
    ("0.5", TYPE),
    ('{"memdec_alpha": ' + 200 * "[" + 200 * "]" + "}", TYPE),
    ('{"memdec_alpha": ' + 100_000 * "[" + 100_000 * "]" + "}", BODY),
    ('{"memdec_alpha": 0.5', JSON),  # not closed
    ('{"memdec_alpha": .5}', JSON),
]


def test_malformed_requests(server, folders):
    """Each is answered with 400 and a sentence, and the server goes on answering."""
    good = {"prompt": [5, 6, 7, 8, 9], "max_tokens": 4, "temperature": 0, "abort": None}
    good |= {"stream": False, "vllm_xargs": {"memdec_alpha": 0.5, "memdec_memory": BIO}}
    ends = {
        "completions": '"prompt": [5, 6, 7]',
        "chat/completions": '"messages": [{"role": "user", "content": "bagi"}]',
    }

    async def run():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            first = await send(client, server.model, good)
            check_against_oracle(folders, good, first)
            for xargs, sentence in MALFORMED:
                for end, prompt in ends.items():
                    body = f'{{"model": "{server.model}", {prompt}, "vllm_xargs": {xargs}}}'
                    response = await client.post(
                        f"/v1/{end}", content=body, headers={"Content-Type": "application/json"}
                    )
                    answer = response.json()
                    # Where even the JSON cannot be read it is FastAPI that answers.
                    message = answer["detail"] if sentence is BODY else answer["error"]["message"]
                    if response.status_code != 400 or not re.fullmatch(sentence, message, re.S):
                        wrong.append((end, xargs[:80], response.status_code, message[:200]))
                    elif len(message) > 1000:
                        wrong.append((end, xargs[:80], f"a message of {len(message)} characters"))
                assert await send(client, server.model, good) == first, xargs

    wrong = []
    asyncio.run(run())
    assert len(MALFORMED) >= 40
    assert not wrong, "\n".join(map(str, wrong))


def test_true_is_one(server, folders):
    """Over HTTP vLLM turns true into 1 before anybody can see it: the memory alone answers."""
    body = {"prompt": [5, 6, 7, 8, 9], "max_tokens": 8, "temperature": 0, "abort": None}
    body |= {"stream": False, "vllm_xargs": {"memdec_alpha": True}}
    answers = asyncio.run(soak(server.url, server.model, [body], lambda: None))
    check_against_oracle(folders, body, answers[0])


def kill(server, name):
    """Kill -9 a process of a server and wait for all the others to end by themselves."""
    tree = server.tree()
    (victim,) = (p for p in tree if name in " ".join([p.name(), *p.cmdline()]))
    victim.kill()
    left = psutil.wait_procs(tree, 60)[1]
    assert not left, left
    return server.process.wait()


def test_the_engine_is_killed(server):
    """A client in mid-stream sees no answer that looks whole. The last test of this server."""
    endless = {"model": server.model, "prompt": [5], "max_tokens": 900, "stream": True}
    endless |= {"ignore_eos": True, "vllm_xargs": {"memdec_memory": BIO}}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=endless, timeout=60) as response:
        events = response.iter_lines()
        next(events)
        # Its exit code says nothing: vLLM ends a server whose engine died with 0.
        kill(server, "EngineCore")
        rest = []
        with contextlib.suppress(httpx.TransportError):
            rest.extend(events)
    assert not any('"finish_reason":"length"' in event for event in rest)
    assert "EngineDeadError" in server.log.read_text()


GENERATE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    llm = LLM(**job["llm"])
    prompt = {"prompt_token_ids": job["prompt"]}
    for alpha in job["alphas"]:
        params = SamplingParams(
            temperature=0, max_tokens=8, logprobs=5, extra_args={"memdec_alpha": alpha}
        )
        answer = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
        rows = [{t: e.logprob for t, e in row.items()} for row in answer.logprobs]
        print(json.dumps([list(answer.token_ids), rows]))
"""


@pytest.mark.feature("torch.compile")
def test_killed_while_compiling(tiny_model, subprocess_env, tmp_path):
    """What is half compiled is not taken for whole by the next start."""
    base, memory = tiny_model("llama", layers=1), tiny_model("gpt2", seed=2, hidden=32, layers=1)
    cache = tmp_path / "cache"
    cache.mkdir()
    # What vLLM knows of model classes it finds out in a process for each; only compiling is new.
    known = Path(vllm.envs.VLLM_CACHE_ROOT) / "modelinfos"
    known.mkdir(parents=True, exist_ok=True)
    (cache / "modelinfos").symlink_to(known)
    env = {**subprocess_env, "VLLM_CACHE_ROOT": str(cache), "TORCHDYNAMO_DISABLE": "0"}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    alphas, prompt = [0.5, 1, 0], [5, 6, 7, 8, 9]
    block = {"model": memory, "alpha": 0.5}
    engine = {"model": base, "model_impl": "memdec", "additional_config": {"memdec": block}}
    engine |= {"dtype": "float32", "max_num_seqs": 4, "max_model_len": 256}
    job = {"llm": engine, "alphas": alphas, "prompt": prompt}
    command = [sys.executable, "-c", GENERATE, json.dumps(job)]

    with psutil.Popen(command, env=env, stdout=PIPE, stderr=STDOUT) as process:
        # The first compiled file, of many.
        while not any(file.is_file() for file in cache.glob("torch_compile_cache/**/*")):
            assert process.poll() is None, process.stdout.read()[-3000:]
            time.sleep(0.05)
        process.kill()
        assert b"[[" not in process.stdout.read()

    done = run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert len(answers) == len(alphas)
    for alpha, (sampled, rows) in zip(alphas, answers, strict=True):
        error = oracle.worst_error(prompt, sampled, [], rows, base, memory, alpha)
        assert error < oracle.TOLERANCE, alpha
