"""Long and hostile use of a real server: many requests at once, one prefix, bad input, kill -9."""

import asyncio
import contextlib
import json
import re
import statistics
import sys
import threading
import time
from pathlib import Path
from subprocess import PIPE, STDOUT, run

import httpx
import psutil
import pytest
import vllm.envs
from support import oracle
from support.choices import memdec_block
from support.soak_client import (
    BIO,
    BLOCK,
    LAW,
    VOCAB,
    check_against_oracle,
    chosen,
    crowd,
    is_greedy,
    key_rows,
    send,
    soak,
    soak_requests,
)


@pytest.fixture(scope="module")
def models(long_models):
    return long_models


def start(engine, models, alphas=None, **options):
    """Return an engine with both memories, for requests of 1024 tokens."""
    return engine(models["base"], memdec_block(models, **alphas or {}), block_size=BLOCK, **options)


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


def test_a_cached_prefix_belongs_to_its_memory(models, engine):
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
    with start(engine, models, enable_prefix_caching=True) as llm:
        found = [ask(llm, prompt, xargs, salt) for xargs, salt, _ in steps]
    assert [output.num_cached_tokens for output in found] == [cached for *_, cached in steps]

    for (xargs, _, _), output in zip(steps, found, strict=True):
        name, alpha = chosen(xargs)
        assert oracle.gap(output, models["base"], models[name], alpha) < oracle.TOLERANCE

    for first in (0, 1, 2, 4):
        with start(engine, models, enable_prefix_caching=False) as llm:
            tokens, rows = values(ask(llm, prompt, steps[first][0]))
        same = [o for (x, *_), o in zip(steps, found, strict=True) if x == steps[first][0]]
        for output in same:
            assert values(output)[0] == tokens
            for row, wanted in zip(values(output)[1], rows, strict=True):
                assert row == pytest.approx(wanted, abs=oracle.TOLERANCE)


def test_a_default_weight_of_zero_leaves_no_blocks_behind(models, engine):
    """A memory that did not run, its weight being 0, has no keys for a request that gives one."""
    prompt = oracle.prompts(1, 4 * BLOCK + 3, 4 * BLOCK + 3, VOCAB, seed=1)[0]
    with start(engine, models, {LAW: 0.0}, enable_prefix_caching=True) as llm:
        ask(llm, prompt, None)
        output = ask(llm, prompt, {"memdec_alpha": 0.7})
    assert oracle.gap(output, models["base"], models[LAW], 0.7) < oracle.TOLERANCE


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


@pytest.mark.drafts
def test_soak_with_drafts(drafting_server, models, engine):
    """As below: drafts are verified, and the engines alone, which do not draft, say the same."""
    soaked(drafting_server, models, engine, 50, 190)
    if drafting_server.drafts != "auto":  # which goes by time
        assert drafting_server.metric("vllm:spec_decode_num_accepted_tokens_total") > 100


def test_soak(server, models, engine):
    """500 requests of every kind, 32 at a time, preempted and hung up on, disturb no other."""
    soaked(server, models, engine, 100, 380)


def soaked(server, models, engine, seeded, others):
    waves = soak_requests(seeded, seeded=True), soak_requests(others, seeded=False) + crowd()
    bodies = sum(waves, [])
    again = soak_requests(len(bodies), seeded=False)  # to see the memory of a warm server
    samples, done, over, answers = [], [], threading.Event(), []
    counters = ("num_preemptions", "prefix_cache_hits", "request_success")
    before = [server.metric(f"vllm:{name}_total") for name in counters]

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
    after = [server.metric(f"vllm:{name}_total") for name in counters]
    preempted, hits, ended = (b - a for a, b in zip(before, after, strict=True))
    hung_up = sum(body.get("n", 1) for body in bodies + again) - ended
    assert preempted > 0 and hits > 0 and hung_up > len(bodies) / 25

    # With oneDNN's cache of kernels held small (see server()) 250 to 500 more requests took 0.5 to
    # 15 MB, as in vLLM without memories; 100 kB left behind by each request would be 50 MB.
    nearest = sorted(samples, key=lambda sample: abs(sample[0] - len(bodies)))[:5]
    halfway = statistics.median(rss for _, rss in nearest)
    growth = statistics.median(rss for count, rss in samples[-5:]) - halfway
    assert growth < 25, f"{growth:.0f} MB more in the last half"

    compared = sum(check_against_oracle(models, *x) for x in zip(bodies, answers, strict=True))
    greedy = [
        (body, answer)
        for body, answer in zip(bodies, answers, strict=True)
        if is_greedy(body) and body["abort"] is None
    ]
    assert len(greedy) >= len(bodies) / 5
    with start(engine, models, enable_prefix_caching=False) as llm:
        for body, answer in greedy:
            wanted = alone(llm, body)
            key_nTV = key_rows(models, *chosen(body.get("vllm_xargs")), body["prompt"], [wanted[0]])
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
TYPE = r"\d+ validation errors?:\n.*'loc': 'body\.vllm_xargs.*"
JSON = r"1 validation error:\n.*JSON decode error.*"
BODY = r"There was an error parsing the body"
SHARE = "memdec_memory: the weight of 'law' must be a number between 0 and 1, got .*"
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
    ('{"memdec_alpha": true}', WEIGHT),  # which vLLM takes for 1
    ('{"memdec_alpha": 1' + 400 * "0" + "}", WEIGHT),
    ('{"memdec_alpha": 1' + 5000 * "0" + "}", BODY),
    ('{"memdec_alpha": "0.5"}', WEIGHT),
    ('{"memdec_alpha": ""}', WEIGHT),
    ('{"memdec_alpha": "NaN"}', WEIGHT),
    ('{"memdec_alpha": "\\u0660"}', WEIGHT),  # a digit of Unicode
    ('{"memdec_alpha": [0.5]}', WEIGHT),
    ('{"memdec_alpha": []}', WEIGHT),
    ('{"memdec_alpha": [[0.5]]}', WEIGHT),
    ('{"memdec_alpha": {"value": 0.5}}', WEIGHT),
    ('{"memdec_alpha": null}', WEIGHT),
    (f'{{"memdec_alpha": {LONG}}}', WEIGHT),
    ('{"memdec_memory": ["law"]}', NAME),
    ('{"memdec_memory": []}', NAME),
    ('{"memdec_memory": 0}', NAME),
    ('{"memdec_memory": 1.5}', NAME),
    ('{"memdec_memory": true}', NAME),
    ('{"memdec_memory": null}', NAME),
    ('{"memdec_memory": {"law": 2}}', SHARE),
    ('{"memdec_memory": {"law": {"law": 1}}}', SHARE),
    ('{"memdec_memory": {"LAW": 1}}', "memdec_memory has a weight for 'LAW', which is none .*"),
    ('{"memdec_memory": "law:1e400"}', SHARE),
    ('{"memdec_memory": "law:0.5:"}', ".* is no memory with its weight.*"),
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
    ('{"memdec_alpha": ' + 200 * "[" + 200 * "]" + "}", WEIGHT),
    ('{"memdec_alpha": ' + 100_000 * "[" + 100_000 * "]" + "}", BODY),
    ('{"memdec_alpha": 0.5', JSON),  # not closed
    ('{"memdec_alpha": .5}', JSON),
]


def test_malformed_requests(server, models):
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
            check_against_oracle(models, good, first)
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
    engine |= {"num_gpu_blocks_override": 100}
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
