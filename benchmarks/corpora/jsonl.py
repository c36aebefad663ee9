"""Texts as .jsonl corpora, one document a line."""

import json
from collections.abc import Iterable
from pathlib import Path


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """Write texts as the lines of a .jsonl corpus and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
    return path
