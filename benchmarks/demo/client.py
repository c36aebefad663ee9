"""A client that asks a served memory for facts, and the share of answers that are right."""

from collections.abc import Callable
from typing import Any

import numpy as np
from openai import OpenAI

from benchmarks.corpora.factbook import Fact
from vllm_memdec.train.model.devices import products

DTYPE = products("bfloat16")
SERVER_OPTIONS = ("--dtype", DTYPE, "--max-model-len", "1024", "--enforce-eager")
ANSWER_TOKENS = 32


class Client:
    """Asks the server for greedy answers and for probabilities of given answers."""

    def __init__(self, address: str, tokenizer: Callable[[str], Any]) -> None:
        self.client = OpenAI(base_url=address, api_key="none", timeout=600)
        self.model = self.client.models.list().data[0].id
        self.tokenizer = tokenizer

    def answers(self, facts: list[Fact], alpha: float | None) -> list[str]:
        """Return the first written line of each greedy answer; alpha None: the memory's own."""
        reply = self.client.completions.create(
            model=self.model,
            prompt=[fact.prompt for fact in facts],
            max_tokens=ANSWER_TOKENS,
            temperature=0,
            extra_body={} if alpha is None else {"vllm_xargs": {"memdec_alpha": alpha}},
        )
        by_prompt = sorted(reply.choices, key=lambda choice: choice.index)
        # A model may begin with an empty line: its answer is what it writes after that.
        return [(c.text.strip().splitlines() or [""])[0].strip() for c in by_prompt]

    def probabilities(self, facts: list[Fact], alpha: float | None) -> list[float]:
        """Return the probability of each fact's whole value after its prompt."""
        extra: dict[str, Any] = {"prompt_logprobs": 0}
        if alpha is not None:
            extra["vllm_xargs"] = {"memdec_alpha": alpha}
        ids = [self.tokenizer(fact.line)["input_ids"] for fact in facts]
        known = [len(self.tokenizer(fact.prompt)["input_ids"]) for fact in facts]
        reply = self.client.completions.create(
            model=self.model, prompt=ids, max_tokens=1, temperature=0, extra_body=extra
        )
        values = []
        for choice in sorted(reply.choices, key=lambda choice: choice.index):
            start = known[choice.index]
            scored = zip(choice.prompt_logprobs[start:], ids[choice.index][start:], strict=True)
            values.append(float(np.exp(sum(row[str(token)]["logprob"] for row, token in scored))))
        return values


def recall(facts: list[Fact], answers: list[str]) -> float:
    """Return the share of facts whose value was answered exactly."""
    return sum(a == f.value for f, a in zip(facts, answers, strict=True)) / len(facts)
