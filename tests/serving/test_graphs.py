"""The V2 runner with CUDA graphs, which recorded_graphs.py stands in for on a CPU.

The oracle's probabilities all the same, and no graph computes what nobody asked for.
"""

import pytest
import torch
from support import oracle, v2_process
from support.choices import Choice, memdec_block
from support.recorded_graphs import Graph, capture

VOCAB = 1000
NONE, LAW, BIO = Choice("none"), Choice(), Choice("bio")
BATCHES = [
    [NONE, Choice("bio", 0.0)],
    [LAW] * 3,
    [BIO, Choice("bio", 1.0)],
    [LAW, BIO, LAW],
    [LAW, BIO, NONE, LAW],
]
ONE = [[NONE] * 3, [LAW] * 3, [LAW, NONE, Choice("law", 0.3)]]


def requests(batches):
    params = {"temperature": 0, "max_tokens": 5, "logprobs": 5, "ignore_eos": True}
    return [
        [
            (ids, params | {"extra_args": choice.extra_args})
            for ids, choice in zip(
                oracle.prompts(len(choices), 2, 12, VOCAB, seed=seed), choices, strict=True
            )
        ]
        for seed, choices in enumerate(batches)
    ]


@pytest.fixture(scope="module")
def pairs(tiny_model):
    """Return folders by name, the base's vocabulary the wider one, or the memory's."""
    law = {"seed": 1, "hidden": 96, "layers": 3, "spread": 0.15}
    bio = tiny_model("llama", seed=2, spread=0.15)
    return {
        "wide base": {
            "base": tiny_model("llama", vocab=1024, spread=0.15),
            "law": tiny_model("llama", **law),
            "bio": bio,
        },
        "wide memory": {
            "base": tiny_model("llama", spread=0.15),
            "law": tiny_model("llama", vocab=1024, **law),
            "bio": bio,
        },
    }


# name: (folders, batches, tokens drafted, graphs, dtype)
ENGINES = {
    "full": ("wide memory", BATCHES, 0, "full", "float32"),
    "piecewise": ("wide base", BATCHES, 0, "piecewise", "float32"),
    "one memory drafts": ("wide memory", ONE, 2, "piecewise", "float32"),
    "two memories draft": ("wide base", BATCHES, 2, "full", "bfloat16"),
    # Requests without drafts have the largest graph: of 4 tokens, where one with drafts has 3.
    "few sizes": ("wide memory", [[NONE] * 3, [LAW]], 2, "full", "float32"),
}


@pytest.fixture(scope="module")
def results(pairs, subprocess_env):
    jobs = {}
    for name, (pair, batches, drafts, graphs, dtype) in ENGINES.items():
        block = memdec_block(pairs[pair])
        if batches is not BATCHES:
            del block["memories"]["bio"]
        if drafts:
            block["speculative_tokens"] = drafts
        job = v2_process.job(pairs[pair]["base"], block, requests(batches), graphs, dtype=dtype)
        if name == "few sizes":
            job["llm"]["compilation_config"]["cudagraph_capture_sizes"] = [1, 2, 4]
        jobs[name] = job
    return v2_process.run(jobs, subprocess_env)


@pytest.mark.parametrize("name", ENGINES)
def test_graphs(name, results, pairs):
    """Answers are the mixture's; each step replays the graph of its requests' memories."""
    pair, batches, drafts, graphs, dtype = ENGINES[name]
    result, models = v2_process.answered(results, name), pairs[pair]
    choices = [choice.resolved for batch in batches for choice in batch]
    chosen = [(models[memory], alpha) for memory, alpha in choices]
    v2_process.check_answers(result, models["base"], chosen, dtype)
    assert v2_process.check_steps(result, drafts) == {
        "FULL",
        "PIECEWISE" if graphs != "full" else "NONE",
    }
    # Every batch decodes by full graphs, of none, one and all memories; so do the drafts.
    full = {
        (*step["used"],)
        for step in result["steps"]
        if any(how == "FULL" for who, _, _, how in step["ran"] if who == "target")
    }
    assert full >= ({(), (0,), (1,), (0, 1)} if batches is BATCHES else {(), (0,)})
    drafted = [step for step in result["steps"] if v2_process.ran(step, "draft")]
    for step in drafted:
        assert v2_process.ran(step, "draft", "FULL") == set(step["used"])
    assert result["accepted"] <= result["drafted"] and bool(drafted) == bool(drafts)


def doubled(x_N, out_N):
    graph = Graph()
    with capture(graph):
        out_N.copy_(x_N.clamp(max=9) * 2)
    return graph


@pytest.fixture
def no_graphs():
    yield
    Graph.all.clear()


def test_a_replay_reads_the_same_memory(no_graphs):
    x_N, out_N = torch.tensor([1.0, 20.0]), torch.zeros(2)
    graph = doubled(x_N, out_N)
    x_N.copy_(torch.tensor([3.0, 4.0]))
    graph.replay()
    assert out_N.tolist() == [6, 8]


def test_a_replay_refuses_freed_memory(no_graphs):
    """As of a temporary that was the input of a captured graph."""
    out_N = torch.zeros(2)
    graph = doubled(torch.ones(2), out_N)
    with pytest.raises(RuntimeError, match="freed memory"):
        graph.replay()


def test_a_result_lasts_until_the_next_replay(no_graphs):
    graphs, results = [], []
    x_N = torch.ones(2)
    for _ in range(2):
        graph = Graph()
        with capture(graph):
            results.append(x_N * 2)
        graphs.append(graph)
    graphs[0].replay()
    assert results[0].tolist() == [2, 2]
    graphs[1].replay()
    assert results[0].isnan().all()


@pytest.mark.parametrize(
    "waits",
    [
        lambda x_N: x_N.nonzero(),
        lambda x_N: x_N.sum().item(),
        lambda x_N: bool(x_N.any()),
        lambda x_N: x_N[x_N > 0],
        lambda x_N: x_N.index_put_((x_N > 0,), torch.zeros(())),
        lambda x_N: x_N.unique(),
    ],
)
@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_a_capture_refuses_to_wait(waits, inference, no_graphs):
    waiting = pytest.raises(RuntimeError, match="wait for the device")
    with inference(), waiting, capture(Graph()):
        waits(torch.ones(3))
