"""The README's tables are what the committed CSV files say, and nothing is missing in them."""

import ast
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.corpora import domains
from benchmarks.systems.registry import SYSTEMS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_readme_has_the_table(name):
    [found] = tables.block(name).findall(tables.README.read_text())
    assert found == tables.TABLES[name]()


def marked() -> set[str]:
    """Return the first argument of every feature(...) in the serving tests."""
    names = set()
    for path in (ROOT / "tests/serving").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called == "feature":
                names.add(ast.literal_eval(node.args[0]))
    return names


def test_every_feature_was_run_and_holds():
    status = {row["feature"]: row["status"] for row in tables.read(tables.FEATURES)}
    assert set(status) == marked()
    assert set(status.values()) == {"works", "refused"}
    assert list(status.values()).count("works") >= 24


def test_every_system_was_measured_in_every_domain():
    rows = tables.read(tables.RESULTS / "quality.csv")
    titles = [system.title for system in SYSTEMS]
    found = {(row["domain"], row["system"]) for row in rows}
    assert len(rows) == len(found)
    assert found == {(domain, title) for domain in domains.DOMAINS for title in titles}
    for row in rows:
        base = float(next(r for r in rows if r["domain"] == row["domain"])["perplexity"])
        assert float(row["change"]) == pytest.approx(float(row["perplexity"]) / base - 1, abs=1e-3)
