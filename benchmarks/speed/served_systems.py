"""The systems whose time is compared, the engine of each, and the ways of asking them."""

import json
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.corpora.download import minilm
from benchmarks.speed import shapes
from benchmarks.speed.engines import MAX_CONTEXT, Stopwatch
from benchmarks.speed.prompts import demo_documents, lasting
from benchmarks.speed.workers import answer

PASSAGE = 128  # tokens


@dataclass(frozen=True)
class Regime:
    """A way of asking."""

    name: str
    batch: int
    prompt: int  # tokens of a prompt
    answer: int  # tokens of an answer; 0: the prompt is scored


def regimes(batches: list[int], tokens: int) -> list[Regime]:
    """Return decoding at each batch size, and scoring."""
    return [*(Regime(f"decode, batch {b}", b, 64, tokens) for b in batches),
            Regime("scoring", 1, 512, 0)]  # fmt: skip


@dataclass(frozen=True)
class Systems:
    """What there is to compare: names by the engine they run on."""

    base: str
    build: str
    passages: int = 0  # passages before a prompt
    drafted: int = 0  # tokens that the memory drafts in a step
    memory: str | None = None  # folder of random weights' configuration; None: the build's export
    eager: bool = False

    @property
    def models(self) -> str:
        """Return which models these are, for a table."""
        if self.memory is None:
            return f"{Path(self.base).name} + {Path(self.build).name}"
        return f"{Path(self.base).name} + {Path(self.memory).name}, random weights"

    def engines(self) -> dict[str, list[str]]:
        """Return the systems of each process, which holds one engine."""
        drafting = f"base + memory, {self.drafted} drafts"
        if self.memory is not None:
            return {"plain": ["base"], "memdec": ["base + memory"], "drafting": [drafting]}
        rag = ["RAG (BM25)", "RAG (MiniLM)", "RAG (BM25), every 4 tokens"]
        return {
            "plain": ["base", *rag],
            "memdec": ["base + memory"],
            "drafting": [drafting],
            "knn": ["kNN-LM"],
        }

    def start(self, engine: str) -> Any:
        """Return the engine of a process."""
        from vllm import LLM

        options: dict[str, Any] = {}
        if engine in ("memdec", "drafting"):
            block: dict[str, Any] = {"model": f"{self.build}/export"}
            if self.memory is not None:
                block = {"model": self.memory, "alpha": 0.5}
            if engine == "drafting":
                block["speculative_tokens"] = self.drafted
            options = {"model_impl": "memdec", "additional_config": {"memdec": block}}
        if engine == "knn":
            from benchmarks.systems import knn_engine

            knn_engine.register()
            options = self.knn().options(self.base)
        if self.memory is not None:
            options |= shapes.engine_options(self.eager)
        return LLM(
            self.base,
            **options,
            dtype="bfloat16",
            load_format="auto" if self.memory is None else "dummy",
            seed=0,
            max_num_seqs=128,
            max_model_len=MAX_CONTEXT,
            disable_log_stats=True,
        )

    def knn(self) -> Any:
        """Return kNN-LM as the demo tuned it."""
        from benchmarks.systems import knn_engine

        targets = json.loads((Path(self.build) / "targets/targets.json").read_text())
        settings = json.loads((Path(self.build) / "targets/manifest.json").read_text())["settings"]
        scores = json.loads((Path(self.build) / "scores/perplexity.json").read_text())
        return knn_engine.KNN(
            self.build,
            scores["pages"]["knn_lambda"],
            targets["temperature"],
            settings["neighbours"],
            settings["probes"],
        )

    def rag(self, tokenizer: Any) -> dict[str, Any]:
        """Return the retrievers by the system's name."""
        from benchmarks.systems import rag

        texts = demo_documents(self.build, "corpus")
        # One fact is too little to read, so a passage is a run of neighbouring facts.
        cut = rag.passages(["\n".join(texts)], tokenizer, PASSAGE)
        bm25, dense = rag.BM25(cut), rag.Dense(cut, minilm())
        made = {
            "RAG (BM25)": (bm25, None),
            "RAG (MiniLM)": (dense, None),
            "RAG (BM25), every 4 tokens": (bm25, 4),
        }
        return {
            name: rag.Rag(retriever, cut, tokenizer, self.passages, interval)
            for name, (retriever, interval) in made.items()
        }


class Client:
    """Asks one engine, as any of the systems that run on it."""

    def __init__(self, systems: Systems, engine: str) -> None:
        llm = systems.start(engine)
        self.engine = Stopwatch(llm)
        retrieves = engine == "plain" and systems.passages
        self.rags = systems.rag(llm.get_tokenizer()) if retrieves else {}

    def measure(self, system: str, regime: Regime, prompts: list[list[int]]) -> dict[str, float]:
        """Return the figures of answers to the prompts, or of scoring them."""
        from vllm import SamplingParams

        scored = 0 if not regime.answer else None
        params = SamplingParams(
            max_tokens=max(1, regime.answer),
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=scored,
        )
        self.engine.start(len(prompts))
        reader = self.rags.get(system)
        if reader is not None and regime.answer:
            reader.generate(self.engine, prompts, params)
        else:
            if reader is not None:
                contexts = reader.contexts(prompts)
                prompts = [[*c, *p] for c, p in zip(contexts, prompts, strict=True)]
            self.engine.generate([{"prompt_token_ids": p} for p in prompts], params)
        if regime.answer:
            return self.engine.figures(regime.answer)
        spent = max(self.engine.last)
        return {"first": spent, "token": spent / (regime.prompt * regime.batch), "whole": spent}

    def lasting(self, tokens: int, prompts: list[list[int]]) -> list[bool]:
        """Return which prompts have a greedy answer of so many tokens."""
        return lasting(self.engine.llm, tokens, prompts)


def serve_rounds(connection: Connection, systems: Systems, engine: str) -> None:
    """Answer each (method of Client, arguments)."""
    client = Client(systems, engine)
    answer(connection, lambda asked: getattr(client, asked[0])(*asked[1]))
