"""What `vllm run-batch` calls, on a real engine: each line of a file is obeyed or refused."""

import asyncio
import json

import pytest
from support import choices, quick_engines
from support.choices import CHOICES

MISPLACED = {
    "memdec_alpha": 0,
    "alpha": 0,
    "xargs": {"memdec_memory": "none"},
    "extra_body": {"vllm_xargs": {"memdec_alpha": 0}},
}
PLACE = "put it into vllm_xargs"
# Of each request the sentence that refuses it.
REFUSED = {
    **{name: ({name: value}, PLACE) for name, value in MISPLACED.items()},
    "range": ({"vllm_xargs": {"memdec_alpha": 2}}, "must be a number between 0 and 1"),
    "name": ({"vllm_xargs": {"memdec_memory": "nowhere"}}, "must be one of"),
    "spelling": ({"vllm_xargs": {"memdc_alpha": 0.3}}, "Unknown extra argument 'memdc_alpha'"),
    "beams": (
        {"vllm_xargs": {"memdec_memory": "bio"}, "use_beam_search": True},
        "Beam search has the server's memory",
    ),
}


@pytest.fixture(scope="module")
def models(tiny_model):
    return choices.make_models(tiny_model)


def test_each_line_is_obeyed_or_refused(models, tmp_path):
    from vllm.entrypoints.launchers import run_batch
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    body = {
        "model": models["base"],
        "messages": [{"role": "user", "content": "bagi duto mela"}],
        "max_completion_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    asked = {str(n): {"vllm_xargs": choice.extra_args} for n, choice in enumerate(CHOICES)}
    asked |= {name: extra for name, (extra, _) in REFUSED.items()}
    line = {"method": "POST", "url": "/v1/chat/completions"}
    (tmp_path / "in.jsonl").write_text(
        "\n".join(
            json.dumps(line | {"custom_id": name, "body": body | extra})
            for name, extra in asked.items()
        )
    )
    settings = {"memdec": choices.memdec_block(models)}
    options = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16"]
    options += ["--kv-cache-memory-bytes", str(quick_engines.KV_CACHE["kv_cache_memory_bytes"])]
    files = ["-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--model", models["base"]]
    given = ["--model-impl", "memdec", "--additional-config", json.dumps(settings)]
    parser = run_batch.make_arg_parser(FlexibleArgumentParser())
    asyncio.run(run_batch.main(parser.parse_args([*map(str, files), *given, *options])))
    rows = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    found = {row["custom_id"]: row for row in rows}
    for number, choice in enumerate(CHOICES):
        answer = found.pop(str(number))["response"]["body"]
        wanted = choices.greedy(models, choice, answer["prompt_token_ids"], 6)
        assert answer["choices"][0]["token_ids"] == wanted, choice
    answered = [
        (name, row["response"]["status_code"], str(row["error"])[:200])
        for name, row in found.items()
        if row["response"]["status_code"] != 400 or REFUSED[name][1] not in str(row["error"])
    ]
    assert len(found) == len(REFUSED) and not answered
