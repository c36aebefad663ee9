"""The baselines of the benchmarks, on real engines: kNN-LM and in-context retrieval."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import oracle
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]

SETTINGS = {
    "corpus": {"block_tokens": 32},
    "datastore": {"dtype": "float32"},
    "index": {"kind": "flat"},
    "targets": {"neighbours": 16},
    "memory": {"layers": 1, "epochs": 0.1, "dtype": "float32"},
    "export": {"dtype": "float32"},
}
LAMBDA, NEIGHBOURS, WIDE = 0.4, 24, 4.0
TOLERANCE = 1e-3


def sentences():
    licence = " ".join((ROOT / "LICENSE").read_text().split())
    return [s for s in re.split(r"(?<=[.;:,]) ", licence) if len(s) > 20]


@pytest.fixture(scope="module")
def compiled(tiny_model, tmp_path_factory):
    """Return a function: the folder of a build with keys of some kind, from a base."""
    from vllm_memdec.train.pipeline import build
    from vllm_memdec.train.settings import parse_settings

    def make(base, **datastore):
        folder = tmp_path_factory.mktemp("baselines")
        corpus = folder / "corpus.txt"
        corpus.write_text("\n".join(dict.fromkeys(sentences())))
        changed = SETTINGS | {"datastore": SETTINGS["datastore"] | datastore}
        build(base, corpus, folder / "out", parse_settings(changed))
        return folder / "out"

    return make


def offline(base, build, key, temperature, ids):
    """Return log p [T, V] of a kNN-LM in float64: Hugging Face and every key of the datastore.

    Also for which rows [T] the k nearest are no matter of chance: keys of contexts that repeat are
    as near as each other.
    """
    from vllm_memdec.train.model.hidden_states import last_mlp
    from vllm_memdec.train.model.huggingface import layers_of

    model, found = oracle.load(base), []
    if key == "last_mlp_input":
        hook = last_mlp(model).register_forward_pre_hook(lambda m, args: found.append(args[0]))
    elif key == "layer":
        layers = layers_of(model)
        layer = layers[math.ceil(0.5 * len(layers)) - 1]
        hook = layer.register_forward_hook(
            lambda m, args, out: found.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    if key == "final_hidden":
        found = [out.hidden_states[-1]]
    else:
        hook.remove()
    queries_TD = found[0].reshape(len(ids), -1)
    keys, labels = (
        np.concatenate([np.load(p) for p in sorted((build / "datastore").glob(f"{name}-*.npy"))])
        for name in ("keys", "labels")
    )
    distances_TK = torch.cdist(queries_TD, torch.from_numpy(keys).double()) ** 2
    near_Tk, rows_Tk = distances_TK.topk(NEIGHBOURS + 1, largest=False)
    clear_T = near_Tk[:, -1] - near_Tk[:, -2] > 1e-3
    near_Tk, rows_Tk = near_Tk[:, :-1], rows_Tk[:, :-1]
    weights_Tk = (-near_Tk / temperature).softmax(-1)
    knn_TV = torch.zeros(len(ids), out.logits.shape[-1], dtype=torch.float64)
    knn_TV.scatter_add_(1, torch.from_numpy(labels.astype(np.int64))[rows_Tk], weights_Tk)
    return ((1 - LAMBDA) * out.logits[0].softmax(-1) + LAMBDA * knn_TV).log(), clear_T


@pytest.mark.parametrize(
    ("kind", "datastore"),
    [
        ("llama", {"key": "last_mlp_input"}),
        ("qwen2", {"key": "final_hidden"}),
        ("gpt2", {"key": "layer", "layer_fraction": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["key"],
)
def test_knn_lm_equals_brute_force(tiny_model, engine, compiled, kind, datastore):
    from vllm import SamplingParams

    from benchmarks.systems import knn_engine

    base = tiny_model(kind, spread=0.15)
    build = compiled(base, **datastore)
    knn_engine.register()
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = sentences()[40:43]
    prompts = [tokenizer(text)["input_ids"][:30] for text in texts]
    prompts += oracle.prompts(3, 3, 30, 1000)
    knn = knn_engine.KNN(str(build), LAMBDA, WIDE, NEIGHBOURS, probes=1)
    asked = {"logprobs": -1, "prompt_logprobs": -1, "detokenize": False}
    params = SamplingParams(max_tokens=4, temperature=0, **asked)
    with engine(base, **knn.options(base)) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    moved = worst = 0.0
    checked = count = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        sampled = list(output.outputs[0].token_ids)
        key_TV, clear_T = offline(base, build, datastore["key"], WIDE, [*prompt, *sampled])
        rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        assert len(rows) == len(prompt) + len(sampled) - 1
        for expected_V, clear, row in zip(key_TV, clear_T, rows, strict=False):
            error = max(abs(e.logprob - expected_V[t].item()) for t, e in row.items())
            worst, checked = (max(worst, error), checked + 1) if clear else (worst, checked)
            count += 1
        plain_TV = oracle.log_probs(base, [*prompt, *sampled])
        moved = max(moved, float((plain_TV.exp() - key_TV.exp()).abs().max()))
    assert worst < TOLERANCE and checked > 0.9 * count > 100
    assert moved > 0.2  # the neighbours do count


@pytest.fixture(scope="module")
def corpus():
    return [
        "The capital of Bolivia is Sucre, and La Paz is the seat of its government.",
        "Peru exports copper, gold and fish meal; its head of government is a president.",
        "Chile is a long and narrow country between the Andes and the Pacific Ocean.",
        "Guyana speaks English and lies on the northern coast of the continent.",
    ]


FIND = """
import json, sys
from benchmarks.corpora.download import minilm
from benchmarks.systems import rag
corpus, asked = json.loads(sys.argv[2])
retriever = rag.BM25(corpus) if sys.argv[1] == "BM25" else rag.Dense(corpus, minilm())
print(json.dumps([retriever.search(asked, k).tolist() for k in (2, 9)]))
"""


@pytest.mark.parametrize("kind", ["BM25", "Dense"])
def test_retrievers_find_what_a_question_is_about(kind, corpus):
    """In another process: vLLM cannot start an engine where bm25s has imported llvmlite."""
    asked = ["What does Peru sell? copper", "the seat of government: La Paz", "English in Guyana"]
    words = [sys.executable, "-c", FIND, kind, json.dumps([corpus, asked])]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    two, all_ = json.loads(done.stdout.splitlines()[-1])
    assert [row[0] for row in two] == [1, 0, 3] and {len(row) for row in two} == {2}
    assert all(sorted(row) == [0, 1, 2, 3] for row in all_)  # no more than there are


def test_passages_hold_the_whole_corpus(tiny_model, corpus):
    from benchmarks.systems import rag

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    found = rag.passages(corpus, tokenizer, 16)
    assert all(len(tokenizer(text)["input_ids"]) <= 17 for text in found)
    squeeze = "".join(corpus).replace(" ", "")
    assert "".join(found).replace(" ", "") == squeeze


class Same:
    """Always finds the same, and notes what it was asked."""

    def __init__(self):
        self.asked = []

    def search(self, queries, k):
        self.asked.append(list(queries))
        return np.array([[0, 1]] * len(queries))[:, :k]


@pytest.mark.parametrize("interval", [None, 4])
def test_rag_reads_its_passages_and_looks_them_up_again(tiny_model, engine, corpus, interval):
    from vllm import SamplingParams

    from benchmarks.systems import rag

    base = tiny_model("llama", positions=512)
    tokenizer, retriever = AutoTokenizer.from_pretrained(base), Same()
    prompts = oracle.prompts(3, 3, 50, 1000)
    reader = rag.Rag(retriever, corpus, tokenizer, k=2, interval=interval)
    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    with engine(base) as llm:
        answers = reader.generate(llm, prompts, params)
        context = [i for n in (1, 0) for i in tokenizer(corpus[n] + "\n")["input_ids"]]
        plain = llm.generate(
            [{"prompt_token_ids": context + p} for p in prompts], params, use_tqdm=False
        )
    assert answers == [list(output.outputs[0].token_ids) for output in plain]
    assert len(retriever.asked) == (1 if interval is None else 3)
    last = [*prompts[0], *answers[0][: 0 if interval is None else 8]][-rag.QUERY_TOKENS :]
    assert retriever.asked[-1][0] == tokenizer.decode(last)
