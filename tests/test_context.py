"""benchmarks/quality/context.py on a tiny domain: rows by context, of text that was not learnt."""

from support.tiny_domain import tiny_domain

from benchmarks.quality import context
from benchmarks.quality.pair import Pair
from vllm_memdec.train.data.documents import documents


def test_a_memory_of_a_domain_is_read_in_short_and_long_contexts(tiny_model, monkeypatch, tmp_path):
    base = tiny_model("llama", positions=1024, spread=0.15)
    domain = tiny_domain(Pair("tiny", base), monkeypatch, tmp_path)
    monkeypatch.setattr(context, "WORK", tmp_path / "context")
    monkeypatch.setattr(context, "SIZES", {"tiny": domain.sizes})
    monkeypatch.setattr(context, "Sizes", lambda: domain.sizes)
    monkeypatch.setattr(context, "load_settings", lambda path: domain.settings)
    monkeypatch.setattr(context, "MAX_TOKENS", dict.fromkeys(context.MAX_TOKENS, 600))
    rows = context.of_domain("tiny", base, domain.progress)
    memory = domain.system(context.Memory)
    made = [path.name for path in domain.folder.glob("memory-*") if path.is_dir()]
    assert made == [f"memory-{memory.usual_rates[0]:g}-1"]
    assert {row["text"] for row in rows} == {"domain", "general"}
    for row in rows:
        assert set(context.NAMES) <= set(row) and row["domain"] == "tiny"
        assert row["best"] <= min(row["fixed"], row["base"]) + 1e-3
    learnt = [row for row in rows if row["text"] == "domain"]
    for system in ("mixture", "gate"):
        assert sum(row[system] for row in learnt) < sum(row["base"] for row in learnt)
    gate, scored = (
        set(documents(tmp_path / f"context/general-{use}.jsonl")) for use in ("gate", "scored")
    )
    assert gate and scored and not gate & scored
