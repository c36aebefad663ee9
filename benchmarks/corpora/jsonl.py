"""Texts as .jsonl corpora, one document a line."""

import json
from collections.abc import Iterable
from pathlib import Path

from vllm_memdec.train.data.artifacts import write_atomic


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """Write texts as the lines of a .jsonl corpus, whole or not at all; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
    write_atomic(path, lambda temporary: temporary.write_text(lines))
    return path
