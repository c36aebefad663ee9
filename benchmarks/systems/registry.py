"""The compared systems, in the order of the tables' rows: one line each."""

from benchmarks.systems.base import Base
from benchmarks.systems.finetune import Dapt, Lora
from benchmarks.systems.gated import Gated
from benchmarks.systems.knn_lm import KnnLm
from benchmarks.systems.memory import Memory, TokenMemory
from benchmarks.systems.rag import Bm25Rag, Bm25Rag16, MiniLmRag
from benchmarks.systems.system import System

SYSTEMS: tuple[type[System], ...] = (
    Base,
    Memory,
    Gated,
    TokenMemory,
    KnnLm,
    Bm25Rag,
    MiniLmRag,
    Bm25Rag16,
    Dapt,
    Lora,
)
