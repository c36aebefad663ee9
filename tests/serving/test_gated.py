"""A memory's gate in the engine: weights token by token, against float64 models and gate."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from support import counters, oracle
from support.gate_oracle import gate_weights, random_gate

from vllm_memdec.checkpoint import MemoryBlock, tokenizer_fingerprint, write_block
from vllm_memdec.gate import FILE, write_gate
from vllm_memdec.request import Choices, check_extra_args

BLOCK = 32  # tokens that the prefix cache keeps or not; each prompt has one of them and more
PROMPTS = oracle.prompts(4, 36, 48, 1000)
# In prompts 8, 20 and 30 are passed, in answers some of the rest.
STEPS = [[0, 0.9], [8, 0.2], [20, 0.0], [30, 0.6], [38, 0.1], [45, 0.8]]
DRAFTED = "vllm:spec_decode_num_draft_tokens"
CHOICES = [  # arguments of a request, the memory that answers, the most that its gate may give
    (None, "law", 1.0),
    ({"memdec_alpha": "auto"}, "law", 1.0),
    ({"memdec_alpha": 0.4}, "law", 0.4),
    ({"memdec_alpha": 0}, "law", 0.0),
    ({"memdec_alpha": "alone"}, "law", [(0, 1.0)]),  # no gate either
    ({"memdec_memory": "bio"}, "bio", 0.7),
    ({"memdec_memory": "bio", "memdec_alpha": "auto"}, "bio", 1.0),
    ({"memdec_memory": "plain"}, "plain", [(0, 0.5)]),  # no gate: a fixed weight
    ({"memdec_memory": "steps"}, "steps", STEPS),  # no gate: a weight for each length of context
    ({"memdec_memory": "steps", "memdec_alpha": "auto"}, "steps", STEPS),
    ({"memdec_memory": "steps", "memdec_alpha": 0.9}, "steps", [(0, 0.9)]),  # is no cap
    ({"memdec_memory": "none"}, "law", 0.0),
]


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    """Return the folders: two memories with gates, one of format 2, and two without."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("gated")
    even = {"spread": 0.15}  # of the weights, see tiny_config(): a gate adds to float32's errors
    made = {"base": tiny_model("llama", **even), "plain": tiny_model("llama", seed=4, **even)}
    for seed, (name, kind, width) in enumerate((("law", "llama", 96), ("bio", "gpt2", 64)), 1):
        made[name] = str(folder / name)
        shutil.copytree(tiny_model(kind, seed=seed, hidden=width, **even), made[name])
        write_gate(folder / name, random_gate(width, seed, context=name == "law"))
    made["steps"] = str(folder / "steps")
    shutil.copytree(made["plain"], made["steps"])
    mark = tokenizer_fingerprint(AutoTokenizer.from_pretrained(made["steps"]))
    block = MemoryBlock(0.5, mark, "base", 1.0, alpha_by_context=STEPS)
    write_block(made["steps"], block)
    return made


def block(models, **more):
    alphas = {"law": {}, "bio": {"alpha": 0.7}, "plain": {"alpha": 0.5}, "steps": {}}
    # Without a memdec block of its own a memory's weight comes from its gate.
    memories = {name: {"model": models[name], **given} for name, given in alphas.items()}
    return {"memories": memories, "default": "law"} | more


def generate(llm, count=6, prompt_logprobs=3):
    from vllm import SamplingParams

    asked = [(p, *choice) for p in PROMPTS for choice in CHOICES]
    params = [
        SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, logprobs=5,
            prompt_logprobs=prompt_logprobs,
            extra_args=extra,
        )
        for _, extra, *_ in asked
    ]  # fmt: skip
    prompts = [{"prompt_token_ids": p} for p, *_ in asked]
    return asked, llm.generate(prompts, params, use_tqdm=False)


def test_a_reload_keeps_tables_where_graphs_read_them(engine, models):
    with engine(models["base"], block(models)) as llm:
        core = llm.llm_engine.engine_core.engine_core
        model = core.model_executor.driver_worker.worker.model_runner.get_model()
        [memory] = [memory for memory in model.memories if memory.table is not None]
        table = memory.table
        kept, places = table.parts_KP.clone(), (table.start_K.data_ptr(), table.parts_KP.data_ptr())
        table.parts_KP.zero_()  # as a deep sleep drops it
        memory.load_gate()
        table = memory.table
        assert (table.start_K.data_ptr(), table.parts_KP.data_ptr()) == places
        assert kept.equal(table.parts_KP)


@pytest.mark.feature("a gate's weight for each token")
def test_gated_mixtures(engine, models):
    spread = []
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64}
    cache = {"enable_prefix_caching": True, "block_size": BLOCK}
    with engine(models["base"], block(models), **cache, **chunks) as llm:
        asked, outputs = generate(llm)
        # Asked for log-probabilities of prompts, vLLM reads no cache.
        again = generate(llm, prompt_logprobs=None)[1]
    assert all(output.num_cached_tokens == BLOCK for output in again)  # rows begin in the middle
    for first, second in zip(outputs, again, strict=True):
        assert second.outputs[0].token_ids == first.outputs[0].token_ids
    outputs = [*outputs, *again]
    asked = [*asked, *asked]
    for (_, _, name, cap), output in zip(asked, outputs, strict=True):
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        alpha_T1 = gate_weights(models, name, cap, ids)
        error = oracle.gap(output, models["base"], models[name], alpha_T1)
        assert error < oracle.TOLERANCE, (name, cap)
        if cap == 1:
            spread += alpha_T1.flatten().tolist()
    assert min(spread) < 0.2 and max(spread) > 0.8  # or the gates would not be seen


@pytest.mark.drafts
@pytest.mark.feature("a gate's weight for each token")
def test_drafting_changes_no_gated_answer(engine, models):
    """What is verified is the gated mixture."""
    answers = []
    for tokens in (0, 3, "auto"):
        settings = block(models, speculative_tokens=tokens)
        before = counters.read()
        by_request = {"per_request_spec_decode_metrics": "summary"} if tokens else {}
        with engine(models["base"], settings, disable_log_stats=False, **by_request) as llm:
            from vllm import SamplingParams

            params = [
                SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, extra_args=extra)
                for extra, *_ in CHOICES
            ]
            prompts = [{"prompt_token_ids": PROMPTS[0]} for _ in CHOICES]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            answers.append([list(output.outputs[0].token_ids) for output in outputs])
            drafted = sum(m.value for m in llm.get_metrics() if m.name == DRAFTED)
        assert answers[-1] == answers[0]
        assert bool(drafted) == bool(tokens)
        check_counters(models, outputs, counters.grown(before), drafted)


def check_counters(models, outputs, grown, drafted):
    """Compare rows, weights and drafts of each memory with those of its requests."""
    rows, weights, made, accepted = Counter(), Counter(), Counter(), Counter()
    for (_, name, cap), output in zip(CHOICES, outputs, strict=True):
        if not cap:
            continue
        answer = output.outputs[0]
        drafts, kept = counters.drafts(answer)
        rows[name] += len(answer.token_ids) - kept + drafts
        made[name] += drafts
        accepted[name] += kept
        ids = [*output.prompt_token_ids, *answer.token_ids]
        if not drafts:  # those that were refused had a weight, too
            alpha_T1 = gate_weights(models, name, cap, ids)
            weights[name] += alpha_T1[len(output.prompt_token_ids) - 1 : -1].sum().item()
    assert grown["mixed_rows"] == rows
    assert sum(made.values()) == drafted
    for figure, wanted in (("draft_tokens", made), ("accepted_draft_tokens", accepted)):
        assert grown.get(figure, {}) == {name: n for name, n in wanted.items() if n}
    given = grown["mixed_weight"]
    assert all(0 < given[name] < rows[name] for name in rows)
    assert given["plain"] == 0.5 * rows["plain"]
    if not drafted:
        assert given == pytest.approx(weights, abs=oracle.TOLERANCE)
    assert set(grown["memory_seconds"]) == set(grown["mixing_seconds"]) == set(rows)


def test_weights_that_are_not_loaded(engine, models):
    """--load-format dummy, as for timing shapes, loads no weights; gates are there all the same."""
    for settings in (block(models), {"model": models["plain"], "alpha": 0.5}):
        with engine(models["base"], settings, load_format="dummy") as llm:
            _, [output, *_] = generate_plain(llm)
        assert len(output.outputs[0].token_ids) > 0


def test_a_gate_that_is_switched_off(engine, models):
    settings = {"model": models["law"], "alpha": 0.3, "gate": False}
    with engine(models["base"], settings) as llm:
        _, [output, *_] = generate_plain(llm)
    assert oracle.gap(output, models["base"], models["law"], 0.3) < oracle.TOLERANCE


def generate_plain(llm):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3)
    return None, llm.generate([{"prompt_token_ids": PROMPTS[0]}], params, use_tqdm=False)


@pytest.fixture
def start(models):
    from vllm import EngineArgs

    def run(settings):
        args = EngineArgs(
            models["base"],
            model_impl="memdec",
            additional_config={"memdec": settings},
            dtype="float32",
        )
        return args.create_engine_config()

    return run


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:300]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: np.save(path.open("wb"), np.zeros(3)), "cannot be read"),
        (
            lambda path: write_gate(path.parent, random_gate(96, 0) | {"b2": np.array("much")}),
            "cannot be read",
        ),
        (lambda path: np.savez(path, format_version=np.array(9)), "gate format version 9"),
        (
            lambda path: write_gate(path.parent, random_gate(96, 0) | {"context": np.zeros(3)}),
            "is not a whole gate",
        ),
        (
            lambda path: write_gate(
                path.parent, random_gate(96, 0) | {"memory": np.array("other")}
            ),
            'trained for other weights .* run memdec calibrate again, or serve with "gate": false',
        ),
        (lambda path: np.savez(path, w1=np.zeros((2, 2))), "gate format version None"),
        (lambda path: write_gate(path.parent, random_gate(64, 0)), "for a memory of width 64"),
        (
            lambda path: write_gate(path.parent, random_gate(96, 0) | {"b1": np.zeros(3)}),
            "is not a whole gate",
        ),
        (
            lambda path: write_gate(path.parent, random_gate(96, 0) | {"certainty": np.zeros(4)}),
            "is not a whole gate",
        ),
        (
            lambda path: write_gate(
                path.parent, random_gate(96, 0) | {"certainty": np.zeros((4, 0))}
            ),
            "is not a whole gate",
        ),
        (
            lambda path: write_gate(path.parent, random_gate(96, 0) | {"b2": np.array(np.nan)}),
            "is not a whole gate",
        ),
        (lambda path: path.unlink(), "has no memdec block, so it has no default weight"),
    ],
)
def test_a_broken_gate_stops_the_start(models, start, tmp_path, change, sentence):
    folder = tmp_path / "memory"
    shutil.copytree(models["law"], folder)
    change(folder / FILE)
    with pytest.raises(ValueError, match=sentence):
        start({"model": str(folder)})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"alpha": "auto"}, "'auto' needs a gate or alpha_by_context, which .* has not"),
        ({"alpha": 0.5, "gate": True}, "has no gate: run memdec calibrate"),
        ({"alpha": 0.5, "gate": 1}, "'gate' must be of type bool"),
        ({"alpha": "much"}, "memdec alpha must be a number between 0 and 1"),
    ],
)
def test_a_gate_that_is_not_there(models, start, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        start({"model": models["plain"], **settings})


def test_the_gate_goes_before_the_calibrated_weight(models, tmp_path):
    """A memory of `memdec build` has a default weight; its gate takes its place."""
    from transformers import AutoTokenizer

    from vllm_memdec.config import MemoryConfig

    folder = tmp_path / "memory"
    shutil.copytree(models["law"], folder)
    mark = tokenizer_fingerprint(AutoTokenizer.from_pretrained(folder))
    write_block(folder, MemoryBlock(0.6, mark, "base", 1.0))
    for given, alpha, gated in (({}, "auto", True), ({"gate": False}, 0.6, False)):
        found = MemoryConfig.parse("memory", {"model": str(folder), **given})
        assert (found.alpha, found.gate) == (alpha, gated)


def test_a_gate_of_before_is_served_with_a_warning(models, start, tmp_path, monkeypatch):
    """One that does not say which weights it was trained for."""
    told, folder = [], tmp_path / "memory"
    monkeypatch.setattr("vllm_memdec.startup.warn", told.append)
    shutil.copytree(models["law"], folder)
    np.savez(folder / FILE, format_version=np.array(2), **random_gate(96, 0, context=False))
    start({"model": str(folder)})
    start({"model": models["law"]})
    [warning] = told
    assert f"{folder / FILE} does not say which weights it was trained for" in warning


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ([], "pairs that ascend from position 0"),
        ([[0]], "pairs that ascend"),
        ([0, 0.5], "pairs that ascend"),
        ("much", "pairs that ascend"),
        ([[True, 0.5]], "pairs that ascend"),
        ([[1, 0.5]], "pairs that ascend"),
        ([[0, 0.5], [8.5, 0.2]], "pairs that ascend"),
        ([[0, 0.5], [64, 0.2], [64, 0.1]], "pairs that ascend"),
        ([[0, 0.5], [1 << 63, 0.2]], "pairs that ascend"),
        ([[0, 1.5]], "a number between 0 and 1"),
        ([[0, "x"]], "a number between 0 and 1"),
    ],
)
def test_a_broken_table_stops_the_start(models, start, tmp_path, table, sentence):
    folder = tmp_path / "memory"
    shutil.copytree(models["steps"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["memdec"]["alpha_by_context"] = table
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=sentence):
        start({"model": str(folder)})


def test_weights_by_context_of_a_server(models, tmp_path):
    """`memdec alpha` prints them for another base: they take the place of the memory's own."""
    from vllm_memdec.config import MemoryConfig

    table = [[0, 0.5], [256, 0.1]]
    for name in ("law", "steps"):
        found = MemoryConfig.parse("m", {"model": models[name], "alpha_by_context": table})
        assert (found.alpha, found.gate, found.alpha_by_context) == ("auto", False, table)
    found = MemoryConfig.parse("m", {"model": models["steps"], "alpha": 0.3})
    assert found.alpha == 0.3 and found.alpha_by_context == STEPS  # for requests that say "auto"
    for more, sentence in (
        ({"gate": True}, "takes the place of a gate"),
        ({"alpha_by_context": [[5, 0.1]]}, "pairs that ascend"),
        ({"alpha_by_context": "auto"}, "must be of type list"),
    ):
        settings = {"model": models["law"], "alpha_by_context": table} | more
        with pytest.raises(ValueError, match=sentence):
            MemoryConfig.parse("m", settings)


def test_a_weight_that_is_asked_for_is_no_cap():
    choices = Choices({"steps": "auto", "law": "auto"}, "steps", {"law"}, by_context={"steps"})
    found = [choices.resolve(args)[0][1] for args in (
        {}, {"memdec_alpha": 0.4}, {"memdec_memory": "law", "memdec_alpha": 0.4},
        {"memdec_memory": "law", "memdec_alpha": "alone"}, {"memdec_alpha": "alone"},
    )]  # fmt: skip
    assert found == [-1.0, 0.4, -0.4, 1.0, 1.0]
    for weight in ("auto", "alone"):
        check_extra_args({"memdec_alpha": weight}, choices)
