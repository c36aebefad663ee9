"""The answer key: float64 mixtures of plain Hugging Face models, and the comparison with vLLM.

Shapes: T tokens of one sequence, V base vocabulary, W memory vocabulary.
"""

import functools
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

# vLLM computes in float32 with its own kernels; the tiny models differ by up to 2e-5 from float64.
TOLERANCE = 1e-4


@functools.cache
def load(folder):
    """Return a model in float64, with what its config says is to be changed for that."""
    changes = json.loads((Path(folder) / "config.json").read_text()).get("oracle", {})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **changes)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the default one knows no float64
    return model.eval()


@torch.no_grad()
def log_probs(folder, ids, width=None):
    """Return log p(next | ids[:t+1]) as float64 [T, width]; missing columns have no mass."""
    model = load(folder)
    rows = model.get_input_embeddings().weight.shape[0]
    logits_TW = model(torch.tensor([ids]).clamp(max=rows - 1)).logits[0]
    if width is not None:
        full_TV = torch.full((len(ids), width), -torch.inf, dtype=torch.float64)
        shared = min(width, logits_TW.shape[1])
        full_TV[:, :shared] = logits_TW[:, :shared]
        logits_TW = full_TV
    return logits_TW.log_softmax(-1)


def mixture(base, memory, alpha, ids, length=None):
    """Return log((1 - alpha) p_base + alpha p_memory) as float64 [T, V].

    length: the positions of a memory that has fewer than the base; further ones are the base's.
    """
    key_TV = log_probs(base, ids)
    memory_TV = log_probs(memory, ids[:length], key_TV.shape[1])
    base_TV = key_TV[: len(memory_TV)]
    base_TV.copy_(((1 - alpha) * base_TV.exp() + alpha * memory_TV.exp()).log())
    return key_TV


def worst_error(prompt, sampled, prompt_rows, sampled_rows, base, memory, alpha, length=None):
    """Return the largest error of the (token -> log-probability) rows of one request."""
    key_TV = mixture(base, memory, alpha, [*prompt, *sampled], length)
    return worst_row(prompt, sampled, prompt_rows, sampled_rows, key_TV)


def worst_row(*rows_and_key):
    """Return the largest error of rows against a key."""
    return max(errors(*rows_and_key))


def errors(prompt, sampled, prompt_rows, sampled_rows, key_TV):
    """Return all errors of rows against a key."""
    rows = list(enumerate(prompt_rows))[1:]  # nothing predicts the first token
    rows += enumerate(sampled_rows, start=len(prompt))
    found = [
        abs(value - key_TV[position - 1, int(token)].item())
        for position, row in rows
        for token, value in row.items()
    ]
    assert len(found) >= len(sampled)
    return found


def gap(output, *mixed):
    """Return the largest error of one vLLM output, prompt and sampled tokens."""
    return max(gaps(output, *mixed))


def gaps(output, *mixed):
    """Return all errors of one vLLM output; mixed: base, memory, alpha, and perhaps its length."""
    found = output.outputs[0]
    prompt_rows, sampled_rows = (
        [{token: entry.logprob for token, entry in (row or {}).items()} for row in rows or []]
        for rows in (output.prompt_logprobs, found.logprobs)
    )
    base, memory, alpha, *length = mixed
    key_TV = mixture(base, memory, alpha, [*output.prompt_token_ids, *found.token_ids], *length)
    return errors(output.prompt_token_ids, found.token_ids, prompt_rows, sampled_rows, key_TV)


def prompts(count, low, high, vocab, prefix=(), seed=0):
    """Return random prompts of between low and high tokens after a common prefix."""
    rng = random.Random(seed)
    return [
        [*prefix, *(rng.randrange(vocab) for _ in range(rng.randint(low, high)))]
        for _ in range(count)
    ]
