"""Tensor parallelism 2, over gloo: the answers of one rank, whole or split memories."""

import pytest
from support import oracle, two_ranks

GENERATE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    llm = LLM(**job["llm"], worker_extension_cls="support.ranks.Rank")
    llm.collective_rpc("disturb")
    params = [
        SamplingParams(**job["sampling"], extra_args=extra) for _, extra in job["requests"]
    ]
    prompts = [{"prompt_token_ids": ids} for ids, _ in job["requests"]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    print(json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
    print(json.dumps(llm.collective_rpc("seen")))
"""
SAMPLING = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
CHOICES = (
    {},
    {"memdec_memory": "whole"},
    {"memdec_memory": "none"},
    {"memdec_alpha": 1},
    {"memdec_memory": "whole", "memdec_alpha": 1},
    {"memdec_memory": {"split": 0.3, "whole": 0.4}},
)


@pytest.mark.feature(
    "tensor parallel 2", note='a memory may be split or, `"tensor_parallel_size": 1`, whole'
)
def test_two_ranks_answer_like_one(tiny_model, engine, subprocess_env):
    """Also where the second computes its whole memory otherwise, as other kernels might."""
    from vllm import SamplingParams

    memories = {
        "split": {"model": tiny_model("llama", seed=1, hidden=128), "alpha": 0.6},
        # Three heads do not divide by two.
        "whole": {"model": tiny_model("llama", seed=2, hidden=96, layers=3), "alpha": 0.5},
    }
    memories["whole"]["tensor_parallel_size"] = 1
    block = {"memories": memories, "default": "split", "at_once": 2}
    prompts = oracle.prompts(50, 3, 40, 1000)
    requests = [(ids, CHOICES[i % len(CHOICES)]) for i, ids in enumerate(prompts)]
    with engine(tiny_model("llama"), block) as llm:
        one = llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in requests],
            [SamplingParams(**SAMPLING, extra_args=extra) for _, extra in requests],
            use_tqdm=False,
        )
    job = {"sampling": SAMPLING, "requests": requests}
    two, seen = two_ranks.run(GENERATE, tiny_model("llama"), block, job, subprocess_env)
    assert len(seen[0]) > 20 and seen[0] == seen[1], "ranks went on from different bits"
    assert len(two) == 50 and two == [list(output.outputs[0].token_ids) for output in one]
