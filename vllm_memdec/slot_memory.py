"""A slot in a worker: how a memory is made ready on the host and takes the place of another.

The spare is a module of the slots' shape that vLLM built on the host and no step runs. A thread
reads a memory's files into it, checks that nothing is missing, and lets vLLM process it as it does
after any loading (on a CPU weights are packed). Between two steps what has come of it is copied to
where the slot has it: the same tensors, so that captured graphs and compiled code stay valid.

Shapes: T tokens, N rows, A columns, K pairs of position and weight.
"""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import LoadConfig, VllmConfig
from vllm.model_executor.model_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from vllm_memdec.batch import ContextTable, decode_memory
from vllm_memdec.compat.slots import Packed, packed
from vllm_memdec.config import MAX_STEPS
from vllm_memdec.errors import MemdecError, said_by
from vllm_memdec.gate import read_gate
from vllm_memdec.kernels.weights import PARTS


class SlotTable(ContextTable):
    """A memory's weights by the position of a row, none at first; graphs read it where it lies."""

    def __init__(self, number: int, dtype: torch.dtype, device: Any):
        super().__init__(self.padded([]), number, dtype, device)
        self.dtype, self.device = dtype, device
        self.is_used = torch.zeros((), dtype=torch.bool, device=device)

    @staticmethod
    def padded(table: list[list[float]]) -> list[list[float]]:
        """Return as many pairs as fit; those added lie beyond all positions."""
        rest = [[torch.iinfo(torch.int64).max, 0.0]] * (MAX_STEPS - max(1, len(table)))
        return [*(table or [[0, 0.0]]), *rest]

    def take(self, table: list[list[float]] | None) -> None:
        """Have these [position, alpha] pairs from now on, or none."""
        self.copy_(ContextTable(self.padded(table or []), self.number, self.dtype, self.device))
        self.is_used.fill_(bool(table))

    def write(self, columns_NA: torch.Tensor, position_N: torch.Tensor) -> None:
        """Put the weight of its position in the place of a negative one, in this memory's rows."""
        mine_N = (decode_memory(columns_NA) == self.number) & self.is_used
        asks_N = (columns_NA[:, 0] < 0) & mine_N
        parts_NP = self.parts_KP[torch.bucketize(position_N, self.start_K, right=True)]
        columns_NA[:, :PARTS] = torch.where(asks_N[:, None], parts_NP, columns_NA[:, :PARTS])


@dataclass
class Reading:
    """A memory that a thread makes ready."""

    settings: dict[str, Any]  # name, model, revision, gate_file, alpha_by_context
    digest: str = ""  # of its weights
    error: str = ""  # a sentence
    gate: dict[str, np.ndarray] | None = None
    thread: threading.Thread | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Spare:
    """A module on the host in which memories are made ready, one after the other."""

    def __init__(self, module: Any, config: VllmConfig):
        self.module, self.config = module, config
        self.reading: Reading | None = None
        # As vLLM builds it: processing puts other tensors in their place.
        self.layers = [(layer, dict(layer._parameters)) for layer in module.modules()]
        own = (p for _, parameters in self.layers for p in parameters.values() if p is not None)
        self.tensors = {id(p): (p, p.data, p.data.untyped_storage().nbytes()) for p in own}
        self.release()

    def release(self) -> None:
        """Give the ram back: nothing of it is resident until the next memory comes."""
        for layer, parameters in self.layers:
            layer._parameters.update(parameters)
            vars(layer).pop("cpu_linear", None)
        for parameter, data, _ in self.tensors.values():
            parameter.data = data
            data.untyped_storage().resize_(0)

    def begin(self, settings: dict[str, Any]) -> None:
        """Let a thread read a memory; what was read before is dropped."""
        self.drop()
        self.reading = Reading(settings)
        self.reading.thread = threading.Thread(target=self._read, args=[self.reading], daemon=True)
        self.reading.thread.start()

    def state(self) -> dict[str, Any] | None:
        """Return the digest and the error of what was read; None while it is being read."""
        assert self.reading is not None
        if not self.reading.done.is_set():
            return None
        return {"digest": self.reading.digest, "error": self.reading.error}

    def drop(self) -> None:
        """Forget what was read."""
        if self.reading is not None and self.reading.thread is not None:
            self.reading.thread.join()
            self.release()
        self.reading = None

    def _read(self, reading: Reading) -> None:
        """Make a memory ready, or note why it cannot be had."""
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._fill(reading)
        except MemdecError as error:
            reading.error = str(error)
        except Exception as error:  # whatever a broken file makes vLLM raise
            reading.error = (
                f"The memory {reading.settings['model']} cannot be read "
                f"({type(error).__name__}: {said_by(error)}): copy it again."
            )
        finally:
            reading.done.set()

    def _fill(self, reading: Reading) -> None:
        settings = reading.settings
        if settings["gate_file"] is not None:
            width = self.config.model_config.get_hidden_size()
            reading.gate = read_gate(Path(settings["gate_file"]), width)
        for _, data, size in self.tensors.values():
            data.untyped_storage().resize_(size)
            if data.is_floating_point():
                data.fill_(torch.nan)  # until a tensor of the memory's takes its place
        digests: list[bytes] = []
        loaded = self.module.load_weights(self._tensors(settings, digests))
        for name, parameter in self.module.named_parameters():
            if name not in loaded or (parameter.is_floating_point() and parameter.isnan().any()):
                raise MemdecError(
                    f"The memory {settings['model']} is not whole: it has no, or only a part of, "
                    f"{name}: copy or build it again."
                )
        process_weights_after_loading(self.module, self.config.model_config, torch.device("cpu"))
        # Sorted: a file gives its tensors in any order.
        reading.digest = hashlib.sha256(b"".join(sorted(digests))).hexdigest()

    def _tensors(
        self, settings: dict[str, Any], digests: list[bytes]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of a memory's files, of each of which a digest is kept."""
        # Read, not mapped: a file that is cut short meanwhile would end the process.
        load_config = LoadConfig(safetensors_load_strategy="eager", use_tqdm_on_load=False)
        source = DefaultModelLoader.Source(settings["model"], revision=settings["revision"])
        for name, tensor in DefaultModelLoader(load_config)._get_weights_iterator(source):
            digest = hashlib.sha256(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            digests.append(digest.digest())
            yield name, tensor

    def pairs(self, live: nn.Module) -> list[tuple[Any, Any]]:
        """Return what has come of the spare, each with what is in its place in a live module."""
        mine, theirs = dict(self.module.named_parameters()), dict(live.named_parameters())
        assert mine.keys() == theirs.keys(), "one shape"
        found: list[tuple[Any, Any]] = [(theirs[name].data, mine[name].data) for name in mine]
        for layer, other in zip(self.module.modules(), live.modules(), strict=True):
            found += zip(packed(other), packed(layer), strict=True)
        for theirs_, mine_ in found:
            assert isinstance(mine_, Packed) or (
                theirs_.shape == mine_.shape and theirs_.dtype == mine_.dtype
            ), "one shape"
        return found

    @torch.no_grad()
    def move(self, live: nn.Module) -> None:
        """Put what was read into the places of a live module; called between two steps."""
        for theirs, mine in self.pairs(live):
            if isinstance(mine, Packed):
                theirs.exchange(mine)
            else:
                theirs.copy_(mine)
