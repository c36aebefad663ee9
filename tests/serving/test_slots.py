"""Memories of slots come and go: each answer is its own memory's, before, during and after."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import oracle
from support.gate_oracle import random_gate
from vllm import SamplingParams

from vllm_memdec import slots
from vllm_memdec.compat.slots import running
from vllm_memdec.gate import write_gate

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=5)
PROMPTS = oracle.prompts(3, 20, 40, 1000)


@pytest.fixture(scope="module")
def models(tiny_model):
    return {
        "base": tiny_model("llama"),
        "law": tiny_model("llama", seed=1, hidden=96, layers=3),
        "one": tiny_model("llama", seed=2),
        "two": tiny_model("llama", seed=3),
    }


@pytest.fixture(scope="module")
def shape(models, tmp_path_factory):
    """Return a folder with the config of "one" and nothing else."""
    folder = tmp_path_factory.mktemp("shape")
    shutil.copy(Path(models["one"]) / "config.json", folder)
    return str(folder)


def settings(models, shape, count=2, **more):
    fixed = {"law": {"model": models["law"], "alpha": 0.6}}
    return {"memories": fixed, "slots": {"model": shape, "count": count}, **more}


def asked(llm, memory=None, **extra):
    """Return the answers of a memory to all prompts."""
    extra |= {"memdec_memory": memory} if memory else {}
    params = GREEDY.clone()
    params.extra_args = extra
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    return llm.generate(prompts, params, use_tqdm=False)


def worst(llm, models, name, folder, alpha):
    return max(
        oracle.gap(output, models["base"], models[folder], alpha)
        for output in asked(llm, name)
    )


def test_memories_come_and_go(models, shape, engine):
    """Names, weights, prefix cache and figures are of what is in the slot at that time."""
    with engine(models["base"], settings(models, shape), block_size=32) as llm:
        with pytest.raises(ValueError, match=r"memdec_memory must be one of \['law', 'none'\]"):
            asked(llm, "one")
        assert slots.list_memories(llm)["slots"] == [{"name": None, "running_requests": 0}] * 2
        slots.load_memory(llm, "bio", models["one"], alpha=0.4)
        assert worst(llm, models, "bio", "one", 0.4) < oracle.TOLERANCE
        assert worst(llm, models, None, "law", 0.6) < oracle.TOLERANCE
        slots.load_memory(llm, "med", models["two"], alpha=0.7)
        assert worst(llm, models, "med", "two", 0.7) < oracle.TOLERANCE
        assert worst(llm, models, "bio", "one", 0.4) < oracle.TOLERANCE
        with pytest.raises(ValueError, match="All 2 slots have a memory: unload one first"):
            slots.load_memory(llm, "more", models["one"], alpha=0.5)
        slots.unload_memory(llm, "bio")
        slots.unload_memory(llm, "med")
        with pytest.raises(ValueError, match="must be one of"):
            asked(llm, "bio")
        # The same name in the same slot, with other weights: no block of the cache is another's.
        slots.load_memory(llm, "bio", models["two"], alpha=0.4)
        assert worst(llm, models, "bio", "two", 0.4) < oracle.TOLERANCE
        [first, second] = slots.list_memories(llm)["slots"]
        assert first["name"] == "bio" and first["model"] == models["two"]
        assert len(first["fingerprint"]) == 64 and second["name"] is None
