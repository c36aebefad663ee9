"""A real `vllm serve` and the real openai client."""

import json
import math
import re
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from support import http_rows, oracle
from support.choices import ALPHAS, PROMPT, Choice, greedy, mixture
from support.http_rows import complete, token_ids

DASHBOARD = Path(__file__).parents[2] / "benchmarks" / "grafana.json"
NAMES = re.compile(r"memdec:\w+_total")
SENTENCE = "memdec_alpha must be a number between 0 and 1"
feature = pytest.mark.feature


@pytest.fixture(scope="module")
def models(long_models):
    return long_models


@pytest.fixture(scope="module")
def api(server):
    """Return the API's address."""
    return f"{server.url}/v1"


@pytest.fixture(scope="module")
def client(api):
    return openai.OpenAI(base_url=api, api_key="none", max_retries=0)


@pytest.mark.parametrize("alpha", [None, 0, 0.3, 1.0])
def test_completions(alpha, client, models):
    """Echoed prompt and sampled tokens have the mixture's log-probabilities."""
    xargs = None if alpha is None else {"memdec_alpha": alpha}
    found = complete(client, models, xargs, echo=True).choices[0].logprobs
    ids = token_ids(found.tokens)
    assert ids[: len(PROMPT)] == PROMPT and len(ids) == len(PROMPT) + 4
    key_TV = mixture(models, Choice("law", alpha), ids)
    for position in range(1, len(ids)):
        wanted = key_TV[position - 1, ids[position]].item()
        assert found.token_logprobs[position] == pytest.approx(wanted, abs=oracle.TOLERANCE)


@feature("streaming")
def test_streaming(client, models):
    http_rows.check_streaming(client, models)


@feature("chat completions")
def test_chat_completions(client, models):
    http_rows.check_chat(client, models)


@pytest.mark.drafts
@feature("streaming")
@feature("chat completions")
@feature("a memory by the model's name")
def test_drafts_over_http(drafting_server, models):
    """Several tokens in an event, and an echoed prompt before them."""
    url = f"{drafting_server.url}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    test_streaming(client, models)
    test_chat_completions(client, models)
    for alpha in (None, 0, 0.3, 1.0):
        test_completions(alpha, client, models)
    for name in ("law", "bio", "none"):
        [found] = complete(client, models, model=name, max_tokens=8).choices
        tokens = token_ids(found.logprobs.tokens)
        assert tokens == greedy(models, Choice(name), PROMPT, 8)[: len(tokens)], name
    [biased] = complete(client, models, max_tokens=8, logit_bias={"7": 100}).choices
    assert token_ids(biased.logprobs.tokens) == [7] * 8
    if drafting_server.drafts != "auto":  # which goes by time
        assert drafting_server.metric("vllm:spec_decode_num_accepted_tokens_total") > 0
    for theirs, ours in (("num_draft", "draft"), ("num_accepted", "accepted_draft")):
        drafted = drafting_server.metric(f"vllm:spec_decode_{theirs}_tokens_total")
        assert drafting_server.metric(f"memdec:{ours}_tokens_total") == drafted


def test_the_dashboard_shows_all_counters(drafting_server):
    """Each is there from the start, for each memory, and no panel asks for another one."""
    page = urllib.request.urlopen(f"{drafting_server.url}/metrics").read().decode()
    counters = {name: page.count(f'\n{name}{{memory="') for name in NAMES.findall(page)}
    counters = {name: count for name, count in counters.items() if count}
    asked = [
        target["expr"]
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel["targets"]
    ]
    assert {name for query in asked for name in NAMES.findall(query)} == set(counters)
    assert len(counters) == 9 and set(counters.values()) == {2, 3}  # of which one is "none"


@feature("beam search")
def test_beam_search_over_http(client, models):
    """vLLM drops the request's own memory and weight: it gets the server's, or HTTP 400."""

    http_rows.check_beams(client, models)
    with pytest.raises(openai.BadRequestError, match="Beam search has the server's memory"):
        http_rows.search(client, models, vllm_xargs=Choice("bio", 1.0).extra_args)


@feature("vllm bench serve")
def test_bench_serve(server, models, subprocess_env, tmp_path):
    command = ["vllm", "bench", "serve", "--backend", "openai", "--model", models["base"]]
    options = (
        f"--base-url {server.url} --dataset-name random --random-input-len 24 "
        "--random-output-len 8 --num-prompts 6 --ignore-eos --save-result "
        f"--result-dir {tmp_path} --result-filename result.json"
    )
    run = subprocess.run(
        [*command, *options.split()], env=subprocess_env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (6, 48)


@pytest.mark.parametrize("value", [1.5, -0.1, "0.3", "x", [0.3]])
def test_bad_weight_is_400(value, client, models):
    with pytest.raises(openai.BadRequestError, match=SENTENCE):
        complete(client, models, {"memdec_alpha": value})
    with pytest.raises(openai.BadRequestError, match=SENTENCE):
        client.chat.completions.create(
            model=models["base"],
            messages=[{"role": "user", "content": "bagi"}],
            extra_body={"vllm_xargs": {"memdec_alpha": value}},
        )


def test_misspelt_weight_is_400(client, models):
    with pytest.raises(openai.BadRequestError, match="the arguments are 'memdec_alpha' and"):
        complete(client, models, {"memdec_apha": 0.3})


def post(server, path, body):
    """Return the status and the text of an answer."""
    response = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    return response.status_code, response.text


def bodies(models):
    """Return a body that each of these endpoints answers, by path."""
    said = [{"role": "user", "content": "bagi duto"}]
    body = {"model": models["base"], "temperature": 0}
    return {
        "/v1/completions": body | {"prompt": PROMPT, "max_tokens": 4},
        "/v1/chat/completions": body | {"messages": said, "max_tokens": 4},
        "/v1/chat/completions/batch": body | {"messages": [said], "max_tokens": 4},
        "/v1/responses": body | {"input": "bagi duto", "max_output_tokens": 4},
        "/v1/messages": body | {"messages": said, "max_tokens": 4},
        "/invocations": body | {"prompt": PROMPT, "max_tokens": 4},
        "/inference/v1/generate": {
            "token_ids": PROMPT,
            "sampling_params": {"temperature": 0, "max_tokens": 4},
        },
        "/generative_scoring": {
            "query": PROMPT,
            "items": [[5, 6], [7]],
            "label_token_ids": [1, 2],
        },
    }


WITHOUT_XARGS = ("/inference/v1/generate", "/generative_scoring")
MISPLACED = [
    {"memdec_alpha": 0},
    {"memdec_memory": "nowhere"},
    {"memdec-alpha": 0},
    {"memDecAlpha": 0},
    {"memdc_alpha": 0},
    {"alpha": 0},
    {"memory": "none"},
    {"vllm_xargs": {"alpha": 0}},
    {"vllm_xargs": {"memory": "none"}},
    {"vllm_xargs": {"Memdec_alpha": 0}},
    {"vllm-xargs": {"alpha": 0}},
    {"sampling_params": {"temperature": 0, "max_tokens": 4, "alpha": 0}},
    {"xargs": {"memdec_alpha": 0}},
    {"xargs": {"alpha": 0}},
    {"extra_args": {"memdec_alpha": 0}},
    {"extra_body": {"memdec_memory": "none"}},
    {"extra_body": {"vllm_xargs": {"memdec_alpha": 0}}},
    {"memdec": {"alpha": 0}},
    {"chat_template_kwargs": {"memdec_alpha": 0}},
    {"sampling_params": {"temperature": 0, "max_tokens": 4, "memdec_alpha": 0}},
]


def test_what_is_asked_for_elsewhere_is_400(server, models):
    """Each near-miss on each endpoint: the remedy, and never an answer of the default weight."""
    answered = []
    for path, body in bodies(models).items():
        status, text = post(server, path, body)
        assert status == 200, (path, text)
        place = {"/generative_scoring": "the server's own"}.get(
            path, "put it into " + ("sampling_params" if path in WITHOUT_XARGS else "vllm_xargs")
        )
        for extra in MISPLACED:
            status, text = post(server, path, body | extra)
            known = "the arguments are 'memdec_alpha'" in text and "vllm_xargs" in extra
            if status != 400 or not (place in text or known):
                answered.append((path, extra, status, text[:200]))
        status, text = post(server, f"{path}?memdec_alpha=0", body)
        if status != 400 or place not in text:
            answered.append((path, "?memdec_alpha=0", status, text[:200]))
    assert not answered


def test_what_is_asked_for_rightly_is_obeyed(server, models):
    """The metrics count by the memory that ran; what is not a request is let through."""
    labels = {"metadata": {"memory": "none", "memdec_alpha": "0"}, "user": "memory"}
    for path, body in bodies(models).items():
        before = counted(server)
        if path == "/generative_scoring":
            continue
        if path in WITHOUT_XARGS:
            params = body["sampling_params"] | {"extra_args": {"memdec_memory": "bio"}}
            status, text = post(server, path, body | {"sampling_params": params})
        else:
            asked = {"vllm_xargs": {"memdec_memory": "bio", "memdec_alpha": 0.3}}
            labelled = {} if path == "/v1/messages" else labels
            status, text = post(server, path, body | asked | labelled)
        assert status == 200, (path, text)
        after = counted(server)
        grown = {name: after[name][0] - before[name][0] for name in after}
        assert grown == {"law": 0, "bio": 1, "none": 0}, path
    text = {"model": models["base"], "prompt": "memory alpha", "alpha": 1}
    assert post(server, "/tokenize", text)[0] == 200  # no weight decides this


def test_nan_is_400(api, models):
    """JSON has no NaN, but Python's reader takes it."""
    body = {"model": models["base"], "prompt": PROMPT, "vllm_xargs": {"memdec_alpha": math.nan}}
    request = urllib.request.Request(
        f"{api}/completions",
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
    parts = r"\(\S+ parameters, \d+% of the KV cache\)"
    for line in (
        rf"memdec: base {re.escape(models['base'])} {parts}\.",
        rf"memdec: memory 'law' {re.escape(models['law'])} {parts}, alpha 0\.6, the default\.",
        rf"memdec: memory 'bio' {re.escape(models['bio'])} {parts}, alpha 0\.4\.",
    ):
        assert len(re.findall(line, server.log.read_text())) == 1, line


def test_bad_start_ends_with_the_sentence(models, subprocess_env):
    """Other weights are refused alike, see test_startup.py."""
    settings = f'{{"memdec": {{"model": "{models["law"]}", "alpha": NaN}}}}'
    command = ["vllm", "serve", models["base"], "--model-impl", "memdec"]
    run = subprocess.run(
        [*command, "--additional-config", settings],
        env=subprocess_env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode != 0
    last = (run.stdout + run.stderr).strip().splitlines()[-1]
    assert "memdec alpha must be a number between 0 and 1" in last


def test_models_name_base_and_memories(api, server, models):
    """/v1/models and the log agree on parameters, shares of the KV cache and weights."""
    card, *_ = json.load(urllib.request.urlopen(f"{api}/models"))["data"]
    found = card["memdec"]
    assert found["default"] == "law" and list(found["memories"]) == ["law", "bio"]
    parts = {"base": found["base"], **found["memories"]}
    assert {name: part["model"] for name, part in parts.items()} == models
    assert {name: part["alpha"] for name, part in found["memories"].items()} == ALPHAS
    # Keys and values: 2, 3 and 1 layers, of one head of 32 each.
    for name, layers in (("base", 2), ("law", 3), ("bio", 1)):
        assert parts[name]["kv_cache_share"] == pytest.approx(layers / 6, abs=1e-3)
        size = f"{parts[name]['parameters'] / 1e6:.1f}M parameters"
        assert f"({size}, {layers / 6:.0%} of the KV cache)" in server.log.read_text()


def counted(server):
    """Return what the metrics endpoint has of each memory.

    Requests, tokens of prompts and of answers, rows that were mixed, and the sum of their weights.
    """
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    pattern = r'^memdec:(\w+)_total{memory="(\w+)"} (\S+)$'
    found = {(w, m): float(v) for w, m, v in re.findall(pattern, text, re.MULTILINE)}
    kinds = ("requests", "prompt_tokens", "generation_tokens", "mixed_rows", "mixed_weight")
    return {m: [found.get((k, m), 0) for k in kinds] for m in ("law", "bio", "none")}


def test_metrics_count_by_memory(server, client, models):
    before = counted(server)
    complete(client, models)
    complete(client, models, {"memdec_alpha": 0.2}, max_tokens=3)
    complete(client, models, {"memdec_memory": "bio"}, max_tokens=5)
    complete(client, models, {"memdec_memory": "none"}, max_tokens=2)
    after = counted(server)
    grown = {m: [b - a for a, b in zip(before[m], after[m], strict=True)] for m in before}
    length = len(PROMPT)
    assert grown == {
        "law": [2, 2 * length, 7, 7, pytest.approx(4 * 0.6 + 3 * 0.2)],
        "bio": [1, length, 5, 5, pytest.approx(5 * 0.4)],
        "none": [1, length, 2, 0, 0],
    }


def test_the_log_names_memory_and_weight(server, client, models):
    for number, (xargs, told) in enumerate(
        [
            (None, "memory 'law', alpha 0.6"),
            ({"memdec_memory": "bio"}, "memory 'bio', alpha 0.4"),
            ({"memdec_alpha": 0.25}, "memory 'law', alpha 0.25"),
            ({"memdec_alpha": 0}, "no memory"),
        ]
    ):
        name = f"seen-{number}"
        complete(client, models, xargs, extra_headers={"X-Request-Id": name})
        line = rf"memdec: request cmpl-{name}-\S+ has {re.escape(told)}\."
        assert re.search(line, server.log.read_text()), told
