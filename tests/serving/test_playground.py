"""`memdec playground`: a real server, the real command, and a person's browser on its page."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient
from support import browser, oracle
from support.gate_oracle import gate_weights, random_gate
from support.served import Served
from transformers import AutoTokenizer
from typer.testing import CliRunner

from vllm_memdec.errors import MemdecError
from vllm_memdec.gate import write_gate
from vllm_memdec.train.playground import command, vllm_server
from vllm_memdec.train.playground.vllm_server import VllmServer, token_texts
from vllm_memdec.train.playground.web import application, page
from vllm_memdec.train.progress import Progress

KEY = "secret"
PROMPT = "bagi duto mela 🙂 <b>"
STEPS = [[0, 0.9], [16, 0.2], [20, 0.7]]
SHORT = 20  # positions of a memory, some of which the prompt takes, and the answer the rest
DERIVED = 0.05  # of a gate's weight, which is told from float32 probabilities that lie close


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    """Return the folders of a base and its memories, of which one has a gate."""
    even = {"spread": 0.15}  # of the weights: log-probabilities are as near as oracle.py says
    made = {"base": tiny_model("llama", **even)}
    made |= {"law": tiny_model("llama", seed=1, hidden=96, **even)}
    made["short"] = tiny_model("llama", seed=3, positions=SHORT, **even)
    made["gated"] = str(tmp_path_factory.mktemp("gated") / "gated")
    shutil.copytree(tiny_model("llama", seed=2, **even), made["gated"])
    write_gate(Path(made["gated"]), random_gate(64, 2, context=False))
    return made


@pytest.fixture(scope="module")
def server(models):
    law = {"model": models["law"], "alpha": 0.6, "served_as": {"law": None, "law-cautious": 0.2}}
    steps = {"model": models["law"], "alpha_by_context": STEPS}
    memories = {"law": law, "gated": {"model": models["gated"]}, "steps": steps}
    memories["short"] = {"model": models["short"], "alpha": 0.5}
    words = "--served-model-name tiny --dtype float32 --enforce-eager --enable-prefix-caching"
    block = {"memories": memories, "default": "law"}
    server = Served(models["base"], block, words.split(), ["--api-key", KEY]).start()
    yield server
    server.stop()


def start(server, *words):
    """Return the command's process, and where its page is."""
    command = [sys.executable, "-m", "vllm_memdec.train.cli", "playground", "--port", "0"]
    environment = os.environ | {"VLLM_API_KEY": KEY, "COLUMNS": "200"}
    process = subprocess.Popen(
        [*command, "--server", server.url, "--no-browser", *words],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found, line + process.stdout.read()
    return process, found[0]


@pytest.fixture(scope="module")
def url(server):
    process, url = start(server)
    yield url
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0] == "" and process.returncode == 0


def ask(url, memory="law", alpha=None, writes="mixture", prompt=PROMPT, tokens=12):
    """Return the text and the numbers of each token, and how the answer ends."""
    body = {"prompt": prompt, "writes": writes, "memory": memory, "alpha": alpha}
    texts, told, end = [], {}, {}
    with httpx.stream("POST", f"{url}/answer", json=body | {"tokens": tokens}) as response:
        for event in map(json.loads, response.iter_lines()):
            if "text" in event:
                assert event["at"] == len(texts)
                texts.append(event["text"])
            elif "at" in event:
                told[event["at"]] = event
            else:
                end |= event
    return texts, [told[n] for n in sorted(told)], end


@pytest.mark.parametrize(
    ("memory", "alpha", "weight"),
    [
        ("law", None, [(0, 0.6)]),
        ("law-cautious", None, [(0, 0.2)]),
        ("law", 1, [(0, 1.0)]),
        ("law", 0, [(0, 0.0)]),
        ("steps", None, STEPS),
        ("steps", 0.5, [(0, 0.5)]),
        ("gated", None, 1.0),
        ("gated", 0.3, 0.3),
        ("short", None, [(0, 0.5)]),
    ],
)
@pytest.mark.parametrize("writes", ["base", "mixture"])
def test_probabilities_are_the_models_own(url, models, memory, alpha, weight, writes):
    """Each token's three, by float64 models; and who decided, by `memdec explain`'s rule."""
    texts, told, end = ask(url, memory, alpha, writes)
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    prompt, folder = tokenizer(PROMPT)["input_ids"], models.get(memory, models["law"])
    ids, by_name = list(prompt), models | {memory: folder}
    for n, token in enumerate(told):
        base_V = oracle.log_probs(models["base"], ids)[-1].exp()
        memory_V = oracle.log_probs(folder, ids)[-1].exp()
        alphas_T = gate_weights(by_name, memory, weight, ids).flatten()
        if memory == "short" and len(ids) > SHORT:  # the base alone goes on
            memory_V, alphas_T = 0 * memory_V, 0 * alphas_T
        mixture_V = alphas_T[-1] * memory_V + (1 - alphas_T[-1]) * base_V
        rows = {"base": base_V, "memory": memory_V, "mixture": mixture_V}
        ids.append(int(rows[writes].argmax()))
        for name, row_V in rows.items():
            wanted = row_V[ids[-1]].item()
            assert token[name] == pytest.approx(wanted, rel=2 * oracle.TOLERANCE, abs=1e-7), name
            says = tokenizer.decode([int(row_V.argmax())]) if row_V.any() else ""
            assert token["says"][name] == says.replace("\ufffd", "")  # part of a character: none
        wanted = 0.0 if writes == "base" else alphas_T[-1].item()
        if token["alpha"] is None:  # base and memory give it the same
            assert memory == "gated" and token["base"] == pytest.approx(token["memory"], rel=0.02)
            continue
        assert token["alpha"] == pytest.approx(wanted, abs=DERIVED if memory == "gated" else 1e-6)
        parts = wanted * token["memory"], (1 - wanted) * token["base"]
        if abs(parts[0] - parts[1]) > DERIVED * sum(parts):
            assert token["decided"] == ("memory" if parts[0] > parts[1] else "base")
        assert n == len(ids) - len(prompt) - 1
    assert len(texts) == len(told) == 12 and end == {"done": "length"}
    assert memory != "short" or len(prompt) < SHORT < len(ids) - 1
    written = tokenizer.decode(ids[len(prompt) :])
    assert "".join(texts).rstrip("\ufffd") == written.rstrip("\ufffd")


def test_an_answer_may_end_where_the_context_does(url, models):
    """The last token has no room for its probabilities: it stands there without."""
    words = " ".join(["bagi duto"] * 200)
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    prompt = tokenizer.decode(tokenizer(words)["input_ids"][:250])
    known = len(tokenizer(prompt)["input_ids"])
    texts, told, end = ask(url, prompt=prompt, tokens=20)
    assert (len(texts), len(told)) == (256 - known, 255 - known) and end == {"done": "length"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": ""}, "The prompt is empty"),
        ({"alpha": 1.5}, "The weight must be a number between 0 and 1, got 1.5."),
        ({"alpha": "auto"}, "The weight must be a number between 0 and 1, got 'auto'."),
        ({"tokens": 256}, "Tokens must be a number from 1 to 255, got 256."),
        ({"tokens": None}, "Tokens must be a number from 1 to 255"),
        ({"memory": "tax"}, "The server has no memory 'tax' any more: load the page again."),
        ({"writes": "law"}, "'writes' must be 'base' or 'mixture'"),
        ({"prompt": "bagi " * 300}, "maximum context length"),  # the server's own sentence
    ],
)
def test_a_question_that_cannot_be_answered(url, change, says):
    asked = {"prompt": PROMPT, "writes": "mixture", "memory": "law", "alpha": None, "tokens": 4}
    response = httpx.post(f"{url}/answer", json=asked | change)
    [line] = response.text.splitlines()
    assert says in json.loads(line)["error"], line


def test_other_sites_cannot_ask(url):
    """A page of another site neither by a form, nor under a name of its own for this address."""
    form = httpx.post(f"{url}/answer", content="{}", headers={"Content-Type": "text/plain"})
    named = httpx.get(f"{url}/models", headers={"Host": "evil.example"})
    assert (form.status_code, named.status_code) == (400, 400)


def test_the_page_has_nothing_to_fetch_and_no_key(url):
    text = httpx.get(url).text
    assert text == page() and "<!--" not in text.replace("<!doctype", "")
    assert not re.search(r"https?://|//cdn|\bsrc=|@import|url\(", text)
    told = httpx.get(f"{url}/models").text
    assert KEY not in text + told and "law-cautious" in told


def test_ctrl_c_ends_it_quietly_in_mid_answer(server):
    process, url = start(server)
    body = {"prompt": PROMPT, "writes": "mixture", "memory": "law", "alpha": None, "tokens": 200}
    with httpx.stream("POST", f"{url}/answer", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(httpx.TransportError):
            list(lines)
    assert process.communicate(timeout=30)[0] == "" and process.returncode == 0


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@contextlib.contextmanager
def answering(listed, completion=b"", missing=0):
    """Yield a server's address; what it answers to GET, and to POST, of which it owes bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(listed, len(listed))

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(completion, len(completion) + missing)

        def answer(self, body, length):
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


LAW = {"memory": "law", "positions": 256, "alpha": 0.5, "gate": False}
CARDS = [{"id": "tiny", "max_model_len": 256, "memdec": {"memories": ["law"]}}]
LISTED = json.dumps({"data": [*CARDS, {"id": "law", "memdec": LAW}]}).encode()


def streamed(text, logprob=-1.0):
    """Return what vLLM streams of one token."""
    logprobs = {"tokens": [text], "token_logprobs": [logprob]}
    choice = {"text": text, "token_ids": [7], "logprobs": logprobs, "prompt_token_ids": [5]}
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


def scored(logprob):
    """Return what vLLM answers to a prompt of two tokens."""
    row = {"7": {"logprob": logprob, "rank": 1, "decoded_token": "a"}}
    return json.dumps({"choices": [{"prompt_logprobs": [None, row]}]}).encode()


DONE = b"data: [DONE]\n\n"


async def tokens_of(url):
    chunks = [chunk async for chunk in VllmServer(url).stream({}, "a", 4)]
    return [token.text for chunk in chunks for token in chunk.tokens]


async def probabilities_of(url):
    return [likely.probability for likely in await VllmServer(url).probabilities({}, [5, 7], 1)]


def memdec(*words):
    """Return what the command says that does not start."""
    from vllm_memdec.train.cli import app

    environment = {"COLUMNS": "200", "VLLM_API_KEY": None}
    done = CliRunner().invoke(app, ["playground", "--no-browser", *words], env=environment)
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
    [line] = done.stderr.splitlines()
    return line


def test_what_it_cannot_start_with_is_one_sentence(server):
    for address in ("localhost:8000", "ftp://user:secret@localhost"):
        sentence = memdec("--server", address)
        assert "--server must be an address such as http://" in sentence and KEY not in sentence
    nobody = f"http://127.0.0.1:{free_port()}"
    sentence = memdec("--server", nobody)
    assert f"No server answers at {nobody}: start it with `vllm serve BASE" in sentence
    assert "give --api-key, or set VLLM_API_KEY" in memdec("--server", server.url)
    assert "refuses the key: check" in memdec("--server", server.url, "--api-key", "wrong")
    with answering(b"<html>") as url:
        assert "is no vLLM server: check --server." in memdec("--server", url)
    # What vLLM lists of a server without a memory.
    with answering(b'{"data": [{"id": "tiny", "root": "tiny", "max_model_len": 256}]}') as url:
        assert "runs without a memory: start it with `vllm serve" in memdec("--server", url)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = "--server", f"{server.url}/v1/", "--api-key", KEY, "--port"
        assert "is taken: give another --port" in memdec(*words, str(taken.getsockname()[1]))


def test_a_server_that_has_ended_is_a_sentence_on_the_page():
    nobody = f"http://127.0.0.1:{free_port()}"
    with TestClient(application(VllmServer(nobody), "0.0.0.0")) as client:
        response = client.get("/models")
        assert response.status_code == 502
        assert f"No server answers at {nobody}" in response.json()["error"]


def test_a_token_may_have_any_line_end_but_json_s():
    text = "a\u2028b\u2029c\x85d\r\n"
    with answering(LISTED, streamed(text) + streamed("e") + DONE) as url:
        assert asyncio.run(tokens_of(url)) == [text, "e"]


@pytest.mark.parametrize(
    ("asked", "completion", "missing", "says"),
    [
        (tokens_of, streamed("a")[:-20] + b"\n\n" + DONE, 0, "sent an answer that cannot be read"),
        (tokens_of, b"data: {}\n\n" + DONE, 0, "sent an answer that cannot be read"),
        (tokens_of, streamed("a"), 9, "ended in mid-answer"),
        (tokens_of, streamed("a"), 0, "ended in mid-answer"),
        (tokens_of, streamed("a", 2.0) + DONE, 0, "start it with --logprobs-mode raw_logprobs"),
        (probabilities_of, b"<html>", 0, "sent an answer that cannot be read"),
        (probabilities_of, b"{}", 0, "sent an answer that cannot be read"),
        (probabilities_of, scored(-1.0), 9, "ended in mid-answer"),
        (probabilities_of, scored(2.0), 0, "start it with --logprobs-mode raw_logprobs"),
        (probabilities_of, scored(1000.0), 0, "start it with --logprobs-mode raw_logprobs"),
    ],
)
def test_an_answer_that_is_none_is_one_sentence(asked, completion, missing, says):
    with answering(LISTED, completion, missing) as url, pytest.raises(MemdecError, match=says):
        asyncio.run(asked(url))
    with answering(LISTED, scored(5e-4)) as url:  # what rounding may do
        assert asyncio.run(probabilities_of(url)) == pytest.approx([1.0], abs=1e-3)


def test_a_server_that_is_silent_does_not_hold_the_command(monkeypatch):
    monkeypatch.setattr(vllm_server, "LISTS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert f"The server at {url} is silent" in memdec("--server", url)


def test_this_machine_has_no_proxy_and_a_password_is_not_shown(monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    with answering(LISTED) as url:
        server = VllmServer(url.replace("//", f"//user:{KEY}@") + f"/v1/?key={KEY}")
        assert asyncio.run(server.models()).memories[0].name == "law" and server.url == url
    with pytest.raises(MemdecError) as raised:
        asyncio.run(server.models())
    assert f"No server answers at {url}:" in str(raised.value)


@pytest.mark.parametrize(
    ("host", "name", "status"),
    [
        ("192.0.2.7", "192.0.2.7:8010", 200),
        ("192.0.2.7", "localhost", 200),
        ("192.0.2.7", "evil.example", 400),
        ("::1", "[::1]:8010", 200),
        ("::1", "evil.example", 400),
        ("0.0.0.0", "my-machine", 200),
    ],
)
def test_the_page_has_the_names_of_its_host_alone(host, name, status):
    with TestClient(application(VllmServer("http://localhost"), host)) as client:
        assert client.get("/", headers={"Host": name}).status_code == status


def test_a_defect_and_half_a_character_are_sentences_on_the_page(monkeypatch, caplog):
    asked = {"prompt": "a", "writes": "mixture", "memory": "law", "alpha": None, "tokens": 4}
    with answering(LISTED, b"data: {}\n\n") as url:
        app = application(VllmServer(url), "127.0.0.1")
        with TestClient(app, base_url="http://localhost") as client:
            broken = json.dumps(asked | {"prompt": "a \ud83d"})
            headers = {"Content-Type": "application/json"}
            response = client.post("/answer", content=broken, headers=headers)
            assert response.status_code == 400 and "half a character" in response.json()["error"]
            response = client.post("/answer", json=asked)
            assert "cannot be read" in response.json()["error"]
            monkeypatch.setattr(VllmServer, "stream", lambda *words: [][0])
            response = client.post("/answer", json=asked)
            assert response.json()["error"].startswith("A defect of memdec ended this answer")
    assert "IndexError" in caplog.text


def test_a_browser_may_wait_for_the_page(monkeypatch):
    opened, ended = [], asyncio.Event()

    async def main(url):
        loop = asyncio.get_running_loop()

        def browse(page):
            with contextlib.suppress(httpx.TransportError):
                opened.append(httpx.get(page, timeout=5).status_code)
            loop.call_soon_threadsafe(ended.set)

        monkeypatch.setattr(command.webbrowser, "open", browse)
        monkeypatch.setattr(command, "has_display", lambda: True)
        serving = asyncio.create_task(
            command.serve(url, None, "127.0.0.1", 0, browser=True, progress=Progress())
        )
        await asyncio.wait(
            [serving, asyncio.create_task(ended.wait())], return_when="FIRST_COMPLETED"
        )
        serving.cancel()
        await asyncio.wait([serving])

    with answering(LISTED) as url:
        asyncio.run(main(url))
    assert opened == [200]


@pytest.mark.parametrize(
    ("text", "tokens", "wanted"),
    [
        (" the cat", ["the", "cat"], [" the", " cat"]),  # as SentencePiece decodes them
        ("ab", ["a", "b"], ["a", "b"]),
        ("🙂!", ["", "", "🙂", "!"], ["", "", "🙂", "!"]),
        ("xyz", ["other", "z"], ["", "xyz"]),
        ("", ["</s>"], [""]),
        ("", [], []),
    ],
)
def test_a_part_of_several_tokens_keeps_its_text(text, tokens, wanted):
    assert token_texts(text, tokens) == wanted


@pytest.fixture
def person(tmp_path):
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium to open the page in: apt-get install chromium")
    person = browser.Browser(tmp_path / "profile")
    yield person
    person.close()


IDLE = "!document.querySelector('.writing') && document.querySelectorAll('.text span').length"


def test_a_person_types_moves_the_slider_and_reads(person, url, models, tmp_path):
    person.open(url)
    person.wait("!document.querySelector('#write').disabled")
    assert person.text("#about").startswith("tiny at http://127.0.0.1:")
    assert person.text("#weight") == "0.60, its own"
    person.type("#prompt", "bagi duto mela")
    person.click("#write")
    person.wait(IDLE)
    own = ask(url, prompt="bagi duto mela", tokens=48)
    base = ask(url, prompt="bagi duto mela", tokens=48, writes="base")
    # Whole: where a character has several tokens, the one that it stands at depends on the time.
    shown = "[...document.querySelectorAll('#{} .text span')].map(s => s.dataset.text).join('')"
    assert person.read(shown.format("mixture")) == "".join(own[0])
    assert person.read(shown.format("base")) == "".join(base[0])
    # The third token: its colour, who decided, and its numbers where the mouse is.
    third = "#mixture .text span:nth-child(3)"
    person.point(third)
    card, wanted = person.text("#token"), own[1][2]
    for name in ("base", "memory", "mixture"):
        assert f"{100 * wanted[name]:.1f}%" in card, (card, wanted)
    assert f"decided by: {wanted['decided']}" in card
    colour = f"getComputedStyle(document.querySelector('{third}')).backgroundColor"
    assert person.read(colour)[:12] == wanted["shade"][:12]
    person.picture(tmp_path / "wide.png")
    # To the left of the slider: another weight, another answer; the base's stays.
    person.click("#alpha", across=0.12)
    weight = float(person.read("document.querySelector('#alpha').value"))
    assert 0 < weight < 0.3
    person.wait(f"{IDLE} && document.querySelector('#mixture .said').innerText.trim()")
    other = ask(url, alpha=weight, prompt="bagi duto mela", tokens=48)
    assert person.read(shown.format("mixture")) == "".join(other[0])
    assert person.text("#weight") == f"{weight:.2f}"
    person.click("#own")
    person.wait(f"{IDLE} && document.querySelector('#mixture .said').innerText.trim()")
    assert person.read(shown.format("mixture")) == "".join(own[0])
    # A phone, in the dark.
    person.open(url, width=390, height=844, dark=True)
    person.wait("!document.querySelector('#write').disabled")
    person.type("#prompt", "bagi duto mela")
    person.click("#write")
    person.wait(IDLE)
    person.click(third)
    assert person.read("document.documentElement.scrollWidth") <= 390
    person.picture(tmp_path / "phone.png")
    assert not person.errors
    assert all(asked.startswith((url, "data:", "about:")) for asked in person.asked)


def test_what_goes_wrong_is_read_on_the_page(person, url):
    person.open(url)
    person.wait("!document.querySelector('#write').disabled")
    person.read(f"document.querySelector('#prompt').value = {json.dumps('bagi ' * 300)}")
    person.click("#write")
    person.wait("!document.querySelector('#mixture .problem').hidden")
    assert "maximum context length" in person.text("#mixture .problem")
