"""In-context retrieval: passages of the corpus are put before the prompt.

As in the paper's baseline (arXiv 2508.09874, after 2302.00083): the last tokens of what is written
so far are the query, and every `interval` tokens the passages are looked up anew. Passages are
ranked by BM25, or by a sentence encoder (all-MiniLM-L6-v2) and faiss.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from benchmarks.corpora.download import minilm
from benchmarks.quality.domain import TEXTS, made_in
from benchmarks.systems.base import Base
from benchmarks.systems.system import System
from vllm_memdec.train.data.artifacts import Artifact, write_json
from vllm_memdec.train.data.blocks import unmarked, valid_rows
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.model.output_head import head
from vllm_memdec.train.model.scoring import perplexity
from vllm_memdec.train.progress import Progress

PASSAGE = 128  # tokens
CHOOSING_BLOCKS = 8  # validation blocks used to choose the number of passages
QUERY_TOKENS = 32  # tokens of a query, as in the paper
ENCODER_TOKENS = 256  # tokens of the longest texts that the encoder was trained on
BATCH = 32
FIRST_QUERY = 8  # tokens of a document before the first retrieval
BATCH_TOKENS = 2048  # tokens of a forward pass


class Retriever(Protocol):
    """Ranks the passages of a corpus."""

    def search(self, queries: Sequence[str], k: int) -> np.ndarray:
        """Return the numbers [Q, k] of the best passages, best first."""


def passages(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> list[str]:
    """Cut documents into passages of at most so many tokens; short documents stay whole."""
    cut = []
    for ids in tokenizer(list(texts))["input_ids"]:
        for start in range(0, len(ids), max_tokens):
            cut.append(tokenizer.decode(ids[start : start + max_tokens]).strip())
    return [text for text in cut if text]


class BM25:
    """BM25 of bm25s (its Lucene variant), stemmed English words."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s
        import Stemmer

        self.tokenize, self.stemmer = bm25s.tokenize, Stemmer.Stemmer("english")
        self.index = bm25s.BM25()
        self.index.index(self._words(texts), show_progress=False)
        self.max_passages = len(texts)

    def _words(self, texts: Sequence[str]) -> Any:
        return self.tokenize(list(texts), stemmer=self.stemmer, show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> np.ndarray:
        numbers, _ = self.index.retrieve(
            self._words(queries), k=min(k, self.max_passages), show_progress=False
        )
        return np.asarray(numbers)


class Dense:
    """Inner product of sentence embeddings in a flat faiss index."""

    def __init__(self, texts: Sequence[str], encoder: Path) -> None:
        import faiss
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(encoder)
        self.model = AutoModel.from_pretrained(encoder).eval()
        vectors = self.embed(texts)
        self.index = faiss.IndexFlatIP(vectors.shape[1])
        self.index.add(vectors)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return unit vectors [N, D] float32: the mean of the last hidden states."""
        vectors = []
        for start in range(0, len(texts), BATCH):
            batch = self.tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=ENCODER_TOKENS,
                return_tensors="pt",
            )
            with torch.inference_mode():
                h_NTD = self.model(**batch).last_hidden_state
            mask_NT1 = batch["attention_mask"][:, :, None].float()
            mean_ND = (h_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)
            vectors.append(torch.nn.functional.normalize(mean_ND, dim=-1).numpy())
        return np.concatenate(vectors)

    def search(self, queries: Sequence[str], k: int) -> np.ndarray:
        return self.index.search(self.embed(queries), min(k, self.index.ntotal))[1]


@dataclass
class Rag:
    """Puts passages before prompts; prompts and answers are token ids."""

    retriever: Retriever
    texts: Sequence[str]
    tokenizer: Any
    k: int
    interval: int | None = None  # tokens between retrievals; None: once
    separator: str = "\n"
    cut: dict[int, list[int]] = field(default_factory=dict)  # ids of a passage, by its number

    def contexts(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the ids to put before each prompt, the best passage next to it."""
        queries = [self.tokenizer.decode(list(ids)[-QUERY_TOKENS:]) for ids in prompts]
        numbers = self.retriever.search(queries, self.k)
        return [[i for n in row[::-1] for i in self._ids(int(n))] for row in numbers]

    def _ids(self, number: int) -> list[int]:
        if number not in self.cut:
            text = self.texts[number] + self.separator
            self.cut[number] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.cut[number]

    def generate(self, llm: Any, prompts: Sequence[list[int]], params: Any) -> list[list[int]]:
        """Return the answers of an engine, retrieving anew after every interval."""
        total = params.max_tokens
        answers: list[list[int]] = [[] for _ in prompts]
        open_ = list(range(len(prompts)))
        while open_:
            written = [[*prompts[n], *answers[n]] for n in open_]
            contexts = self.contexts(written)
            step = params.clone()
            left = total - len(answers[open_[0]])
            step.max_tokens = left if self.interval is None else min(self.interval, left)
            step.detokenize = False
            inputs = [
                {"prompt_token_ids": [*context, *ids]}
                for context, ids in zip(contexts, written, strict=True)
            ]
            outputs = llm.generate(inputs, step, use_tqdm=False)
            for n, output in zip(open_, outputs, strict=True):
                answers[n] += output.outputs[0].token_ids
            open_ = [
                n
                for n, output in zip(open_, outputs, strict=True)
                if output.outputs[0].finish_reason == "length" and len(answers[n]) < total
            ]
        return answers


def chunks(positions: np.ndarray, interval: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (block, start of the document, first row, end) of rows that share a retrieval.

    Nothing is retrieved before FIRST_QUERY tokens of a document are known; then every `interval`.
    """
    for block, position in enumerate(unmarked(positions)):
        starts = np.flatnonzero(np.r_[True, position[1:] != position[:-1] + 1])
        for start, end in zip(starts, [*starts[1:], len(position)], strict=True):
            last = end - 1  # nothing is predicted from a document's last token
            row, end_row = start, min(start + FIRST_QUERY - 1, last)
            while row < last:
                yield block, int(start), int(row), int(end_row)
                row, end_row = end_row, min(end_row + interval, last)


@torch.inference_mode()
def label_logprobs(
    model: Any,
    reader: Rag,
    tokens: np.ndarray,
    positions: np.ndarray,
    interval: int,
    progress: Progress,
) -> np.ndarray:
    """Return log p(next token) [rows] of every valid row of blocks [B, T+1], passages before it."""
    jobs = [job for job in chunks(positions, interval) if job[3] > job[2]]
    asking = [n for n, (_, start, row, _) in enumerate(jobs) if row > start]
    queries = [
        tokens[b, start : row + 1].tolist() for b, start, row, _ in map(jobs.__getitem__, asking)
    ]
    contexts = dict(zip(asking, reader.contexts(queries), strict=True)) if queries else {}
    inputs = [
        [*contexts.get(n, []), *tokens[b, start:end].tolist()]
        for n, (b, start, _, end) in enumerate(jobs)
    ]
    logprobs_BT = np.full((len(tokens), tokens.shape[1] - 1), np.nan)
    order = sorted(range(len(jobs)), key=lambda n: len(inputs[n]))
    with progress.task(f"RAG, {reader.k} passages", len(jobs), "chunks") as advance:
        while order:
            max_length = len(inputs[order[-1]])
            batch = [
                order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // max_length)))
            ]
            # No real token attends to padding on its right.
            ids = torch.zeros(len(batch), max_length, dtype=torch.int64)
            for i, n in enumerate(batch):
                ids[i, : len(inputs[n])] = torch.tensor(inputs[n])
            h_BTD = model.base_model(input_ids=ids.to(model.device), use_cache=False)[0]
            for i, n in enumerate(batch):
                b, _, row, end = jobs[n]
                h_ND = h_BTD[i, len(inputs[n]) - (end - row) : len(inputs[n])]
                logits_NV = head(model, h_ND).float().cpu()
                labels_N = torch.from_numpy(tokens[b, row + 1 : end + 1].astype(np.int64))
                chosen_N = logits_NV.gather(1, labels_N[:, None])[:, 0]
                logprobs_BT[b, row:end] = (chosen_N - logits_NV.logsumexp(-1)).numpy()
            advance(len(batch))
    logprobs = logprobs_BT[valid_rows(positions)]
    assert np.isfinite(logprobs).all()
    return logprobs


class RagSystem(System):
    """The base, which reads the best of some numbers of passages anew every interval."""

    passages: ClassVar[tuple[int, ...]] = (2, 4)  # numbers of passages that are tried

    def retriever(self, texts: list[str]) -> Retriever:
        return BM25(texts)

    @cached_property
    def rag(self) -> Rag:
        """The corpus's passages, their retriever, and the reader."""
        texts = passages(self.domain.documents("train"), self.domain.tokenizer, PASSAGE)
        return Rag(self.retriever(texts), texts, self.domain.tokenizer, 1)

    @cached_property
    def artifact(self) -> Artifact:
        """Log p of the true tokens of the texts that are scored, and the number of passages."""
        domain, choices = self.domain, self.passages
        interval = domain.sizes.interval

        def make(work: Path) -> None:
            model = load_model(domain.base, "bfloat16")

            def score(k: int, text: str, max_blocks: int | None = None) -> np.ndarray:
                self.rag.k = k
                blocks = (array[:max_blocks] for array in domain.blocks(text))
                return label_logprobs(model, self.rag, *blocks, interval, domain.progress)

            def tried(k: int) -> float:
                return perplexity(score(k, "validation", CHOOSING_BLOCKS))

            k = min(choices, key=tried) if len(choices) > 1 else choices[0]
            for text in TEXTS[1:]:
                np.save(work / f"{text}.npy", score(k, text))
            write_json(work / "tuned.json", {"passages": k})

        settings = {"interval": interval, "passages": list(choices), "tokens": PASSAGE}
        settings |= made_in()
        inputs = {"text": domain.text.hash, "base": domain.base_hash}
        return domain.artifact(f"scores-{self.name}", settings, inputs, make)

    def fit(self) -> dict[str, float]:
        return json.loads((self.artifact.path / "tuned.json").read_text())

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        return self.domain.load(self.artifact)

    def logprobs(self, text: str) -> np.ndarray:
        return self.scores[text]

    def next_token(self, prompt: list[int], line: list[int]) -> torch.Tensor:
        self.rag.k = int(self.fit()["passages"])
        context = self.rag.contexts([prompt])[0]
        return self.domain.system(Base).next_token([*context, *prompt], [*context, *line])


class Bm25Rag(RagSystem):
    """Passages ranked by BM25."""

    name, title = "rag_bm25", "RAG (BM25)"


class MiniLmRag(RagSystem):
    """Passages ranked by a sentence encoder."""

    name, title = "rag_minilm", "RAG (MiniLM)"

    def retriever(self, texts: list[str]) -> Retriever:
        return Dense(texts, minilm())


class Bm25Rag16(RagSystem):
    """Sixteen passages, whatever they cost."""

    name, title = "rag_bm25_16", "RAG (BM25), 16 passages"
    passages = (16,)
