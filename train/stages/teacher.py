"""Teacher stage of a seed: each row's next-token distribution, the base's own, as sparse targets.

They lie as the kNN targets do, so a seed is trained as any memory is. A row holds the TOP likeliest
tokens with their probabilities, and of all others DRAWS drawn at random, which share what is left:
the mean over draws is the base's whole distribution, which the likeliest alone are not.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_memdec.train.data import completeness
from vllm_memdec.train.data.blocks import load_blocks, shard_rows, unmarked, valid_rows
from vllm_memdec.train.data.shards import save_array, shard_path, unfinished
from vllm_memdec.train.model.devices import EMBEDDED, blocks_at_once
from vllm_memdec.train.model.hidden_states import states_of_rows
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.model.output_head import head
from vllm_memdec.train.settings import DatastoreSettings
from vllm_memdec.train.stages.stage import Build, Stage, lowered
from vllm_memdec.train.stages.targets import ARRAYS, CACHE_ROWS, aggregate

TOP, DRAWS = 32, 16


def drawn_targets(
    logits_NV: torch.Tensor, top: int, draws: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return distributions of logits as CSR, see aggregate(): the likeliest, and a sample."""
    p_NV = logits_NV.float().softmax(-1)
    p_NK, token_NK = p_NV.topk(min(top, p_NV.shape[1]), dim=-1)
    if draws and p_NV.shape[1] > top:
        left_N1 = (1 - p_NK.sum(-1, keepdim=True)).clamp(min=0)
        p_NV = p_NV.scatter(1, token_NK, 0.0).clamp_(min=1e-20)  # a row needs some mass
        p_NV.scatter_(1, token_NK, 0.0)
        token_NR = torch.multinomial(p_NV, draws, replacement=True, generator=generator)
        p_NK = torch.cat([p_NK, (left_N1 / draws).expand(-1, draws)], -1)
        token_NK = torch.cat([token_NK, token_NR], -1)
    return aggregate(p_NK.cpu().numpy(), token_NK.cpu().numpy(), 0.0)


@dataclass
class Teacher:
    """Writes the targets of one shard of blocks."""

    gpu: ClassVar[bool] = True
    settings: DatastoreSettings
    seed: int
    base: str
    corpus: Path
    work: Path

    @cached_property
    def model(self) -> Any:
        return load_model(self.base, self.settings.dtype)

    @torch.inference_mode()
    def __call__(self, shard: int) -> int:
        model, device = self.model, self.model.device
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + shard)
        tokens, positions = (array.shard(shard) for array in load_blocks(self.corpus, "train"))
        batch = blocks_at_once(self.settings.batch_blocks, tokens.shape[1] - 1, device, EMBEDDED)
        labels, pieces = [], []
        for start in range(0, len(tokens), batch):
            block = tokens[start : start + batch].astype(np.int64)
            position = positions[start : start + batch].astype(np.int64)
            valid = valid_rows(position)
            inputs = block[:, :-1], unmarked(position)[:, :-1], valid
            h_ND = states_of_rows(model, "final_hidden", *inputs)
            labels.append(block[:, 1:][valid])
            for h_PD in h_ND.split(CACHE_ROWS):
                pieces.append(drawn_targets(head(model, h_PD), TOP, DRAWS, generator))
        lengths = np.concatenate([np.diff(offsets) for offsets, _, _ in pieces])
        files = {
            "offsets": np.r_[0, np.cumsum(lengths)].astype(np.int64),
            "labels": np.concatenate(labels).astype(np.int32),
            "ids": np.concatenate([ids for _, ids, _ in pieces]),
            "probs": np.concatenate([p for *_, p in pieces]).astype(np.float16),
        }
        for name in ARRAYS:  # probs last: all of it is whole then
            save_array(shard_path(self.work, name, shard), files[name])
        return len(files["labels"])


def stage(build: Build) -> Stage:
    """Return how the base's distributions are written."""
    datastore, seed = build.settings.datastore, build.settings.memory.seed
    settings = {"top": TOP, "draws": DRAWS, "seed": seed, "dtype": datastore.dtype}

    def make(work: Path) -> None:
        corpus = build.path("corpus")
        starts = shard_rows(corpus)
        todo = unfinished(work, ARRAYS, len(starts) - 1)
        teacher = Teacher(datastore, seed, build.base, corpus, work)
        with build.context.progress.task("teacher", int(starts[-1]), "rows") as advance:
            done = sorted(set(range(len(starts) - 1)) - set(todo))
            advance(int(np.diff(starts)[done].sum()), done_before=True)
            for rows in build.context.executor.map(teacher, todo):
                advance(rows)

    def files(work: Path) -> Iterable[str]:
        return completeness.numbered(ARRAYS, completeness.n_shards(build.path("corpus")))

    remedy = lowered("datastore.batch_blocks", datastore.batch_blocks)
    return Stage(settings, ("corpus",), make, files, remedy)
