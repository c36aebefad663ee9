"""Several memories in one request over HTTP: weights as an object and as a string, and "auto"."""

import re
import time
from collections import Counter

import httpx
import openai
import pytest
from support import http_rows, oracle, several
from support.choices import PROMPT
from support.served import Served

AUTO, SAID = several.AUTO, [{"role": "user", "content": "bagi duto mela"}]
WEIGHTS = {"plain": 0.5, "law": 0.3}


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    return several.make(tiny_model, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(models):
    """A server whose default is all gates; two memories with gates and two without."""
    words = "--served-model-name tiny --dtype float32 --enforce-eager --max-num-seqs 16"
    server = Served(models["base"], several.block(models, default=AUTO), words.split()).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(server, path, body):
    return httpx.post(server.url + path, json=body, timeout=60)


def greedy(models, asked, prompt, steps):
    sampled = []
    for _ in range(steps):
        row_V = several.mixture(models, asked, [*prompt, *sampled])[-1]
        sampled.append(int(row_V.argmax()))
    return sampled


@pytest.mark.feature("several memories in one request")
def test_every_way_to_ask(client, models):
    """By weights, by the argument, by the model's name, by default: log-probabilities."""
    text = "plain:0.5,law:0.3"
    for name, given, asked in (
        ("tiny", {"memdec_memory": WEIGHTS}, WEIGHTS),
        ("tiny", {"memdec_memory": text}, WEIGHTS),
        ("tiny", {"memdec_memory": AUTO}, AUTO),
        (AUTO, None, AUTO),
        ("tiny", None, AUTO),
        (AUTO, {"memdec_alpha": 0}, "none"),
        ("tiny", {"memdec_memory": "law"}, "law"),
        ("plain", None, "plain"),
    ):
        answer = http_rows.complete(client, models, given, model=name)
        assert answer.model == name
        [found] = answer.choices
        tokens = http_rows.token_ids(found.logprobs.tokens)
        assert tokens == greedy(models, asked, PROMPT, 4), (name, given)
        key_TV = several.mixture(models, asked, [*PROMPT, *tokens])
        rows = [key_TV[len(PROMPT) - 1 + n, token].item() for n, token in enumerate(tokens)]
        assert found.logprobs.token_logprobs == pytest.approx(rows, abs=oracle.TOLERANCE)


def test_other_endpoints(server, models):
    """An object of weights, wherever vllm_xargs are read, and in extra_args."""
    chat = {"model": "tiny", "messages": SAID, "max_tokens": 6, "temperature": 0}
    prompt = post(server, "/tokenize", {"model": "tiny", "messages": SAID}).json()["tokens"]
    wanted = greedy(models, WEIGHTS, prompt, 6)
    xargs = {"vllm_xargs": {"memdec_memory": WEIGHTS}, "ignore_eos": True}
    body = chat | xargs | {"return_token_ids": True}
    [found] = post(server, "/v1/chat/completions", body).json()["choices"]
    assert found["token_ids"] == wanted
    text = found["message"]["content"]
    many = post(server, "/v1/chat/completions/batch", chat | xargs | {"messages": [SAID]}).json()
    assert many["choices"][0]["message"]["content"] == text
    asked = {"model": "tiny", "input": SAID, "max_output_tokens": 6, "temperature": 0}
    response = post(server, "/v1/responses", asked | xargs).json()
    assert response["output"][0]["content"][0]["text"] == text


def requests_of(server):
    """Return how many finished requests each memory has."""
    page = httpx.get(f"{server.url}/metrics").text
    found = re.findall(r'memdec:requests_total{memory="(.*)"} (.*)', page)
    return Counter({name: float(number) for name, number in found})


def test_each_memory_of_a_request_counts_it(server, client, models):
    before = requests_of(server)
    http_rows.complete(client, models, {"memdec_memory": WEIGHTS}, model="tiny")
    http_rows.complete(client, models, {"memdec_memory": "none"}, model="tiny")
    wanted, end = before + Counter(plain=1, law=1, none=1), time.monotonic() + 10
    while (now := requests_of(server)) != wanted and time.monotonic() < end:
        time.sleep(0.1)  # what an answer has finished is counted after it
    assert now == wanted


BAD = {
    "more than 1": {"memdec_memory": {"law": 0.9, "bio": 0.2}},
    "none of this server's memories": {"memdec_memory": "law:0.5,wine:0.1"},
    "names no memory": {"memdec_memory": {}},
    "at most 3": {"memdec_memory": {"law": 0.1, "bio": 0.1, "plain": 0.1, "short": 0.1}},
    "must be a number between 0 and 1": {"memdec_memory": {"law": True}},
    "has weights of its own": {"memdec_memory": WEIGHTS, "memdec_alpha": 0.3},
    "'auto' is several": {"memdec_memory": AUTO, "memdec_alpha": 0.3},
}


@pytest.mark.parametrize("sentence", BAD)
def test_what_is_refused_is_400(sentence, server):
    for path, body in (
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": SAID}),
    ):
        answer = post(server, path, body | {"model": "tiny", "vllm_xargs": BAD[sentence]})
        assert answer.status_code == 400 and sentence in answer.text, answer.text
    beams = {"use_beam_search": True, "n": 2, "prompt": PROMPT, "model": "tiny", "max_tokens": 2}
    answer = post(server, "/v1/completions", beams | {"vllm_xargs": {"memdec_memory": WEIGHTS}})
    assert answer.status_code == 400 and "Beam search has the server's memory" in answer.text
    named = {"model": AUTO, "prompt": PROMPT, "vllm_xargs": {"memdec_memory": WEIGHTS}}
    answer = post(server, "/v1/completions", named)
    assert answer.status_code == 400 and "is all memories with gates together" in answer.text


def test_what_is_told(server):
    """The model "auto" and what it is of, and how many memories a request may mix."""
    cards = {card["id"]: card for card in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert [*cards] == ["tiny", "law", "bio", "plain", "short", "none", AUTO]
    assert cards["tiny"]["memdec"]["at_once"] == 3
    assert cards["tiny"]["memdec"]["default"] == AUTO
    told = cards[AUTO]["memdec"]
    assert told["memory"] == AUTO and [*told["memories"]] == ["law", "bio"]
    assert cards[AUTO]["parent"] == "tiny"


def test_run_batch(server, models, tmp_path):
    """By the string; an object stops the file, as whatever vLLM's own classes do not take."""
    asked, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    extras = [{"memdec_memory": "plain:0.5,law:0.3"}, {"memdec_memory": "law:0.9,bio:0.2"}]
    http_rows.write_batch(asked, models | {"base": "tiny"}, extras)
    server.batch(asked, answers)
    found = http_rows.read_batch(answers)
    answer = found["0"]["response"]["body"]
    wanted = greedy(models, WEIGHTS, answer["prompt_token_ids"], 6)
    assert answer["choices"][0]["token_ids"] == wanted
    assert "more than 1" in found["1"]["error"]["error"]["message"]
