"""A served mixture against its models: what the scripts here ask an engine, and the answer key.

The answer key: the models in Hugging Face, in float64, on the weights that the engine has
(bfloat16's, exactly). Compared are the log-probabilities of prompt and answer; and each token of a
greedy answer, given those before it, must be the key's best. With drafts only the latter.

The tolerance is measured, since it is rounding: the same mixture of Hugging Face models in the
engine's dtype, at the same places, is some way from the key, too. bfloat16 keeps 8 bits, so each
of a layer's operations rounds by up to 2^-9 of its value, and so do logits: for logits of up to 16
that is 0.03 by itself. An engine rounds in other places, but not more often. Its mean error may be
TIMES_MEAN times that of Hugging Face, its largest TIMES_LARGEST times (of thousands of values, the
largest is a matter of luck). On a GPU the float32 yardstick has TF32 matrix products, which
vLLM's attention in Triton has in float32; FLOOR is the test suite's tolerance for float32 without
them. Tokens of greedy answers lie below the key's best where rounding decides between two: on
average by no more than the allowed mean, each by at most SECOND_BEST times the largest allowed
error, for both tokens may be off.
What a fault would do (the base alone where a memory was asked) has to be far above the allowed
mean; else these models could not show one, and that fails as well.

Shape suffixes: T tokens of one request, V base vocabulary.
"""

import functools
import gc
import itertools
import json
import multiprocessing
import os
import random
import time
from collections.abc import Container
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.engines import side_by_side

ROOT = Path(__file__).resolve().parents[2]
TIMES_MEAN, TIMES_LARGEST, FLOOR, SECOND_BEST = 2.0, 3.0, 1e-4, 2.0
FAULT = 4  # multiple of the allowed mean that a fault causes at least
ALPHAS = {"law": 0.5, "wide": 0.4, "same": 0.5}
CHOICES = [("law", None), ("none", None), ("wide", None), ("same", None), ("law", 0.0),
           ("wide", 0.7), ("law", 1.0), ("same", 0.3)]  # fmt: skip
MAX_CONTEXT, ANSWER = 1024, 12  # tokens
JOBS = max(4, min(12, (os.cpu_count() or 1) - 4))  # a start compiles, on one core each
STARTS = {
    "default": {},
    "FULL_DECODE_ONLY": {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}},
    "eager": {"enforce_eager": True},
}
CAPTURED = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]  # the default's range with fewer to capture


def requests(
    count: int, max_prompt: int, vocabulary: int, memories: Container[str] = ALPHAS
) -> list[tuple[list[int], str, float]]:
    """Return (prompt, memory, its weight) of so many requests; every choice is among them."""
    rng = random.Random(0)
    made = []
    choices = [choice for choice in CHOICES if choice[0] in memories or choice[0] == "none"]
    for number, (memory, alpha) in zip(range(count), itertools.cycle(choices), strict=False):
        length = max_prompt if number == count // 2 else int(2 ** rng.uniform(1, 8))
        length = min(length, max_prompt)
        prompt = [rng.randrange(2, vocabulary) for _ in range(length)]
        weight = 0.0 if memory == "none" else ALPHAS[memory] if alpha is None else alpha
        made.append((prompt, memory, weight))
    return made


class Key:
    """Mixtures of the models in Hugging Face, of one dtype, on the device."""

    def __init__(self, folders: dict[str, str], dtype: torch.dtype, device: str) -> None:
        self.folders, self.dtype, self.device = folders, dtype, device

    @functools.cached_property
    def models(self) -> dict[str, Any]:
        import transformers

        models = {}
        for name, folder in self.folders.items():
            config = json.loads((Path(folder) / "config.json").read_text())
            model_class = getattr(transformers, config["architectures"][0])
            own = config.get("oracle", {})  # where vLLM reads a config in another way
            model = model_class.from_pretrained(folder, dtype=self.dtype, **own)
            model.set_experts_implementation("eager")  # others know no float64
            models[name] = model.to(self.device).eval()
        return models

    @torch.inference_mode()
    def log_probs(self, name: str, ids: list[int]) -> torch.Tensor:
        """Return log p(next | ids[:t+1]) of one model as float64 [T, its vocabulary]."""
        model = self.models[name]
        rows = len(model.get_input_embeddings().weight)
        given = torch.tensor([ids], device=self.device).clamp(max=rows - 1)
        return model(given).logits[0].double().log_softmax(-1)

    def mixture(self, memory: str, alpha: float, ids: list[int]) -> torch.Tensor:
        """Return the mixture's log-probabilities as float64 [T, V]."""
        base_TV = self.log_probs("base", ids)
        if memory == "none" or not alpha:
            return base_TV
        memory_TV = torch.full_like(base_TV, -torch.inf)
        own_TV = self.log_probs(memory, ids)
        memory_TV[:, : own_TV.shape[1]] = own_TV
        return ((1 - alpha) * base_TV.exp() + alpha * memory_TV.exp()).log()


Answer = tuple[list[int], tuple[list[int], list[int], list[float]]]


def answer_of(output: Any) -> Answer:
    """Return an output's tokens, and positions, tokens and values of what it states of others."""
    answer = output.outputs[0]
    rows = [*enumerate(output.prompt_logprobs or [])][1:]  # nothing predicts the first token
    rows += enumerate(answer.logprobs or [], start=len(output.prompt_token_ids))
    stated = [(t - 1, i, e.logprob) for t, row in rows for i, e in row.items()]
    # Both are -inf where a mixture gives a token no mass at all: that is no error.
    stated = [each for each in stated if each[2] > -1e30]
    columns = tuple(map(list, zip(*stated, strict=True))) if stated else ([], [], [])
    return list(answer.token_ids), columns


def compare(answers: list[Answer], asked: list, folders: dict, dtype: str, device: str) -> dict:
    """Return the engine's errors and Hugging Face's, what is allowed, and what a fault would do."""
    torch.backends.cuda.matmul.allow_tf32 = dtype == "float32"
    key = Key(folders, torch.float64, device)
    yardstick = Key(folders, getattr(torch, dtype), device)
    errors, rounding, faults, gaps, worst = [], [], [], [], []
    for (answer, stated), (prompt, memory, alpha) in zip(answers, asked, strict=True):
        assert len(answer) == ANSWER, f"an answer of {len(answer)} tokens"
        ids = [*prompt, *answer]
        key_TV = key.mixture(memory, alpha, ids)
        other_TV = yardstick.mixture(memory, alpha, ids)
        answers_TV = key_TV[len(prompt) - 1 : -1]
        chosen = torch.tensor(answer, device=device)[:, None]
        gaps.append(answers_TV.max(-1).values - answers_TV.gather(1, chosen)[:, 0])
        positions, tokens, values = stated
        if not values:  # with drafts the best tokens stand for all
            positions = list(range(len(ids)))
            tokens = key_TV.argmax(-1).tolist()
        wanted = key_TV[positions, tokens]
        if values:
            errors.append((torch.tensor(values, device=device).double() - wanted).abs())
            worst.append((errors[-1].max().item(), f"{memory} {alpha:g}"))
        worst.append((gaps[-1].max().item(), f"{memory} {alpha:g}"))
        rounding.append((other_TV[positions, tokens] - wanted).abs())
        if alpha > 0 and memory not in ("none", "same"):
            faults.append((key.mixture("none", 0.0, ids)[positions, tokens] - wanted).abs())
    rounding, faults, gaps = (torch.cat(each) for each in (rounding, faults, gaps))
    row = {
        "values": sum(map(len, errors)),
        "mean_error": "",
        "largest_error": "",
        "mean_allowed": TIMES_MEAN * rounding.mean().item() + FLOOR,
        "largest_allowed": TIMES_LARGEST * rounding.max().item() + FLOOR,
        "mean_gap": gaps.mean().item(),
        "largest_gap": gaps.max().item(),
        "fault": faults.mean().item(),
        "worst": max(worst)[1],
    }
    if errors:
        joined = torch.cat(errors).nan_to_num(torch.inf)
        row |= {"mean_error": joined.mean().item(), "largest_error": joined.max().item()}
    return row


def verdict(row: dict[str, Any], drafts: int, mean_only: bool = False) -> str:
    """Return what is wrong, or an empty string; mean_only: largest errors are not looked at."""
    if mean_only:
        row = row | {"largest_error": 0.0, "largest_gap": 0.0}
    if row["fault"] < FAULT * row["mean_allowed"]:
        return "these models could not show a fault"
    if not row["largest_gap"] <= SECOND_BEST * row["largest_allowed"]:
        return "a token is not the best one"
    if not row["mean_gap"] <= row["mean_allowed"]:
        return "the tokens are not the best ones"
    if drafts:
        return "" if row["accepted"] else "no draft was accepted"
    if not row["mean_error"] <= row["mean_allowed"]:
        return "the mean error is too large"
    if not row["largest_error"] <= row["largest_allowed"]:
        return "the largest error is too large"
    return ""


@functools.cache
def comparer() -> ProcessPoolExecutor:
    """Return a process for the answer key: where vLLM runs, it changes transformers' classes."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def one(job: dict[str, Any]) -> dict[str, Any]:
    """Start one engine, ask it, free it, and return its row."""
    folders, dtype, drafts = job["folders"], job["dtype"], job["drafts"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.perf_counter()
    from vllm import LLM, SamplingParams

    alphas = {name: alpha for name, alpha in ALPHAS.items() if name in folders}
    memories = {name: {"model": folders[name], "alpha": alpha} for name, alpha in alphas.items()}
    options = STARTS[job["start"]] | {"enforce_eager": job["start"] == "eager"}
    if device == "cuda":
        options |= side_by_side(1 << 30) | job.get("options", {})
        if job["start"] != "eager":
            options["cudagraph_capture_sizes"] = CAPTURED
    llm = LLM(
        folders["base"],
        model_impl="memdec",
        additional_config={
            "memdec": {"memories": memories, "default": "law", "speculative_tokens": drafts}
        }
        | job.get("additional_config", {}),
        dtype=dtype,
        max_model_len=job["context"],
        max_num_seqs=8,
        max_num_batched_tokens=job["context"] * 3 // 4,
        max_logprobs=-1,
        seed=0,
        disable_log_stats=False,
        **options,
    )
    started = time.perf_counter() - began
    asked = requests(job["requests"], job["longest"], job["vocabulary"], alphas)
    params = []
    for number, (_, memory, alpha) in enumerate(asked):
        extra = {"memdec_memory": memory} | ({} if memory == "none" else {"memdec_alpha": alpha})
        shown = {} if drafts else {"logprobs": 5, "prompt_logprobs": 2 if number % 2 else None}
        common = {"temperature": 0, "max_tokens": ANSWER, "ignore_eos": True, "detokenize": False}
        params.append(SamplingParams(**common | shown, extra_args=extra))
    prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in asked]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    cached = 0
    if job.get("again"):  # with what the prefix cache has kept
        again = llm.generate(prompts, [p.clone() for p in params], use_tqdm=False)
        cached = sum(output.num_cached_tokens or 0 for output in again)
        outputs, asked = outputs + again, asked * 2
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    counts = {
        kind: int(getattr(metrics.get(f"vllm:spec_decode_num_{kind}_tokens"), "value", 0))
        for kind in ("draft", "accepted")
    }
    answers = [answer_of(output) for output in outputs]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    row = comparer().submit(compare, answers, asked, folders, dtype, device).result()
    row |= {"drafted": counts["draft"], "accepted": counts["accepted"]}
    row |= {"cached": cached, "start_s": round(started, 1), "what": ""}
    row["what"] = verdict(row, drafts, job.get("mean_only", False))
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}


COLUMNS = ("values", "mean_error", "mean_allowed", "largest_error", "largest_allowed", "mean_gap",
           "largest_gap", "fault", "drafted", "accepted", "start_s", "what")  # fmt: skip


def set_environment() -> None:
    """Set what engines of this process and of its children need."""
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        os.environ |= {
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_USE_V2_MODEL_RUNNER": "0",  # V2 needs a Triton that compiles
        }
