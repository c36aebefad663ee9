"""A memory as a model of its own: clients that can only send `model` choose by it alone."""

import json
import re
import time

import httpx
import openai
import psutil
import pytest
from support import http_rows, oracle, soak_client, variants
from support.choices import EOS, PLAIN, PROMPT, Choice, greedy, make_models, mixture
from support.served import Served
from transformers import AutoTokenizer
from vllm.entrypoints.openai.models.protocol import BaseModelPath, LoRAModulePath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

KEY, LORA = "secret", "adapted"
BASES = ("tiny", "tiny-too")  # the base's own names: the server's default memory
NAMED = {
    "law": Choice("law"),
    "law-cautious": Choice("law", 0.2),
    "org/bio": Choice("bio"),
    "none": Choice("none"),
}
ALL = dict.fromkeys(BASES, PLAIN) | NAMED
SAID = [{"role": "user", "content": "bagi duto mela"}]
feature = pytest.mark.feature("a memory by the model's name")


def named_block(models):
    """Return settings in which one memory has two names, another one that is not its own."""
    law = {"model": models["law"], "alpha": 0.6, "served_as": {"law": None, "law-cautious": 0.2}}
    bio = {"model": models["bio"], "alpha": 0.4, "served_as": "org/bio"}
    return {"memories": {"law": law, "bio": bio}, "default": "law"}


@pytest.fixture(scope="module")
def models(tiny_model):
    return make_models(tiny_model)


@pytest.fixture(scope="module")
def lora(models, tmp_path_factory):
    """Return the folders of an adapter of the base, and of the base that it makes."""
    folder = tmp_path_factory.mktemp("lora")
    adapter = variants.adapter(models["base"], folder / "adapter")
    return adapter, variants.merged(models["base"], adapter, folder / "merged")


@pytest.fixture(scope="module")
def server(models, lora):
    words = f"--served-model-name {' '.join(BASES)} --enable-lora --lora-modules {LORA}={lora[0]}"
    words += " --dtype float32 --enforce-eager --max-num-seqs 16 --enable-prefix-caching"
    only = f"--api-key {KEY} --enable-scale-out --enable-prompt-tokens-details".split()
    server = Served(models["base"], named_block(models), words.split(), only).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def post(server, path, body, **headers):
    headers |= {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=60)


def counted(server):
    """Return how many requests of each memory have finished."""
    text = httpx.get(f"{server.url}/metrics").text
    return {
        name: float(value)
        for name, value in re.findall(r'^memdec:requests_total{memory="(\w+)"} (\S+)$', text, re.M)
    }


def shown(name):
    """Return what an answer says of its model: vLLM says the first of a base's names."""
    return BASES[0] if name in BASES else name


def test_models_are_listed(client, models):
    """The base first, then each memory, whose parent it is, as an adapter's; by api key as ever."""
    cards = {card.id: card for card in client.models.list()}
    assert [*cards] == [*BASES, *NAMED, LORA]
    assert {name: cards[name].parent for name in NAMED} == dict.fromkeys(NAMED, "tiny")
    roots = {
        name: models[choice.memory or "base"] for name, choice in ALL.items() if name != "none"
    }
    assert {name: cards[name].root for name in ALL} == roots | {"none": models["base"]}
    assert {cards[name].max_model_len for name in ALL} == {cards["tiny"].max_model_len}
    assert [cards[name].memdec["memory"] for name in NAMED] == ["law", "law", "bio", "none"]
    assert [cards[name].memdec.get("alpha") for name in NAMED] == [0.6, 0.2, 0.4, None]
    assert cards["tiny"].memdec["default"] == "law"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0).models.list()


@feature
@pytest.mark.parametrize("name", ALL)
def test_completions(name, client, models):
    """Whole, in a stream, and several: log-probabilities and tokens are that memory's."""
    choice, wanted = ALL[name], greedy(models, ALL[name], PROMPT, 8)
    answer = http_rows.complete(client, models, model=name, echo=True)
    said = answer.choices[0].logprobs
    ids = http_rows.token_ids(said.tokens)
    key_TV = mixture(models, choice, ids)
    for position in range(1, len(ids)):
        row = key_TV[position - 1, ids[position]].item()
        assert said.token_logprobs[position] == pytest.approx(row, abs=oracle.TOLERANCE)
    assert answer.model == shown(name)
    body = {"return_token_ids": True, "ignore_eos": True, "top_k": 1}
    asked = {"model": name, "prompt": PROMPT, "max_tokens": 8, "extra_body": body}
    several = client.completions.create(**asked, temperature=1, n=2)
    assert [each.token_ids for each in several.choices] == [wanted] * 2
    chunks = [*client.completions.create(**asked, temperature=0, stream=True)]
    assert {chunk.model for chunk in chunks} == {shown(name)}
    assert [i for c in chunks for each in c.choices for i in each.token_ids or ()] == wanted


@feature
@pytest.mark.parametrize("name", ALL)
def test_chat_and_what_speaks_like_it(name, server, client, models):
    """Chat, its batches, responses, messages: one text, of one memory; and /tokenize."""
    tokenized = post(server, "/tokenize", {"model": name, "messages": SAID}).json()["tokens"]
    wanted = greedy(models, ALL[name], tokenized, 6)
    body = {"return_token_ids": True, "ignore_eos": True}
    asked = {"model": name, "messages": SAID, "max_tokens": 6, "temperature": 0}
    answer = client.chat.completions.create(**asked, extra_body=body)
    assert answer.prompt_token_ids == tokenized and answer.model == shown(name)
    assert answer.choices[0].token_ids == wanted
    text = answer.choices[0].message.content
    stream = [*client.chat.completions.create(**asked, extra_body=body, stream=True)]
    assert {chunk.model for chunk in stream} == {shown(name)}
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == text
    del asked["max_tokens"]
    before = counted(server)
    responses = asked | {"max_output_tokens": 6, "input": SAID, "ignore_eos": True}
    del responses["messages"]
    found = post(server, "/v1/responses", responses).json()
    assert found["output"][0]["content"][0]["text"] == text and found["model"] == shown(name)
    events = post(server, "/v1/responses", responses | {"stream": True}).text
    parts = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    assert "".join(p["delta"] for p in parts if p["type"].endswith("text.delta")) == text
    batch = asked | {"messages": [SAID, SAID], "max_tokens": 6, "ignore_eos": True}
    found = post(server, "/v1/chat/completions/batch", batch).json()
    assert [each["message"]["content"] for each in found["choices"]] == [text] * 2
    assert found["model"] == shown(name)
    found = post(server, "/v1/messages", asked | {"max_tokens": 6}).json()
    assert text.startswith(found["content"][0]["text"]) and found["model"] == shown(name)
    grown = {memory: count - before[memory] for memory, count in counted(server).items()}
    memory = ALL[name].memory or "law"
    assert grown == {"law": 0, "bio": 0, "none": 0} | {memory: 5}


@feature
@pytest.mark.parametrize("name", ALL)
def test_tokens_in_tokens_out(name, server, models):
    """A rendered request keeps the memory, and one of tokens chooses by model, too."""
    asked = {"model": name, "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    wanted = greedy(models, ALL[name], PROMPT, 6)
    [rendered] = post(server, "/v1/completions/render", asked).json()
    assert (
        post(server, "/inference/v1/generate", rendered).json()["choices"][0]["token_ids"] == wanted
    )
    params = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
    body = {"model": name, "token_ids": PROMPT, "sampling_params": params}
    assert post(server, "/inference/v1/generate", body).json()["choices"][0]["token_ids"] == wanted
    by_header = {"X-Amzn-SageMaker-Adapter-Identifier": name}
    for body in (asked, asked | {"model": None}):
        found = post(server, "/invocations", body | {"return_token_ids": True}, **by_header).json()
        assert found["choices"][0]["token_ids"] == wanted and found["model"] == shown(name)
    answer = post(server, "/invocations", asked)  # whose body's model vLLM drops
    assert answer.status_code == (400 if name in NAMED else 200)


def test_detokenize(server, models):
    text = AutoTokenizer.from_pretrained(models["base"]).decode(PROMPT)
    for name in ALL:
        answer = post(server, "/detokenize", {"model": name, "tokens": PROMPT})
        assert answer.json()["prompt"] == text, name


@feature
def test_arguments_refine_a_name(client, models):
    """A weight of the request's own goes before an alias's; the same memory may be named twice."""
    for name, xargs, choice in (
        ("law-cautious", {"memdec_alpha": 1.0}, Choice("law", 1.0)),
        ("law", {"memdec_memory": "law", "memdec_alpha": 0.3}, Choice("law", 0.3)),
        ("org/bio", {"memdec_alpha": 0}, Choice("none")),
        ("tiny", {"memdec_memory": "bio"}, Choice("bio")),
        ("none", {"memdec_memory": "none"}, Choice("none")),
    ):
        [found] = http_rows.complete(client, models, xargs, model=name).choices
        tokens = http_rows.token_ids(found.logprobs.tokens)
        assert tokens == greedy(models, choice, PROMPT, 4), (name, xargs)
        key_TV = mixture(models, choice, [*PROMPT, *tokens])
        rows = [key_TV[len(PROMPT) - 1 + n, token].item() for n, token in enumerate(tokens)]
        assert found.logprobs.token_logprobs == pytest.approx(rows, abs=oracle.TOLERANCE)


def test_two_memories_are_400(server, models):
    """One named by the model, another by the arguments, wherever either is read."""
    said = {"model": "law", "messages": SAID, "max_tokens": 4}
    other = {"memdec_memory": "bio"}
    params = {"sampling_params": {"max_tokens": 4, "extra_args": other}}
    bodies = {
        "/v1/completions": {"model": "law", "prompt": PROMPT},
        "/v1/chat/completions": said,
        "/v1/chat/completions/batch": said | {"messages": [SAID]},
        "/v1/responses": {"model": "law", "input": "bagi"},
        "/v1/messages": said,
        "/inference/v1/generate": {"model": "law", "token_ids": PROMPT} | params,
    }
    for path, body in bodies.items():
        xargs = {} if "sampling_params" in body else {"vllm_xargs": other}
        answer = post(server, path, body | xargs)
        assert answer.status_code == 400, (path, answer.text)
        assert "The model 'law' is the memory 'law', but memdec_memory is 'bio'" in answer.text
    batch = said | {"messages": [SAID], "vllm_xargs": [1]}
    answer = post(server, "/v1/chat/completions/batch", batch)
    assert answer.status_code == 400 and "vllm_xargs must be an object" in answer.text
    for xargs in ({"memdec_memory": "law"}, {"memdec_memory": "none", "memdec_alpha": 0.5}):
        body = {"model": "org/bio", "prompt": PROMPT, "vllm_xargs": xargs}
        assert post(server, "/v1/completions", body).status_code == 400
    body = {"model": "law", "prompt": PROMPT, "vllm_xargs": {"memdec_alpha": 2}}
    assert "must be a number between 0 and 1" in post(server, "/v1/completions", body).text


def test_where_no_request_chooses(server, client, models):
    """Beams and scores have the server's memory: its name is answered, another is HTTP 400."""
    beams = {"use_beam_search": True, "n": 2, "max_tokens": 4, "prompt": PROMPT, "temperature": 0}
    scores = {"query": PROMPT, "items": [[5, 6], [7]], "label_token_ids": [1, 2]}
    for path, body, sentence in (
        ("/v1/completions", beams, "Beam search has the server's memory and weight"),
        ("/generative_scoring", scores, "this endpoint has the server's own"),
    ):
        for name in (*BASES, "law"):
            answer = post(server, path, body | {"model": name})
            assert answer.status_code == 200, (path, name, answer.text)
            assert answer.json()["model"] == shown(name)
        for name in ("law-cautious", "org/bio", "none"):
            # A field that only other requests' classes have changes nothing.
            answer = post(server, path, body | {"model": name, "to_chat_completion_request": 1})
            assert answer.status_code == 400 and sentence in answer.text, (path, name, answer.text)


def test_an_unknown_model_is_404(server):
    for path, body in (
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": SAID}),
        ("/tokenize", {"prompt": "bagi"}),
    ):
        for name in ("bio", "LAW", "memory"):
            answer = post(server, path, body | {"model": name})
            assert answer.status_code == 404, (path, name)
            assert f"The model `{name}` does not exist." in answer.text and "org/bio" in answer.text


def test_an_adapter_has_the_memory_of_its_arguments(client, models, lora):
    """As before: its name is that of an adapted base, with the server's memory or the named one."""
    merged = models | {"base": lora[1]}
    for xargs, choice in ((None, PLAIN), ({"memdec_memory": "bio"}, Choice("bio"))):
        answer = http_rows.complete(client, models, xargs, model=LORA)
        assert answer.model == LORA
        tokens = http_rows.token_ids(answer.choices[0].logprobs.tokens)
        assert tokens == greedy(merged, choice, PROMPT, 4)


def test_an_adapter_cannot_have_a_memory_s_name(server, models, lora):
    """At the start by our sentence, which comes before the engine is asked; later by vLLM's."""

    async def start(**options):
        return OpenAIServingModels(server.engine, [BaseModelPath("b", models["base"])], **options)

    for name in NAMED:
        given = [LoRAModulePath(LORA, lora[0]), LoRAModulePath(name, lora[0])]
        with pytest.raises(ValueError, match=f"'{name}' would be both a LoRA adapter and the "):
            server.do(start(lora_modules=given))
        asked = LoadLoRAAdapterRequest(lora_name=name, lora_path=lora[0])
        refused = server.do(server.do(start()).load_lora_adapter(asked))
        assert refused.error.code == 400 and "conflicts with a served base model" in str(refused)


def test_prefixes_are_shared_by_memory_not_by_name(server, client, models):
    """A memory's own name, an alias and the arguments hit each other's blocks, and no others."""
    [prompt] = oracle.prompts(1, 200, 200, 990, seed=9)
    body = {"prompt": prompt, "max_tokens": 1}

    def cached(name, **xargs):
        answer = post(server, "/v1/completions", body | {"model": name, "vllm_xargs": xargs}).json()
        return (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0)

    assert cached("law") == 0 and cached("org/bio") == 0 and cached("none") == 0
    assert cached("law-cautious") == cached("tiny") > 0
    assert cached("tiny", memdec_memory="bio") == cached("tiny", memdec_memory="none") > 0


@feature
def test_run_batch(server, models, tmp_path):
    asked, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = {name: {"model": name} for name in ALL}
    wrong = {"model": "law", "vllm_xargs": {"memdec_memory": "bio"}}
    http_rows.write_batch(asked, models, [], **bodies, two=wrong, unknown={"model": "nowhere"})
    server.batch(asked, answers)
    found = http_rows.read_batch(answers)
    for name, choice in ALL.items():
        http_rows.check_line(found[name], models, choice)
        assert found[name]["response"]["body"]["model"] == shown(name)
    assert "but memdec_memory is 'bio'" in found["two"]["error"]["error"]["message"]
    assert found["unknown"]["response"]["status_code"] == 404


@feature
def test_clients_that_can_only_send_a_model(server, client, models, monkeypatch):
    """The openai package, LiteLLM and LangChain, whole and in a stream: base and memories."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import asks the network
    absent = "not installed here: pip install '.[test]'"
    litellm = pytest.importorskip("litellm", reason=f"litellm is {absent}")
    langchain = pytest.importorskip("langchain_openai", reason=f"langchain-openai is {absent}")
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    prompt = post(server, "/tokenize", {"model": "tiny", "messages": SAID}).json()["tokens"]
    url, asked = f"{server.url}/v1", {"messages": SAID, "temperature": 0, "max_tokens": 6}

    def by_openai(name):
        answer = client.chat.completions.create(model=name, **asked)
        stream = client.chat.completions.create(model=name, **asked, stream=True)
        parts = [chunk.choices[0].delta.content or "" for chunk in stream]
        return answer.model, answer.choices[0].message.content, "".join(parts)

    def by_litellm(name):
        own = {"model": f"hosted_vllm/{name}", "api_base": url, "api_key": KEY}
        answer = litellm.completion(**own, **asked)
        parts = [
            chunk.choices[0].delta.content or ""
            for chunk in litellm.completion(**own, **asked, stream=True)
        ]
        return (
            answer.model.removeprefix("hosted_vllm/"),
            answer.choices[0].message.content,
            "".join(parts),
        )

    def by_langchain(name):
        chat = langchain.ChatOpenAI(
            model=name, base_url=url, api_key=KEY, temperature=0, max_completion_tokens=6
        )
        answer = chat.invoke("bagi duto mela")
        parts = [chunk.text for chunk in chat.stream("bagi duto mela")]
        return answer.response_metadata["model_name"], answer.text, "".join(parts)

    texts = set()
    for name, choice in ALL.items():
        tokens = greedy(models, choice, prompt, 6)
        tokens = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
        text = tokenizer.decode(tokens)
        texts.add(text)
        for send in (by_openai, by_litellm, by_langchain):
            assert send(name) == (shown(name), text, text), (send.__name__, name)
    assert len(texts) >= 3, "the memories would not be seen"


def test_two_api_servers(models, forked, tmp_path):
    """Each of them knows the names; the answers are one engine's."""
    options = ["--api-server-count", "2", "--max-model-len", "256"]
    log = tmp_path / "log"
    server = soak_client.Server(models, forked, log, block=named_block(models), options=options)
    try:
        server.wait()
        while log.read_text().count("Application startup complete") < 2:
            assert server.process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        names = {models["base"]: PLAIN} | NAMED
        wanted = {name: greedy(models, choice, PROMPT, 4) for name, choice in names.items()}
        port, clients, connected = int(server.url.rpartition(":")[2]), [], set()
        while len(connected) < 2:  # the system chooses which of them accepts a connection
            assert len(clients) < 100
            clients.append(client := openai.OpenAI(base_url=f"{server.url}/v1", api_key="none"))
            assert [card.id for card in client.models.list()] == [*names]
            found = {
                process.pid
                for process in server.tree()
                for each in process.net_connections("tcp")
                if each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port
            }
            if found == connected:
                continue
            connected = found
            for name in names:
                answer = http_rows.complete(client, models, model=name)
                tokens = http_rows.token_ids(answer.choices[0].logprobs.tokens)
                assert tokens == wanted[name] and answer.model == name
    finally:
        server.stop()
