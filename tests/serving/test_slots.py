"""Memories of slots come and go: each answer is its own memory's, before, during and after."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import counters, oracle, two_ranks, variants
from support.gate_oracle import gate_weights, random_gate
from vllm import EngineArgs, SamplingParams

from vllm_memdec import slots, startup
from vllm_memdec.config import MemDecConfig
from vllm_memdec.gate import FILE, UNITS, write_gate

TWO_RANKS = """
import json, sys
from vllm import LLM, SamplingParams
from vllm_memdec import slots

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    llm = LLM(**job["llm"])
    params = SamplingParams(
        temperature=0, max_tokens=3, ignore_eos=True, extra_args={"memdec_memory": "it"}
    )
    found = []
    for folder, alpha in job["loads"]:
        try:
            slots.load_memory(llm, "it", folder, alpha=alpha)
        except ValueError as error:
            found.append(str(error))
            continue
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in job["prompts"]], params, use_tqdm=False
        )
        found.append([list(o.outputs[0].token_ids) for o in outputs])
        slots.unload_memory(llm, "it")
    print(json.dumps(found))
"""
PROMPTS = oracle.prompts(3, 40, 70, 1000)  # of a whole block of the prefix cache, and more
CACHED = [32 * ((len(prompt) - 1) // 32) for prompt in PROMPTS]
STEPS = [[0, 0.9], [20, 0.1], [45, 0.6]]
FEATURE = pytest.mark.feature("memories that come and go while it runs")
even = {"spread": 0.15}  # of the weights, see tiny_config(): a gate adds to float32's errors


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    """Return the folders: a base, a memory of the settings, and those of the slots' shape."""
    folder = tmp_path_factory.mktemp("slots")
    made = {"base": tiny_model("llama", **even)}
    made["law"] = tiny_model("llama", seed=1, hidden=96, layers=3, **even)
    made["one"] = tiny_model("llama", seed=2, **even)
    made["two"] = tiny_model("llama", seed=3, **even)
    for seed, name in enumerate(("gated", "also gated")):
        made[name] = shutil.copytree(tiny_model("llama", seed=4 + seed, **even), folder / name)
        write_gate(made[name], random_gate(64, seed, context=name == "gated"))
    (folder / "shape").mkdir()  # a config and no weights
    made["shape"] = shutil.copy(Path(made["one"]) / "config.json", folder / "shape")
    made["shape"] = Path(made["shape"]).parent
    return {name: str(path) for name, path in made.items()}


def settings(models, count=2, **more):
    fixed = {"law": {"model": models["law"], "alpha": 0.6}}
    return {"memories": fixed, "slots": {"model": models["shape"], "count": count}, **more}


def answers(llm, memory=None, prompts=PROMPTS, **extra):
    extra |= {"memdec_memory": memory} if memory else {}
    params = SamplingParams(
        temperature=0, max_tokens=6, ignore_eos=True, logprobs=5, extra_args=extra
    )
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def worst(llm, models, name, folder, weight, **extra):
    """Return the largest error of a memory's answers; weight: a number, table, or a gate's cap."""
    found = []
    for output in answers(llm, name, **extra):
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        alpha_T1 = weight
        if not isinstance(weight, float) or folder in ("gated", "also gated"):
            alpha_T1 = gate_weights(models, folder, weight, ids)
        found.append(oracle.gap(output, models["base"], models[folder], alpha_T1))
    return max(found)


def check(llm, models, name, folder, weight, **extra):
    assert worst(llm, models, name, folder, weight, **extra) < oracle.TOLERANCE


def of_several(models, shares, ids):
    """Return log p [T, V] in float64 of memories that share rows; shares: of each, by folder."""
    mixed_TV, rest = 0, 1
    for folder, share in shares.items():
        mixed_TV = mixed_TV + share * oracle.log_probs(models[folder], ids).exp()
        rest = rest - share
    return (mixed_TV + rest * oracle.log_probs(models["base"], ids).exp()).log()


@FEATURE
def test_one_of_several_in_a_request(models, engine):
    """By weights of its own, beside a memory of the settings, and by all gates that are there."""
    options = {"block_size": 32, "enable_prefix_caching": True}
    with engine(models["base"], settings(models, at_once=2), **options) as llm:

        def error(memory, shares):
            found = []
            for output in answers(llm, memory):
                prompt, own = output.prompt_token_ids, output.outputs[0]
                ids = [*prompt, *own.token_ids]
                rows = [{t: entry.logprob for t, entry in row.items()} for row in own.logprobs]
                key_TV = of_several(models, shares(ids) if callable(shares) else shares, ids)
                found.append(oracle.worst_row(prompt, own.token_ids, [], rows, key_TV))
            return max(found)

        def both(ids):
            """Return the shares of the two gates: the second takes its part of what is left."""
            one, two = (gate_weights(models, f, 1.0, ids) for f in ("gated", "also gated"))
            two = 0.999 * ((two / 0.999).logit() + (1 - one).log()).sigmoid()
            return {"gated": one * (1 - two), "also gated": two}

        slots.load_memory(llm, "bio", models["one"], alpha=0.4)
        asked = {"bio": 0.5, "law": 0.3}
        assert error(asked, {"one": 0.5, "law": 0.3}) < oracle.TOLERANCE
        slots.unload_memory(llm, "bio")
        with pytest.raises(ValueError, match="has a weight for 'bio', which is none of"):
            answers(llm, asked)
        slots.load_memory(llm, "bio", models["two"], alpha=0.4)
        assert [output.num_cached_tokens for output in answers(llm, asked)] == [0, 0, 0]
        assert error(asked, {"two": 0.5, "law": 0.3}) < oracle.TOLERANCE
        slots.unload_memory(llm, "bio")
        slots.load_memory(llm, "bio", models["gated"])
        with pytest.raises(ValueError, match="this server has 1 with a gate"):
            answers(llm, "auto")
        slots.load_memory(llm, "med", models["also gated"])
        assert error("auto", both) < oracle.TOLERANCE
        running = slots.list_memories(llm)["slots"]
        assert [slot["running_requests"] for slot in running] == [0, 0]


def test_no_more_gates_than_all_requests_may_mix(models, engine):
    fixed = {name: {"model": models[name]} for name in ("gated", "also gated")}
    fixed = {name.replace(" ", "-"): each for name, each in fixed.items()}
    block = settings(models, 1, memories=fixed, default="auto", at_once=2)
    with engine(models["base"], block) as llm:
        with pytest.raises(ValueError, match="'auto' means .* may mix 2 of 3"):
            slots.load_memory(llm, "third", shutil.copytree(models["gated"], models["gated"] + "3"))
        slots.load_memory(llm, "bio", models["one"], alpha=0.4)
        check(llm, models, "bio", "one", 0.4)


@FEATURE
def test_memories_come_and_go(models, engine):
    """Names, weights, gates, prefix cache and figures are of what is in a slot at that time."""
    with engine(models["base"], settings(models), block_size=32, enable_prefix_caching=True) as llm:
        with pytest.raises(ValueError, match=r"memdec_memory must be one of \['law', 'none'\]"):
            answers(llm, "bio")
        for name in ("slot 0", "slot 1"):
            with pytest.raises(ValueError, match="must be one of"):
                answers(llm, name)
        with pytest.raises(ValueError, match="Unknown extra argument 'memdec_settled'"):
            answers(llm, memdec_settled=[1, 0.5])
        empty = {"name": None, "running_requests": 0}
        assert slots.list_memories(llm)["slots"] == [empty, empty]
        slots.load_memory(llm, "bio", models["one"], alpha=0.4)
        check(llm, models, "bio", "one", 0.4)
        check(llm, models, "bio", "one", 0.8, memdec_alpha=0.8)
        check(llm, models, None, "law", 0.6)
        slots.load_memory(llm, "med", models["gated"])
        check(llm, models, "med", "gated", 1.0)
        check(llm, models, "med", "gated", 0.3, memdec_alpha=0.3)
        check(llm, models, "bio", "one", 0.4)
        with pytest.raises(ValueError, match="All 2 slots have a memory: unload one first"):
            slots.load_memory(llm, "more", models["one"], alpha=0.5)

        for name in ("bio", "med"):
            assert slots.unload_memory(llm, name) == f"Success: memory {name!r} unloaded."
            with pytest.raises(ValueError, match="must be one of"):
                answers(llm, name)
        # The same name in the same slot, with other weights: no block of the cache is another's.
        slots.load_memory(llm, "bio", models["two"], alpha=0.4)
        assert [output.num_cached_tokens for output in answers(llm, "bio")] == [0, 0, 0]
        check(llm, models, "bio", "two", 0.4)
        # In the place of a gate a number, a table, another gate.
        for folder, own, weight in (
            ("two", {"alpha": 0.7}, 0.7),
            ("one", {"alpha_by_context": STEPS}, STEPS),
            ("also gated", {}, 1.0),
            ("two", {"alpha": 0.2}, 0.2),
            ("one", {"alpha_by_context": STEPS[:2]}, STEPS[:2]),
        ):
            before = counters.read()
            slots.load_memory(llm, "med", models[folder], **own)
            check(llm, models, "med", folder, weight)
            check(llm, models, "bio", "two", 0.4)
            assert llm.llm_engine.log_stats or counters.grown(before) == {}
            slots.unload_memory(llm, "med")
        # What was there before may be read again, its blocks too.
        slots.unload_memory(llm, "bio")
        slots.load_memory(llm, "bio", models["one"], alpha=0.4)
        assert [output.num_cached_tokens for output in answers(llm, "bio")] == CACHED
        check(llm, models, "bio", "one", 0.4)
        [first, second] = slots.list_memories(llm)["slots"]
        assert first["name"] == "bio" and first["model"] == models["one"] and second == empty
        assert len(first["fingerprint"]) == 64
        with pytest.raises(ValueError, match="is of the server's settings, not in a slot"):
            slots.unload_memory(llm, "law")
        with pytest.raises(slots.UnknownMemory, match="No slot has a memory 'nobody'"):
            slots.unload_memory(llm, "nobody")


def changed(folder, target, change):
    """Return a copy of a folder whose tensors are changed."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def broken(models, tiny_model, folder):
    """Yield folders that cannot be loaded, other arguments, and what the refusal says."""
    one = models["one"]
    cut = shutil.copytree(one, folder / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    yield cut, {}, r"cut cannot be read \(SafetensorError: .*\): copy it again\.$"
    none = shutil.copytree(one, folder / "none")
    (none / "model.safetensors").unlink()
    yield none, {}, r"none cannot be read \(\w+: .*\): copy it again\.$"
    less = changed(one, folder / "less", lambda t: t.pop("model.norm.weight"))
    yield less, {}, r"less is not whole: it has no, or only a part of, model.norm.weight"
    name = "model.layers.1.self_attn.v_proj.weight"  # of a matrix that vLLM has in one
    part = changed(one, folder / "part", lambda t: t.pop(name))
    yield part, {}, r"or only a part of, model.layers.1.self_attn.qkv_proj.weight"
    small = changed(one, folder / "small", lambda t: t.update({name: t[name][:, :32].clone()}))
    yield small, {}, r"small cannot be read \(\w+: .*\): copy it again\.$"
    wrong = changed(one, folder / "wrong", lambda t: t["model.norm.weight"].fill_(np.nan))
    yield wrong, {}, r"wrong is not whole: it has no, or only a part of, model.norm.weight"
    yield (
        tiny_model("llama", seed=2, tokenizer=7, **even),
        {},
        "has another tokenizer than the base",
    )
    yield models["law"], {}, r"has not the shape of the slots: its \w+ is .*, theirs .*\. Start"
    yield tiny_model("gpt2", **even), {}, "has not the shape of the slots"
    int8 = variants.quantised(one, folder / "int8")
    yield int8, {}, "has not the shape of the slots: its quantization_config"
    gate = shutil.copytree(models["gated"], folder / "gate")
    (gate / FILE).write_bytes(b"much")
    yield gate, {}, f"gate/{FILE} cannot be read"
    other = shutil.copytree(one, folder / "other")
    shutil.copy(Path(models["gated"]) / FILE, other)
    yield other, {}, "was trained for other weights than those beside it"
    yield folder / "nowhere", {}, "is not a model folder"
    yield one, {"alpha": None}, "has no memdec block, so it has no default weight"
    yield one, {"alpha": 2}, "must be a number between 0 and 1"
    yield one, {"dtype": "bfloat16"}, "'dtype' is the slot's own"
    yield one, {"name": "law"}, "The memory 'law' is there already"
    yield one, {"name": "bio"}, "The memory 'bio' is there already"
    yield one, {"name": "none"}, "A memory cannot be called 'none'"
    yield one, {"served_as": "bio"}, "The model 'bio' would be both"
    yield one, {"alpha_by_context": [[n, 0.1] for n in range(65)]}, "at most 64 pairs"


def test_a_load_that_fails_leaves_all_as_it_was(models, tiny_model, engine, tmp_path):
    block = settings(models, default="law")
    with engine(models["base"], block, block_size=32) as llm:
        slots.load_memory(llm, "bio", models["gated"])
        before = slots.list_memories(llm)
        for folder, own, sentence in broken(models, tiny_model, tmp_path):
            own = {"name": "new", "alpha": 0.5} | own
            with pytest.raises(ValueError, match=sentence) as refusal:
                slots.load_memory(llm, own.pop("name"), str(folder), **own)
            assert "\n" not in str(refusal.value)
            assert slots.list_memories(llm) == before
        check(llm, models, "bio", "gated", 1.0)
        check(llm, models, None, "law", 0.6)
        slots.load_memory(llm, "new", models["two"], alpha=0.5)
        check(llm, models, "new", "two", 0.5)


@FEATURE
@pytest.mark.drafts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memories_of_slots_draft(dtype, models, engine):
    """As those of a server that has them from the start, in the dtype's own rounding."""
    drafting = {"speculative_tokens": 3, "default": "none"}
    fixed = {"one": {"model": models["one"], "alpha": 0.7}, "two": {"model": models["two"]}}
    fixed["two"]["alpha"] = 0.4
    options = {"dtype": dtype, "block_size": 32}
    with engine(models["base"], {"memories": fixed, **drafting}, **options) as llm:
        wanted = {name: tokens(llm, name) for name in fixed}
    slot = {"slots": {"model": models["shape"], "count": 1}}
    with engine(models["base"], slot | drafting, disable_log_stats=False, **options) as llm:
        for name in ("one", "two", "one"):
            slots.load_memory(llm, "it", models[name], alpha=fixed[name]["alpha"])
            assert tokens(llm, "it") == wanted[name]
            slots.unload_memory(llm, "it")
        [accepted] = [
            metric.value
            for metric in llm.get_metrics()
            if metric.name == "vllm:spec_decode_num_accepted_tokens"
        ]
    assert accepted > 0


def tokens(llm, name):
    return [list(output.outputs[0].token_ids) for output in answers(llm, name)]


def test_running_requests_keep_their_memory(models, engine):
    """Also where its name is another's meanwhile; the slot is free once the last has ended."""
    block = settings(models, default="none")
    with engine(models["base"], block, block_size=32) as llm, pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "PATIENCE", 0.1)
        slots.load_memory(llm, "it", models["one"], alpha=0.7)
        core, params = llm.llm_engine, SamplingParams(
            temperature=0, max_tokens=8, ignore_eos=True, logprobs=5,
            extra_args={"memdec_memory": "it"},
        )  # fmt: skip
        for number, prompt in enumerate(PROMPTS):
            core.add_request(str(number), {"prompt_token_ids": prompt}, params)
        core.step()
        slots.unload_memory(llm, "it")
        assert [s["running_requests"] for s in slots.list_memories(llm)["slots"]] == [3, 0]
        slots.load_memory(llm, "it", models["two"], alpha=0.3)  # into the other slot
        core.add_request("new", {"prompt_token_ids": PROMPTS[0]}, params)
        slots.unload_memory(llm, "it")
        with pytest.raises(ValueError, match="still run in all free slots: load again when"):
            slots.load_memory(llm, "it", models["two"], alpha=0.3)
        ended = {}
        while core.has_unfinished_requests():
            ended |= {each.request_id: each for each in core.step() if each.finished}
        for name, folder, alpha in (("0", "one", 0.7), ("2", "one", 0.7), ("new", "two", 0.3)):
            gap = oracle.gap(ended[name], models["base"], models[folder], alpha)
            assert gap < oracle.TOLERANCE, name
        slots.load_memory(llm, "it", models["two"], alpha=0.3)
        check(llm, models, "it", "two", 0.3)
        core.add_request("aborted", {"prompt_token_ids": PROMPTS[0]}, params)
        core.step()
        slots.unload_memory(llm, "it")
        core.abort_request(["aborted"])
        assert [s["running_requests"] for s in slots.list_memories(llm)["slots"]] == [0, 0]


def test_a_slot_waits_for_requests_on_their_way(models, engine):
    """They may have been given it before it was emptied, and the engine does not know of them."""
    with engine(models["base"], settings(models, 1)) as llm, pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "PATIENCE", 0.1)
        slots.load_memory(llm, "it", models["one"], alpha=0.7)
        with slots.adding(llm.llm_engine):
            slots.unload_memory(llm, "it")
            with pytest.raises(ValueError, match="still run in all free slots"):
                slots.load_memory(llm, "it", models["two"], alpha=0.3)
        slots.load_memory(llm, "it", models["two"], alpha=0.3)
        slots.unload_memory(llm, "it")
        with slots.adding(llm.llm_engine):  # later ones cannot have it
            slots.load_memory(llm, "it", models["one"], alpha=0.7)


def test_a_gate_to_come_is_part_of_dummy_runs_alone(models, engine):
    """For in them kernels are compiled."""
    with engine(models["base"], settings(models, 1)) as llm:
        core = llm.llm_engine.engine_core.engine_core
        model = core.model_executor.driver_worker.worker.model_runner.get_model()
        fixed, slot = model.memories
        rows_NA = torch.zeros(2, model.batch.columns_TA.shape[1])
        model.batch.reset()
        score_N, certainty_4K = slot.score(torch.zeros(2, slot.width), rows_NA)
        assert score_N.tolist() == [0, 0] and certainty_4K.shape == (4, UNITS)
        assert fixed.score(torch.zeros(2, fixed.width), rows_NA) is None
        model.batch.write(torch.tensor([1]), torch.tensor([0.5]), torch.tensor([2]))
        assert slot.score(torch.zeros(2, slot.width), rows_NA) is None


def test_two_ranks_have_all_of_a_memory_or_nothing(
    models, tiny_model, engine, subprocess_env, tmp_path
):
    """Tensor parallel 2: each rank reads its part; the answers of one rank."""
    wide = {"hidden": 128, **even}
    shape, other = tiny_model("llama", seed=2, **wide), tiny_model("llama", seed=3, **wide)
    cut = changed(shape, tmp_path / "cut", lambda tensors: tensors.pop("model.norm.weight"))
    block = {"slots": {"model": shape, "count": 1}}
    loads = [(shape, 0.6), (str(cut), 0.5), (other, 0.4)]
    found = []
    with engine(models["base"], block) as llm:
        for folder, alpha in (loads[0], loads[2]):
            slots.load_memory(llm, "it", folder, alpha=alpha)
            found.append([tokens(llm, "it")[0][:3]])
            slots.unload_memory(llm, "it")
    job = {"loads": loads, "prompts": PROMPTS[:1]}
    [lines] = two_ranks.run(TWO_RANKS, models["base"], block, job, subprocess_env)
    first, refusal, last = lines
    assert [first, last] == found and "is not whole" in refusal


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"count": 2}, "'model' must be a text"),
        ({"model": "X", "count": 0}, "must be the folder whose shape they have and their number"),
        (
            {"model": "X", "count": True},
            "must be the folder whose shape they have and their number",
        ),
        ("X", "must be the folder whose shape they have and their number"),
        ({"model": "X", "count": 1, "alpha": 0.5}, "Unknown setting 'alpha' of memdec 'slots'"),
        ({"model": "X", "count": 256}, "at most 256 memories, got 257"),
        ({"model": "X", "count": 300}, "at most 256 memories, got 300"),
    ],
)
def test_wrong_settings(given, sentence, models):
    block = {"memories": {"law": {"model": models["law"], "alpha": 0.6}}, "slots": given}
    with pytest.raises(ValueError, match=sentence):
        MemDecConfig.parse(block)


def test_memories_may_be_absent_beside_slots(models):
    slot = {"model": models["shape"], "count": 2}
    for block in ({"slots": slot}, {"slots": slot, "memories": {}}):
        config = MemDecConfig.parse(block)
        assert config.default == "none" and config.memories == () and len(config.slots) == 2
    config = MemDecConfig.parse({"slots": slot, "model": models["law"], "alpha": 0.5})
    assert config.default == "memory" and len(config.built) == 3
    with pytest.raises(ValueError, match='"memories" must be an object of at least one'):
        MemDecConfig.parse({"slots": slot, "memories": []})


@pytest.mark.parametrize(
    ("options", "more", "sentence"),
    [
        ({"data_parallel_size": 2}, {}, "do not work with data parallelism yet"),
        ({"worker_extension_cls": "a.B"}, {}, "need --worker-extension-cls themselves"),
        ({"_api_process_count": 2}, {}, "Several API servers would not learn"),
        ({"tensor_parallel_size": 2}, {"tensor_parallel_size": 1}, "do not work beside a memory"),
    ],
)
def test_refused_at_start(options, more, sentence, models):
    block = settings(models)
    block["memories"]["law"] |= more
    args = EngineArgs(
        models["base"], model_impl="memdec", additional_config={"memdec": block}, **options
    )
    with pytest.raises(ValueError, match=sentence):
        args.create_engine_config()


def test_quantised_slots_are_refused_at_start(models, tmp_path):
    int8 = variants.quantised(models["one"], tmp_path / "int8")
    args = EngineArgs(
        models["base"],
        model_impl="memdec",
        additional_config={"memdec": {"slots": {"model": int8, "count": 1}}},
    )
    with pytest.raises(ValueError, match="hold no quantised memories yet"):
        args.create_engine_config()


def test_a_server_with_slots_does_not_sleep():
    """The check alone: on a CPU vLLM itself refuses to."""
    args = SimpleNamespace(data_parallel_size=1, tensor_parallel_size=1, enable_sleep_mode=True)
    with pytest.raises(ValueError, match="do not work with --enable-sleep-mode"):
        startup.check_slot(SimpleNamespace(quantization=None), None, args)
