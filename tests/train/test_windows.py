"""Text as requests read it: contexts as long as what is served, and weights by their length."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_memdec.train.data.blocks import tokenise
from vllm_memdec.train.data.documents import documents
from vllm_memdec.train.model import windows as module
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.model.scoring import mix, perplexity
from vllm_memdec.train.model.windows import (
    EDGES,
    MIN_ROWS,
    alone,
    alpha_at,
    alphas_by_context,
    by_context,
    joined,
    readings,
    validation_documents,
    window_logprobs,
    window_tokens,
)

FILLER = -7


def numbered(lengths):
    """Return documents whose tokens are all different: 0, 1, 2, ... in order."""
    return np.split(np.arange(sum(lengths), dtype=np.int32), np.cumsum(lengths)[:-1])


def test_joined_windows_hold_documents_one_after_another():
    lengths = [5, 4, 9, 1, 3, 30, 2, 8, 8]
    whole = numbered(lengths)
    windows_ = joined(whole, 12, FILLER)
    seen = []
    for tokens, positions, scored in zip(
        windows_.tokens, windows_.positions, windows_.scored, strict=True
    ):
        filled = tokens != FILLER
        assert filled.tolist() == sorted(filled.tolist(), reverse=True)
        assert positions[filled].tolist() == list(range(filled.sum()))
        assert tokens[0] in {d[0] for d in whole}  # a window starts with a document
        starts = {int(d[0]) for d in whole}
        for t in range(12):
            expected = filled[t + 1] and int(tokens[t + 1]) not in starts
            assert scored[t] == expected
        seen += tokens[1:][scored].tolist()
    assert not set(seen) & set(whole[5].tolist())  # it fills windows by itself
    short = {int(i) for n, d in enumerate(whole) if n not in (5, 8) for i in d[1:]}
    # The last one has a window to itself, which is how it is read alone.
    assert short <= set(seen) <= short | set(whole[8].tolist())
    assert len(joined(numbered([8, 40]), 12, FILLER)) == 0  # read alone it is the same


def test_contexts_are_those_of_a_request(tiny_model, english):
    """A row in the second document of a window has read the first one; alone it has not."""
    folder = tiny_model("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = list(tokenise(tokenizer, english(12, sentences_each=1)))
    model, plain = load_model(folder), AutoModelForCausalLM.from_pretrained(folder)
    for text in readings(ids, 128, tokenizer.eos_token_id, 10**6):
        assert len(text) and text.scored.any()
        expected = []
        for tokens, positions, scored in zip(text.tokens, text.positions, text.scored, strict=True):
            starts = [*np.flatnonzero(positions == 0), len(tokens)]
            for start, stop in zip(starts, starts[1:], strict=False):
                with torch.inference_mode():
                    run = torch.from_numpy(tokens[start:stop].astype(np.int64))
                    logp_TV = plain(run[None]).logits[0].double().log_softmax(-1)
                rows = np.flatnonzero(scored[start : stop - 1])
                expected += logp_TV[rows, run[rows + 1]].tolist()
        assert np.abs(window_logprobs(model, text) - expected).max() < 1e-4
    assert text.position_N.mean() > 1.2 * alone(ids, 128, 1).position_N.mean()


def test_validation_documents_are_put_together_again(pipeline, monkeypatch):
    corpus = pipeline.output / "corpus"
    tokenizer = AutoTokenizer.from_pretrained(pipeline.base)
    whole = {tuple(ids.tolist()) for ids in tokenise(tokenizer, documents(pipeline.corpus))}
    together = validation_documents(corpus, 10**6)
    assert together and {tuple(ids.tolist()) for ids in together} <= whole
    assert max(map(len, together)) > 64  # blocks have 32 tokens
    monkeypatch.setattr(module, "RUNS", 2)
    some = validation_documents(corpus, 128)
    assert 64 <= sum(map(len, some)) <= 140
    last = np.concatenate(together)[-1]
    assert np.concatenate(some)[-1] == last or len(some) > 1


def rows_of(alphas, rows, seed=0):
    """Return positions and log-probabilities of rows whose best alpha is alphas[bucket]."""
    rng = np.random.default_rng(seed)
    position = np.concatenate(
        [rng.integers(EDGES[b], EDGES[b + 1], rows[b]) for b in range(len(alphas))]
    )
    share = np.repeat(alphas, rows)  # of rows that the memory alone predicts
    right = rng.random(len(share)) < share
    return position, np.log(np.where(right, 1e-3, 0.9)), np.log(np.where(right, 0.9, 1e-3))


def test_weights_by_context():
    position_N, base_N, memory_N = rows_of([0.7, 0.4, 0.2], [3000, 3000, 3000])
    table = alphas_by_context(position_N, base_N, memory_N)
    assert [start for start, _ in table] == [0, 64, 256]
    assert [alpha for _, alpha in table] == pytest.approx([0.7, 0.4, 0.2], abs=0.03)
    weights_N = alpha_at(table, position_N)
    assert weights_N[position_N == 63].tolist() == [table[0][1]] * (position_N == 63).sum()
    assert weights_N[position_N == 64].tolist() == [table[1][1]] * (position_N == 64).sum()
    mixture_N = mix(base_N, memory_N, weights_N)
    rows = by_context(position_N, base_N, memory_N, {"mixture": mixture_N})
    assert [row["tokens"] for row in rows] == [3000] * 3
    for row, alpha in zip(rows, (a for _, a in table), strict=True):
        assert row["mixture"] == pytest.approx(row["best"]) and row["best_alpha"] == alpha
        assert row["mixture"] < min(row["base"], row["memory"])
    here = position_N < 64
    assert rows[0]["base"] == pytest.approx(perplexity(base_N[here]))


def test_few_rows_share_a_weight():
    few = MIN_ROWS // 4
    for rows, starts in (
        ([few, few, 3000], [0]),
        ([3000, few, few], [0]),
        ([3000, few, 3000], [0, 64]),
        ([few, 0, 0], [0]),
    ):
        position_N, base_N, memory_N = rows_of([0.6, 0.4, 0.2], rows)
        assert [s for s, _ in alphas_by_context(position_N, base_N, memory_N)] == starts


def test_windows_are_as_long_as_the_text_fills():
    class Config:
        max_position_embeddings = 2048

    assert window_tokens(None, 100, []) == 512
    assert window_tokens(None, 4 * 1024 - 1, []) == 512
    assert window_tokens(None, 4 * 1024, []) == 1024
    assert window_tokens(None, 10**9, []) == 4096
    assert window_tokens(None, 10**9, [Config, object]) == 2048
    assert window_tokens(700, 10, [Config]) == 700
