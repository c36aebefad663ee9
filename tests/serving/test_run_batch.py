"""What `vllm run-batch` calls, on a real engine: each line of a file is obeyed or refused."""

import asyncio
import json

import pytest
from support import choices, http_rows, quick_engines
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


@pytest.mark.feature("vllm run-batch")
def test_each_line_is_obeyed_or_refused(models, tmp_path, monkeypatch):
    from vllm.entrypoints.launchers import run_batch
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # of the engine, a user's process
    refused = {name: extra for name, (extra, _) in REFUSED.items()}
    asked = [choice.extra_args for choice in CHOICES]
    http_rows.write_batch(tmp_path / "in.jsonl", models, asked, **refused)
    settings = {"memdec": choices.memdec_block(models)}
    options = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16"]
    options += ["--kv-cache-memory-bytes", str(quick_engines.KV_CACHE["kv_cache_memory_bytes"])]
    files = ["-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--model", models["base"]]
    given = ["--model-impl", "memdec", "--additional-config", json.dumps(settings)]
    parser = run_batch.make_arg_parser(FlexibleArgumentParser())
    asyncio.run(run_batch.main(parser.parse_args([*map(str, files), *given, *options])))
    found = http_rows.read_batch(tmp_path / "out.jsonl")
    for number, choice in enumerate(CHOICES):
        http_rows.check_line(found.pop(str(number)), models, choice)
    answered = [
        (name, row["response"]["status_code"], str(row["error"])[:200])
        for name, row in found.items()
        if row["response"]["status_code"] != 400 or REFUSED[name][1] not in str(row["error"])
    ]
    assert len(found) == len(REFUSED) and not answered
