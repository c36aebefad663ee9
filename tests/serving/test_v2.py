"""The V2 runner's probabilities equal the float64 mixture too: CUDA's default, interpreted here.

With rows as on CUDA: each head runs on all of them, and nothing waits for the device.
"""

import shutil
from collections import Counter

import pytest
import torch
from support import ending, long_base, oracle, several, v2_process
from support.choices import (
    CHOICES,
    PROMPT,
    Choice,
    greedy,
    make_models,
    memdec_block,
    penalised,
)
from support.gate_oracle import gate_weights, random_gate
from support.long_base import BESIDE, LONG, SEEDED, request

from vllm_memdec.gate import write_gate

VOCAB = 1000
LAW, BIO = 0.37, 0.4  # the server's weights
GREEDY = {"temperature": 0, "max_tokens": 7, "ignore_eos": True}
CHOSEN = [
    ({}, ("law", LAW)),
    ({"memdec_memory": "bio"}, ("bio", BIO)),
    ({"memdec_memory": "none"}, ("law", 0.0)),
    ({"memdec_alpha": 0}, ("law", 0.0)),
    ({"memdec_alpha": 0.6}, ("law", 0.6)),
    ({"memdec_alpha": 0.3, "memdec_memory": "bio"}, ("bio", 0.3)),
    ({"memdec_alpha": 1}, ("law", 1.0)),
    ({"memdec_memory": "gated"}, ("gated", "auto")),
    ({"memdec_memory": "gated", "memdec_alpha": 0.4}, ("gated", "at most 0.4")),
]
SAME = [*CHOICES, Choice("same"), Choice("same", 0.3)]
STEPS_RUN = [("full", 0), ("full", 2), ("piecewise", 2)]  # graphs, drafts
ENDS_RUN = [(None, 0), ("piecewise", 2)]  # of memories that end; graphs, drafts
ENDING = [
    [
        ending.request(ending.PAST, "learned", prompt_logprobs=2),
        ending.request(ending.PAST, "gated", prompt_logprobs=2),
        ending.request(ending.END - 6, "short", 1.0),
        ending.request(ending.END - 6, "long"),
    ],
    [
        ending.request(195, "steps", prompt_logprobs=2),
        ending.request(60, "gated", 0.3),
        ending.request(ending.END - 5, "learned"),
        ending.request(ending.END, "short"),
    ],
]
# Of several memories in one request; the runner has four at a time. Graphs, drafts.
SEVERAL_RUN = [("piecewise", 0), ("full", 2)]
SEVERAL = [
    [*zip(oracle.prompts(4, 30, 38, VOCAB, seed=n), several.ASKED[4 * n : 4 * n + 4], strict=False)]
    for n in range(4)
]
SAME_TO_ITS_END = [
    ending.request(size, "same", max_tokens=25)
    for size in (ending.END - 15, ending.END - 1, ending.END, ending.END + 1)
]
STEPS = [[0, 0.9], [8, 0.2], [20, 0.0], [30, 0.6]]  # of a memory, in place of one weight
STEPPED = [  # prompt lengths: while decoding each passes a step; the last is read in chunks
    [(6, Choice("steps")), (17, Choice("steps")), (28, Choice("steps")), (40, Choice("steps"))],
    [(6, Choice("steps")), (6, Choice("steps", 1.0)), (17, Choice()), (28, Choice("none"))],
]
MINE = request(33, "law", **SEEDED)  # a block and one token
SEEDS = [  # the second reads its prompt from the cache
    *([MINE], [MINE], [request(20), request(20, "law", temperature=1.0), MINE]),
    [request(20, "none"), request(33, "law", **SEEDED, n=2)],
    [request(33, "law", **SEEDED | {"seed": 8})],
]
# What is in a slot, one after the other: a memory of SLOTTED, the server's weight, what is asked.
SLOTTED = [
    ("one", {"alpha": 0.6}, 0.6),
    ("gated", {}, "auto"),
    ("two", {"alpha_by_context": STEPS}, STEPS),
]
SLOTS_RUN = [(None, 0), ("full", 2)]  # graphs, drafts
NONE, MIXED = [Choice("none")] * 2, [Choice(), Choice("bio"), Choice("none"), Choice("bio", 1.0)]


@pytest.fixture(scope="module")
def mixed(tiny_model, tmp_path_factory):
    """Return (base, folders by name): three memories unlike the base, one with a gate."""
    gated = tmp_path_factory.mktemp("v2") / "gated"
    shutil.copytree(tiny_model("llama", seed=3, layers=1, spread=0.15), gated)
    write_gate(gated, random_gate(64, 3))
    folders = {
        "law": tiny_model("llama", seed=1, hidden=96, layers=1, vocab=1024),
        "bio": tiny_model("gpt2", seed=2, layers=1),
        "gated": str(gated),
    }
    return tiny_model("qwen2"), folders


@pytest.fixture(scope="module")
def drafters(tiny_model):
    """Return the folders of base and memories by dtype, of unequal vocabularies."""
    widths = {"bfloat16": (1024, 1000), "float16": (1000, 1024)}
    return {
        dtype: {
            "base": tiny_model("llama", vocab=base, spread=0.15),
            "law": tiny_model("llama", seed=1, hidden=96, layers=3, vocab=memory, spread=0.15),
            "bio": tiny_model("llama", seed=2, spread=0.15),
        }
        for dtype, (base, memory) in widths.items()
    }


BIAS = {5: 9.0, 7: 8.0}
ENDS = [*range(0, VOCAB, 8)]  # as many as vLLM takes


def biased(row_V, _):
    row_V = row_V.clone()
    row_V[[*BIAS]] += torch.tensor([*BIAS.values()])
    return row_V


def every_ninth(row_V, _):
    return row_V.where(torch.arange(VOCAB) % 9 == 0, -torch.inf)


def three_at_least(row_V, sampled):
    return row_V.where((torch.arange(VOCAB) % 8 > 0) | (len(sampled) >= 3), -torch.inf)


ROWS = [  # what is asked beside a greedy answer, and the key's function of logits and tokens so far
    (Choice(), {"logit_bias": BIAS, "min_p": 0.5}, biased),  # which leaves the likeliest
    (
        Choice("bio"),
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.4},
        penalised(PROMPT, 1.0, 0.5, 1.4),
    ),
    (Choice("law", 0.3), {"allowed_token_ids": [*range(0, VOCAB, 9)]}, every_ninth),
    (Choice("bio", 1.0), {"stop_token_ids": ENDS, "min_tokens": 3}, three_at_least),
]


def asking(choices, seed=0, **more):
    prompts = oracle.prompts(len(choices), 2, 20, VOCAB, seed=seed)
    return [
        (ids, GREEDY | {"extra_args": choice.extra_args} | more)
        for ids, choice in zip(prompts, choices, strict=True)
    ]


def stepped(batch, seed):
    return [
        (
            oracle.prompts(1, length, length, VOCAB, seed=seed + row)[0],
            GREEDY | {"extra_args": choice.extra_args, "logprobs": 5},
        )
        for row, (length, choice) in enumerate(batch)
    ]


@pytest.fixture(scope="module")
def stretched(tiny_model, tmp_path_factory):
    return long_base.make(tiny_model, tmp_path_factory.mktemp("stretched"))


@pytest.fixture(scope="module")
def shorter(tiny_model, tmp_path_factory):
    return ending.make(tiny_model, tmp_path_factory.mktemp("shorter"))


@pytest.fixture(scope="module")
def together(tiny_model, tmp_path_factory):
    return several.make(tiny_model, tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="module")
def slotted(tiny_model, tmp_path_factory):
    """Return the folders of a base, a memory of the settings and three of one shape."""
    gated = tmp_path_factory.mktemp("slotted") / "gated"
    shutil.copytree(tiny_model("llama", seed=3, spread=0.15), gated)
    write_gate(gated, random_gate(64, 3))
    made = {name: tiny_model("llama", seed=n, spread=0.15) for n, name in ((2, "one"), (4, "two"))}
    law = tiny_model("llama", seed=1, hidden=96, layers=1, spread=0.15)
    return made | {"base": tiny_model("llama", spread=0.15), "law": law, "gated": str(gated)}


@pytest.fixture(scope="module")
def results(tiny_model, subprocess_env, mixed, drafters, stretched, shorter, together, slotted):
    """Return what the V2 runner makes of all jobs, in one process."""
    base, folders = mixed
    memories = {
        "gated": {"model": folders["gated"]},
        "law": {"model": folders["law"], "alpha": LAW},
        "bio": {"model": folders["bio"], "alpha": BIO},
    }
    params = {"temperature": 0, "max_tokens": 3, "logprobs": 5, "ignore_eos": True}
    prompts = oracle.prompts(len(CHOSEN), 2, 14, VOCAB)
    requests = [  # every second one asks for its prompt's log-probabilities too
        (ids, params | {"extra_args": extra, "prompt_logprobs": None if row % 2 else 5})
        for row, (ids, (extra, _)) in enumerate(zip(prompts, CHOSEN, strict=True))
    ]
    block = {"memories": memories, "default": "law"}
    jobs = {"mixture": v2_process.job(base, block, [requests], max_num_batched_tokens=16)}

    models = make_models(tiny_model)
    block = memdec_block(models) | {"speculative_tokens": 2}
    block["memories"]["same"] = {"model": models["base"], "alpha": 0.5}
    rows = [(PROMPT, GREEDY | {"extra_args": c.extra_args} | asked) for c, asked, _ in ROWS]
    jobs["drafting"] = v2_process.job(models["base"], block, [asking(SAME), rows])
    for dtype, models in drafters.items():
        block = memdec_block(models) | {"speculative_tokens": 2}
        batches = [asking(choices, seed=1, logprobs=5) for choices in (NONE, [Choice()] * 3, MIXED)]
        jobs[dtype] = v2_process.job(models["base"], block, batches, dtype=dtype)
    models = drafters["bfloat16"]
    for graphs, drafts in STEPS_RUN:
        block = memdec_block(models) | {"speculative_tokens": drafts}
        del block["memories"]["bio"]
        block["memories"]["steps"] = {"model": models["bio"], "alpha_by_context": STEPS}
        batches = [stepped(batch, 10 * n) for n, batch in enumerate(STEPPED)]
        jobs[f"steps, {graphs}, {drafts}"] = v2_process.job(
            models["base"], block, batches, graphs, dtype="bfloat16"
        )
    beside = [[ids, params | {"logprobs": 5}] for ids, params in BESIDE]
    jobs["limits"] = v2_process.job(
        stretched["base"],
        long_base.block(stretched),
        [LONG, beside, *SEEDS],
        max_model_len=long_base.POSITIONS,
        max_num_batched_tokens=512,
        **long_base.OPTIONS,
    )
    for graphs, drafts in ENDS_RUN:
        counted = {"per_request_spec_decode_metrics": "summary"} if drafts else {}
        jobs[f"ends, {graphs}, {drafts}"] = v2_process.job(
            shorter["base"],
            ending.block(shorter, speculative_tokens=drafts),
            [*ENDING, *([each] for each in SAME_TO_ITS_END)],
            graphs,
            max_model_len=ending.POSITIONS,
            max_num_batched_tokens=64,
            **counted,
        )
    for graphs, drafts in SLOTS_RUN:
        jobs[f"slots, {graphs}, {drafts}"] = slots_job(slotted, graphs, drafts)
    return v2_process.run(jobs | several_jobs(together), subprocess_env)


def several_jobs(together):
    """Return the jobs of several memories in one request; every fourth asks for its prompt's."""
    batches = []
    for batch in SEVERAL:
        params = [
            GREEDY | {"max_tokens": 6, "logprobs": 4, "extra_args": several.extra_args(each)}
            for _, each in batch
        ]
        params[0]["prompt_logprobs"] = 4
        batches.append([(ids, given) for (ids, _), given in zip(batch, params, strict=True)])
    return {
        f"several, {graphs}, {drafts}": v2_process.job(
            together["base"], several.block(together, speculative_tokens=drafts), batches, graphs
        )
        for graphs, drafts in SEVERAL_RUN
    }


def slots_job(models, graphs, drafts):
    """Return a job whose only slot has each memory of SLOTTED, one after the other."""
    block = {"slots": {"model": models["one"], "count": 1}, "speculative_tokens": drafts}
    block["memories"] = {"law": {"model": models["law"], "alpha": LAW}}
    asked = [{"memdec_memory": name} for name in ("it", "law")]
    params = [GREEDY | {"max_tokens": 4, "logprobs": 5, "extra_args": extra} for extra in asked]
    batches = []
    for number, (name, own, _) in enumerate(SLOTTED):
        load = {"name": "it", "folder": models[name], **own}
        batches.append({"unload": "it" if number else None, "load": load})
        batches.append([*zip(oracle.prompts(2, 18, 18, VOCAB, seed=20), params, strict=True)])
    return v2_process.job(models["base"], block, batches, graphs)


@pytest.mark.feature("V2 model runner", note="on a CPU through Triton's interpreter")
def test_mixture(results, mixed):
    """One batch of three memories and none, prefilled in chunks; one has a gate."""
    base, folders = mixed
    result = v2_process.answered(results, "mixture")
    for (prompt, sampled, *rows), (extra, (name, alpha)) in zip(
        result["requests"], CHOSEN, strict=True
    ):
        if name == "gated":
            cap = 1.0 if alpha == "auto" else 0.4
            models = folders | {"base": base}
            alpha = gate_weights(models, name, cap, [*prompt, *sampled])
        error = oracle.worst_error(prompt, sampled, *rows, base, folders[name], alpha)
        assert error < oracle.TOLERANCE, extra
    assert v2_process.check_steps(result) == {"NONE"}


@pytest.mark.drafts
@pytest.mark.feature("speculation by the memory itself")
@pytest.mark.feature("V2 model runner")
def test_drafting(results, tiny_model):
    """Greedy answers are the mixture's, prompts in chunks; what agrees is accepted."""
    result = v2_process.answered(results, "drafting")
    models = make_models(tiny_model)
    folders = models | {"same": models["base"]}
    for (prompt, sampled, *_), choice in zip(result["requests"], SAME, strict=False):
        name, alpha = ("same", 0.5) if choice.memory == "same" else choice.resolved
        key = greedy(
            {"base": models["base"], "law": folders[name]}, Choice("law", alpha), prompt, 7
        )
        assert sampled == key, choice
    # The two whose memory is the base have two rounds of two accepted drafts each.
    assert 8 <= result["accepted"] < result["drafted"]
    v2_process.check_steps(result, drafts=2)
    rest = result["requests"][len(SAME) :]
    for (choice, asked, adjust), (_, sampled, *_) in zip(ROWS, rest, strict=True):
        key = greedy(models, choice, PROMPT, 7, adjust)
        ends = [n for n in range(3, 7) if "min_tokens" in asked and key[n] in ENDS]
        assert sampled == key[: ends[0] + 1 if ends else 7], (choice, asked)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_drafting_in_16_bits(dtype, results, drafters):
    """With none, one and two memories in a batch, and vocabularies of unequal width."""
    result, models = v2_process.answered(results, dtype), drafters[dtype]
    choices = [choice.resolved for choice in (*NONE, *[Choice()] * 3, *MIXED)]
    chosen = [(models[name], alpha) for name, alpha in choices]
    v2_process.check_answers(result, models["base"], chosen, dtype)
    assert 0 < result["accepted"] < result["drafted"]
    v2_process.check_steps(result, drafts=2)


@pytest.mark.parametrize(("graphs", "drafts"), STEPS_RUN)
def test_weights_by_context(graphs, drafts, results, drafters):
    """Graphs of both kinds, 16 bits, chunks and drafts: each row has its position's weight."""
    result, models = (
        v2_process.answered(results, f"steps, {graphs}, {drafts}"),
        drafters["bfloat16"],
    )
    chosen, late = [], []
    asked = [choice for batch in STEPPED for _, choice in batch]
    for (prompt, sampled, *_), choice in zip(result["requests"], asked, strict=True):
        if choice == Choice("steps"):
            alpha_T1 = gate_weights(models, "bio", STEPS, [*prompt, *sampled])
            chosen.append((models["bio"], alpha_T1))
            late.append((models["bio"], alpha_T1.roll(1, 0)))  # the weight of the position before
        else:
            name, alpha = ("bio", 1.0) if choice.memory == "steps" else choice.resolved
            chosen.append((models[name], alpha))
            late.append(chosen[-1])
    v2_process.check_answers(result, models["base"], chosen, "bfloat16")
    assert v2_process.worst_error(result, models["base"], late) > 1, "no step would be seen"
    modes = {"FULL", "NONE" if graphs == "full" else "PIECEWISE"}
    assert v2_process.check_steps(result, drafts) == modes
    assert bool(result["accepted"]) == bool(drafts)  # at alpha 1 greedy drafts are all accepted


def test_drafts_at_every_length(results, stretched):
    """Beyond the base's native length, and beside one at the context's end: see test_draft_limits.

    Within a seed repeats an answer, alone and in batches, its prompt cached or not, and as of n.
    """
    result = v2_process.answered(results, "limits")
    beside, drafts = slice(2, 6), result["by_request"]
    assert drafts[:2] == [[6, 6]] * 2
    chosen = [("same", 0.4), ("same", 0.4), ("same", 0.0), ("law", 0.4)]
    chosen = [(stretched[name], alpha) for name, alpha in chosen]
    v2_process.check_answers({"requests": result["requests"][beside]}, stretched["same"], chosen)
    lengths = [len(sampled) for _, sampled, *_ in result["requests"][beside]]
    assert lengths == [9, 6, 6, 9]
    assert drafts[2:5] == [[6, 6], [3, 3], [0, 0]]
    assert sum(drafted for drafted, _ in drafts) == result["drafted"]
    check_counters(result, [*LONG, *BESIDE, *(one for batch in SEEDS for one in batch)])


def check_counters(result, asked):
    """Compare drafts of each memory with those of its requests; rows, which are more where prompts
    are read in pieces; and weights, which are alike."""
    wanted = {
        "draft_tokens": Counter(),
        "accepted_draft_tokens": Counter(),
        "mixed_rows": Counter(),
    }
    names = [p["extra_args"]["memdec_memory"] for _, p in asked for _ in range(p.get("n", 1))]
    answers = [sampled for _, sampled, *_ in result["requests"]]
    for name, sampled, (made, kept) in zip(names, answers, result["by_request"], strict=True):
        if name != "none":
            wanted["draft_tokens"][name] += made
            wanted["accepted_draft_tokens"][name] += kept
            wanted["mixed_rows"][name] += len(sampled) - kept + made
    found = result["by_memory"]
    rows, fewest = found.pop("mixed_rows"), wanted.pop("mixed_rows")
    assert set(rows) == set(fewest) and all(rows[name] >= fewest[name] for name in rows)
    assert rows["law"] < fewest["law"] + 10
    weights = {name: 0.4 * count for name, count in rows.items()}
    assert found.pop("mixed_weight") == pytest.approx(weights)
    assert {name: found[name] for name in wanted} == wanted


def test_a_seed_repeats_an_answer(results):
    result = v2_process.answered(results, "limits")
    alone, again, _, _, mixed, _, first, second, other = [
        sampled for _, sampled, *_ in result["requests"][6:]
    ]
    assert alone == again == mixed == first != other == second
    drafts = result["by_request"][6:]
    assert [drafts[n] for n in (0, 1, 4, 6, 7, 8)] == [[0, 0]] * 6 and drafts[2] != [0, 0]


@pytest.mark.parametrize(("graphs", "drafts"), ENDS_RUN)
def test_beyond_a_memory_s_end(graphs, drafts, results, shorter):
    """Prompts in chunks, and answers that cross the end, as in test_length.py."""
    result = v2_process.answered(results, f"ends, {graphs}, {drafts}")
    asked = [params for batch in (*ENDING, SAME_TO_ITS_END) for _, params in batch]
    for (prompt, sampled, *rows), params in zip(result["requests"], asked, strict=True):
        mixed = ending.mixed(shorter, params, [*prompt, *sampled])
        assert oracle.worst_error(prompt, sampled, *rows, *mixed) < oracle.TOLERANCE, params
        base, memory, alpha, length = mixed
        key_TV = oracle.mixture(base, memory, alpha, [*prompt, *sampled], length)
        assert key_TV[len(prompt) - 1 : -1].argmax(-1).tolist() == sampled, params
    if drafts:
        counts = result["by_request"][-len(SAME_TO_ITS_END) :]
        # None is refused: all were drafted at positions of the memory.
        assert counts[0][0] >= 8 and all(drafted == accepted for drafted, accepted in counts)
        assert counts[-2:] == [[0, 0]] * 2


@pytest.mark.drafts
@pytest.mark.feature("several memories in one request")
@pytest.mark.parametrize(("graphs", "drafts"), SEVERAL_RUN)
def test_several_memories_in_one_request(graphs, drafts, results, together):
    """Beside requests of one memory and of none, past the end of one; prompts in chunks."""
    result = v2_process.answered(results, f"several, {graphs}, {drafts}")
    asked = [each for batch in SEVERAL for _, each in batch]
    for (prompt, sampled, *rows), each in zip(result["requests"], asked, strict=True):
        assert several.worst(together, each, prompt, sampled, *rows) < oracle.TOLERANCE, each
        key_TV = several.mixture(together, each, [*prompt, *sampled])
        assert key_TV[len(prompt) - 1 : -1].argmax(-1).tolist() == sampled, each
    everything = {*range(len(several.ALPHAS))}  # whose graph a set takes that has none
    for step in result["steps"]:
        assert v2_process.ran(step) in ({*step["used"]}, everything), step
        drafting = v2_process.ran(step, "draft")
        assert drafting <= {*step["used"]} or drafting == everything, step
    assert bool(result["drafted"]) == bool(drafts)


@pytest.mark.parametrize(("graphs", "drafts"), SLOTS_RUN)
def test_memories_in_a_slot(graphs, drafts, results, slotted):
    """One after the other in the same tensors, which captured graphs read; see test_slots.py."""
    result = v2_process.answered(results, f"slots, {graphs}, {drafts}")
    wanted = [each for name, _, alpha in SLOTTED for each in ((name, alpha), ("law", LAW))]
    for (prompt, sampled, *rows), (name, alpha) in zip(result["requests"], wanted, strict=True):
        if not isinstance(alpha, float):
            cap = 1.0 if alpha == "auto" else alpha
            alpha = gate_weights(slotted, name, cap, [*prompt, *sampled])
        error = oracle.worst_error(prompt, sampled, *rows, slotted["base"], slotted[name], alpha)
        assert error < oracle.TOLERANCE, (name, alpha)
    assert not drafts or result["drafted"] > 0
