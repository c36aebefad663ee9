"""A real `vllm serve` and the real openai client."""

import json
import math
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import oracle
import pytest

SENTENCE = "memdec_alpha must be a number between 0 and 1"
PROMPT = [5, 6, 7, 8, 9]


def command(base, memory, alpha="0.6"):
    settings = f'{{"memdec": {{"model": "{memory}", "alpha": {alpha}}}}}'
    return ["vllm", "serve", base, "--model-impl", "memdec", "--additional-config", settings]


@pytest.fixture(scope="module")
def models(tiny_model):
    return tiny_model("llama"), tiny_model("llama", seed=1, hidden=96, layers=3)


@pytest.fixture(scope="module")
def server(models, subprocess_env, tmp_path_factory):
    """Yield (base URL, path of the log) of a running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("http") / "log"
    options = f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --max-num-seqs 16"
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command(*models), *options.split()], env=subprocess_env, stdout=out, stderr=out
        )
        try:
            while True:
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=1)
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.5)
            yield url, log
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


def complete(client, models, xargs=None, **options):
    body = {"return_tokens_as_token_ids": True}
    if xargs is not None:
        body["vllm_xargs"] = xargs
    defaults = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "logprobs": 3}
    return client.completions.create(model=models[0], extra_body=body, **defaults | options)


def token_ids(names):
    return [int(name.removeprefix("token_id:")) for name in names]


@pytest.mark.parametrize("alpha", [None, 0, 0.3, 1.0])
def test_completions(alpha, client, models):
    """Echoed prompt and sampled tokens have the mixture's log-probabilities."""
    xargs = None if alpha is None else {"memdec_alpha": alpha}
    found = complete(client, models, xargs, echo=True).choices[0].logprobs
    ids = token_ids(found.tokens)
    assert ids[: len(PROMPT)] == PROMPT and len(ids) == len(PROMPT) + 4
    key_TV = oracle.mixture(*models, 0.6 if alpha is None else alpha, ids)
    for position in range(1, len(ids)):
        wanted = key_TV[position - 1, ids[position]].item()
        assert found.token_logprobs[position] == pytest.approx(wanted, abs=oracle.TOLERANCE)


def test_chat(client, models):
    """A chat request carries its weight the same way."""
    answers = []
    for alpha in (0.0, 0.3, 1.0):
        answer = client.chat.completions.create(
            model=models[0],
            messages=[{"role": "user", "content": "bagi duto mela"}],
            max_tokens=4,
            temperature=0,
            logprobs=True,
            extra_body={
                "vllm_xargs": {"memdec_alpha": alpha},
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            },
        )
        found = answer.choices[0].logprobs.content
        sampled = token_ids(entry.token for entry in found)
        prompt = answer.model_dump()["prompt_token_ids"]
        key_TV = oracle.mixture(*models, alpha, prompt + sampled)
        for offset, entry in enumerate(found):
            wanted = key_TV[len(prompt) + offset - 1, sampled[offset]].item()
            assert entry.logprob == pytest.approx(wanted, abs=oracle.TOLERANCE)
        answers.append(sampled)
    assert answers[0] != answers[2]


@pytest.mark.parametrize("value", [1.5, -0.1, "0.3", "x", [0.3]])
def test_bad_weight_is_400(value, client, models):
    with pytest.raises(openai.BadRequestError, match=SENTENCE):
        complete(client, models, {"memdec_alpha": value})
    with pytest.raises(openai.BadRequestError, match=SENTENCE):
        client.chat.completions.create(
            model=models[0],
            messages=[{"role": "user", "content": "bagi"}],
            extra_body={"vllm_xargs": {"memdec_alpha": value}},
        )


def test_misspelt_weight_is_400(client, models):
    with pytest.raises(openai.BadRequestError, match="the arguments are 'memdec_alpha' and"):
        complete(client, models, {"memdec_apha": 0.3})


def test_nan_is_400(server, models):
    """JSON has no NaN, but Python's reader takes it."""
    body = {"model": models[0], "prompt": PROMPT, "vllm_xargs": {"memdec_alpha": math.nan}}
    request = urllib.request.Request(
        f"{server[0]}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code == 400


def test_bad_requests_harm_nobody(client, models):
    """Good requests of three weights give the same text alone and among bad ones."""

    def good(alpha):
        found = complete(client, models, {"memdec_alpha": alpha}, max_tokens=48).choices[0]
        return token_ids(found.logprobs.tokens)

    def bad(alpha):
        with pytest.raises(openai.BadRequestError):
            complete(client, models, {"memdec_alpha": alpha})

    alphas = [0.0, 0.3, 1.0]
    alone = [good(alpha) for alpha in alphas]
    with ThreadPoolExecutor(12) as pool:
        among = [pool.submit(good, alpha) for alpha in alphas]
        wrong = [pool.submit(bad, 2.0) for _ in range(12)]
        assert [future.result() for future in among] == alone
        for future in wrong:
            future.result()


def test_log_says_that_the_memory_is_live(server, models):
    base, memory = map(re.escape, models)
    parts = r"\(\S+ parameters, \d+% of the KV cache\)"
    for line in (
        rf"memdec: base {base} {parts}\.",
        rf"memdec: memory 'memory' {memory} {parts}, alpha 0\.6, the default\.",
    ):
        assert len(re.findall(line, server[1].read_text())) == 1


def test_bad_start_ends_with_the_sentence(models, subprocess_env):
    """Other weights are refused alike, see test_config.py."""
    run = subprocess.run(
        command(*models, "NaN"), env=subprocess_env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode != 0
    last = (run.stdout + run.stderr).strip().splitlines()[-1]
    assert "memdec alpha must be a number between 0 and 1" in last


def test_models_name_base_and_memories(server, models):
    """/v1/models and the log agree on parameters, shares of the KV cache and weights."""
    [card] = json.load(urllib.request.urlopen(f"{server[0]}/v1/models"))["data"]
    found = card["memdec"]
    assert found["default"] == "memory" and list(found["memories"]) == ["memory"]
    base, memory = found["base"], found["memories"]["memory"]
    assert (base["model"], memory["model"], memory["alpha"]) == (*models, 0.6)
    # Keys and values: 2 layers and 3 layers, of one head of 32 each.
    assert (base["kv_cache_share"], memory["kv_cache_share"]) == (0.4, 0.6)
    log = server[1].read_text()
    for part, share in ((base, "40%"), (memory, "60%")):
        assert f"({part['parameters'] / 1e6:.1f}M parameters, {share} of the KV cache)" in log


def counted(server):
    """Return (requests, prompt tokens, generated tokens) of each memory on the metrics endpoint."""
    text = urllib.request.urlopen(f"{server[0]}/metrics").read().decode()
    pattern = r'^memdec:(\w+)_total{memory="(\w+)"} (\S+)$'
    found = {(w, m): float(v) for w, m, v in re.findall(pattern, text, re.MULTILINE)}
    kinds = ("requests", "prompt_tokens", "generation_tokens")
    return {m: [found[k, m] for k in kinds] for m in ("memory", "none")}


def test_metrics_count_by_memory(server, client, models):
    before = counted(server)
    complete(client, models)
    complete(client, models, {"memdec_alpha": 0.2}, max_tokens=3)
    complete(client, models, {"memdec_memory": "none"}, max_tokens=2)
    after = counted(server)
    grown = {m: [b - a for a, b in zip(before[m], after[m], strict=True)] for m in before}
    assert grown == {"memory": [2, 2 * len(PROMPT), 7], "none": [1, len(PROMPT), 2]}
