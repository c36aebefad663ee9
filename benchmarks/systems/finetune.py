"""Fine-tuning of the base: all weights (DAPT), and LoRA (arXiv 2106.09685) with peft.

Both train on the batches that memories are trained on, with cross-entropy alone.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.systems.slim import is_tight, resumable, train_slim
from benchmarks.systems.trained import Trained, parameters
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model.devices import default_device
from vllm_memdec.train.model.huggingface import load_config, load_model
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import MemorySettings
from vllm_memdec.train.stages.training import train_memory
from vllm_memdec.train.training.batches import Batches
from vllm_memdec.train.training.steps import autocast_to, learning_rate_factor

RANK = 64
SLIM_RATES = (1e-3, 3e-3)  # of Adafactor, relative to the size of a matrix's weights
# As in the paper: queries, keys, values and the MLP.
MODULES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


class FineTuned(Trained):
    """The base, trained further."""

    beside_base = False

    def settings(self, rate: float, epochs: float) -> MemorySettings:
        settings = super().settings(rate, epochs)
        return settings.changed(init=self.domain.base, layers=None, sampled_negatives=None)

    @cached_property
    def tight(self) -> bool:
        return is_tight(self.domain.base)

    def plan(self, settings: MemorySettings) -> dict[str, Any]:
        return super().plan(settings) | ({"ram": "tight"} if self.tight else {})

    def served(self, scores: dict[str, np.ndarray], text: str) -> np.ndarray:
        return scores[text]

    def next_token(self, prompt: list[int], line: list[int]) -> torch.Tensor:
        return self.reader.p(line, len(line) - len(prompt))


class Dapt(FineTuned):
    """Domain-adaptive pretraining: all weights of the base learn, with AdamW if it has room."""

    name, title = "dapt", "DAPT"
    usual_rates = (1e-4, 3e-4)

    @property
    def rates(self) -> tuple[float, ...]:
        return SLIM_RATES if self.tight else super().rates

    @cached_property
    def cost(self) -> tuple[float, float]:
        return 0, 6 * sum(parameters(load_config(self.domain.base)))

    def write(self, settings: MemorySettings, work: Path) -> None:
        domain = self.domain
        files = (domain.base, domain.corpus, domain.targets.path, work)
        if self.tight:
            train_slim(settings, *files, domain.progress)
        else:
            train_memory(settings, *files, Context(domain.progress))


class Lora(FineTuned):
    """Adapters learn, and are merged into the base."""

    name, title = "lora", "LoRA"
    usual_rates = (1e-3, 3e-3)

    @cached_property
    def cost(self) -> tuple[float, float]:
        base = self.domain.base
        adapters = sum(p.numel() for p in adapted(base, RANK).parameters() if p.requires_grad)
        return 0, 4 * sum(parameters(load_config(base))) + 6 * adapters

    def plan(self, settings: MemorySettings) -> dict[str, Any]:
        return super().plan(settings) | {"rank": RANK}

    def write(self, settings: MemorySettings, work: Path) -> None:
        domain = self.domain
        files = (domain.base, domain.corpus, domain.targets.path, work)
        train_lora(settings, RANK, *files, domain.progress, self.tight)


def adapted(base: str, rank: int, dtype: str = "float32") -> torch.nn.Module:
    """Return a base with LoRA adapters of a rank, scaled by 2, as peft's model.

    dtype: of the base's weights; the adapters are float32.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(MODULES), task_type="CAUSAL_LM"
    )
    return get_peft_model(load_model(base, dtype), config)


def train_lora(
    settings: MemorySettings,
    rank: int,
    base: str,
    corpus: Path,
    targets: Path,
    work: Path,
    progress: Progress,
    tight: bool = False,
) -> None:
    """Write the base with its trained adapters merged into it; settings as a memory's, CE only.

    tight: whether RAM is, so that the base is held in bfloat16 and activations are computed twice.
    """
    batches = Batches(settings, corpus, targets)
    torch.manual_seed(settings.seed)
    adapters = adapted(base, rank, "bfloat16" if tight else "float32")
    adapters = adapters.to(default_device()).train()
    model = adapters.get_base_model()
    if tight:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, weight_decay=settings.weight_decay, fused=True)

    def step(number: int) -> None:
        factor = learning_rate_factor(
            number, batches.steps, settings.warmup_fraction, settings.schedule
        )
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        tokens, positions, places, labels, _ = batches.load(
            batches.blocks(number), default_device()
        )
        with autocast_to(settings.dtype, default_device()):
            h_BTD = model.base_model(
                input_ids=tokens, position_ids=positions, use_cache=False
            ).last_hidden_state
            logits_NV = model.get_output_embeddings()(h_BTD.flatten(0, 1)[places])
        torch.nn.functional.cross_entropy(logits_NV.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(learning, settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()

    state = {"adapters": torch.nn.ParameterList(learning), "optimizer": optimizer}
    with progress.task("LoRA: training", batches.steps, "steps") as advance:
        resumable(work, batches.steps, step, state, advance)
    adapters.merge_and_unload().to("cpu").save_pretrained(work)
