"""What a client of the HTTP server asks for, and whether the answers are the mixture's."""

import json

import pytest
from support import oracle
from support.choices import CHOICES, PLAIN, PROMPT, beams, greedy, mixture


def complete(client, models, xargs=None, **options):
    body = {"return_tokens_as_token_ids": True}
    if xargs is not None:
        body["vllm_xargs"] = xargs
    defaults = {"model": models["base"], "prompt": PROMPT, "max_tokens": 4}
    defaults |= {"temperature": 0, "logprobs": 3}
    return client.completions.create(extra_body=body, **defaults | options)


def token_ids(names):
    return [int(name.removeprefix("token_id:")) for name in names]


def check_streaming(client, models):
    """Tokens of each choice, in several events."""
    for choice in CHOICES:
        stream = client.completions.create(
            model=models["base"],
            prompt=PROMPT,
            max_tokens=12,
            temperature=0,
            stream=True,
            extra_body={
                "vllm_xargs": choice.extra_args,
                "return_token_ids": True,
                "ignore_eos": True,
            },
        )
        parts = [chunk.choices[0].token_ids for chunk in stream if chunk.choices]
        assert len(parts) > 2
        assert [token for part in parts for token in part or ()] == greedy(
            models, choice, PROMPT, 12
        )


def check_chat(client, models):
    """Tokens of each choice and their log-probabilities."""
    for choice in CHOICES:
        answer = client.chat.completions.create(
            model=models["base"],
            messages=[{"role": "user", "content": "bagi duto mela"}],
            max_tokens=8,
            temperature=0,
            logprobs=True,
            extra_body={
                "vllm_xargs": choice.extra_args,
                "return_token_ids": True,
                "ignore_eos": True,
            },
        ).model_dump()
        prompt, found = answer["prompt_token_ids"], answer["choices"][0]
        assert found["token_ids"] == greedy(models, choice, prompt, 8)
        key_TV = mixture(models, choice, [*prompt, *found["token_ids"]])[len(prompt) - 1 : -1]
        for entry, token, row_V in zip(
            found["logprobs"]["content"], found["token_ids"], key_TV, strict=True
        ):
            assert entry["logprob"] == pytest.approx(row_V[token].item(), abs=oracle.TOLERANCE)


def search(client, models, **body):
    """Return the tokens of two beams."""
    body |= {"use_beam_search": True, "ignore_eos": True, "return_token_ids": True}
    found = client.completions.create(
        model=models["base"], prompt=PROMPT, max_tokens=4, temperature=0, n=2, extra_body=body
    )
    return [choice.token_ids for choice in found.choices]


def check_beams(client, models):
    """The best of the server's memory and weight."""
    assert search(client, models) == [ids for _, ids in beams(models, PLAIN, PROMPT, 2, 4)]


def write_batch(path, models, extras, **more):
    """Write a file of chats for `vllm run-batch`, numbered, each with its extra arguments."""
    body = {
        "model": models["base"],
        "messages": [{"role": "user", "content": "bagi duto mela"}],
        "max_completion_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    asked = {str(n): {"vllm_xargs": extra} for n, extra in enumerate(extras)} | more
    line = {"method": "POST", "url": "/v1/chat/completions"}
    lines = [line | {"custom_id": name, "body": body | own} for name, own in asked.items()]
    path.write_text("\n".join(map(json.dumps, lines)))


def read_batch(path):
    """Return the answers to a file, by their names."""
    answers = map(json.loads, path.read_text().splitlines())
    return {answer["custom_id"]: answer for answer in answers}


def check_line(row, models, choice):
    """An answer is the mixture's."""
    answer = row["response"]["body"]
    wanted = greedy(models, choice, answer["prompt_token_ids"], 6)
    assert answer["choices"][0]["token_ids"] == wanted, choice
