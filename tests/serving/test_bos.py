"""A tokenizer that adds BOS: a build reads text as vLLM does, with BOS before every block."""

import json

import numpy as np
import pytest
from support.tiny_models import tiny_text
from typer.testing import CliRunner

from vllm_memdec.checkpoint import read_block
from vllm_memdec.train.cli import app
from vllm_memdec.train.data.blocks import SPLITS, bos_of, load_blocks
from vllm_memdec.train.data.duplicates import stored_documents
from vllm_memdec.train.data.shards import shards
from vllm_memdec.train.model.huggingface import load_tokenizer
from vllm_memdec.train.model.windows import validation_documents, windows

BOS = 0
SETTINGS = ("corpus.block_tokens=32", "corpus.validation_fraction=0.2", "datastore.dtype=float32",
            "targets.neighbours=16", "memory.layers=1", "memory.epochs=0.2", "memory.dtype=float32",
            "export.dtype=float32", "export.context_tokens=128")  # fmt: skip


@pytest.fixture(scope="module")
def out(bos_model, tmp_path_factory):
    """Return the output of a build: documents much longer than a block, some than a window."""
    folder = tmp_path_factory.mktemp("bos")
    texts = [tiny_text(seed, words) for seed in range(5) for words in (30, 60, 150)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--base", bos_model, "--corpus", corpus, "--output", folder / "out"]
    words += ["--ray-address", "none", *(w for s in SETTINGS for w in ("--set", s))]
    done = CliRunner().invoke(app, ["build", *map(str, words)])
    assert done.exit_code == 0, done.stderr
    return folder / "out"


def test_no_row_at_position_0_lacks_bos(out):
    for split in SPLITS:
        tokens, positions = (a[:] for a in load_blocks(out / "corpus", split))
        place = np.where(positions < 0, ~positions, positions)
        read = place[:, 1:] == place[:, :-1] + 1
        first = tokens[:, :-1][read & (place[:, :-1] == 0)]
        assert len(first) > 10 and (first != BOS).mean() == 0


def test_every_token_is_a_label_once_and_bos_never(out):
    documents = list(stored_documents(out / "corpus", "train"))
    assert max(map(len, documents)) > 300 and all(d[0] == BOS for d in documents)
    labels = np.concatenate(list(shards(out / "datastore", "labels")))
    assert labels.tolist() == np.concatenate([d[1:] for d in documents]).tolist()
    done = CliRunner().invoke(app, ["verify", str(out)], env={"COLUMNS": "200"})
    said = " ".join(done.output.split())
    assert f"{len(labels):,} labels of datastore and targets are the corpus's" in said
    assert "none in" in said  # no row knows its label


def test_the_bases_perplexity_is_that_of_vllm(out, bos_model, engine):
    """On the same text, each stretch that is read by itself as a request, as `echo` scores it."""
    from vllm import SamplingParams

    tokenizer = load_tokenizer(bos_model)
    documents = validation_documents(out / "corpus", 10**6)
    text = windows(documents, 128, tokenizer.eos_token_id, 10**6, bos_of(tokenizer))
    prompts, scored = [], []
    for tokens, positions, rows in zip(text.tokens, text.positions, text.scored, strict=True):
        starts = np.flatnonzero(np.where(positions < 0, ~positions, positions) == 0)
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            ids, kept = tokens[start:stop].tolist(), rows[start : stop - 1].tolist()
            if not any(kept):
                continue
            if ids[0] != BOS:  # as a server reads the same text
                ids, kept = [BOS, *ids], [False, *kept]
            prompts.append({"prompt_token_ids": ids})
            scored.append(kept)
    with engine(bos_model, max_model_len=256) as llm:
        assert llm.get_tokenizer()("ba")["input_ids"][0] == BOS
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    logprobs = [
        output.prompt_logprobs[n + 1][output.prompt_token_ids[n + 1]].logprob
        for output, kept in zip(outputs, scored, strict=True)
        for n in np.flatnonzero(kept)
    ]
    said = read_block(out / "export").provenance["validation_perplexity"]["base"]
    assert len(logprobs) == text.scored.sum() > 300
    assert said == pytest.approx(np.exp(-np.mean(logprobs)), rel=0.01)
