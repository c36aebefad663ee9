"""The pages' tables are what the committed CSV files say, and nothing is missing in them."""

import ast
import html
import re
from pathlib import Path

import pytest
from support import base_rows

from benchmarks import csv_rows, overview, pair_tables, tables
from benchmarks.corpora import domains
from benchmarks.systems.registry import SYSTEMS
from vllm_memdec.train.plan import recall

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", tables.TABLES)
def test_one_page_has_the_table(name):
    [found] = [t for page in tables.pages() for t in tables.block(name).findall(page.read_text())]
    assert found == tables.TABLES[name]()


def test_a_page_gets_the_tables_that_it_has_marks_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "| 1 |\n", "two": lambda: "| 2 |\n"})
    monkeypatch.setattr("sys.argv", ["tables", "--readme"])
    monkeypatch.setattr(overview, "PICTURE", tmp_path / "picture.svg")
    (tmp_path / "train").mkdir()
    front, train = tmp_path / "README.md", tmp_path / "train/README.md"
    front.write_text("<!-- one -->\nold\n<!-- /one -->\nsee train\n")
    train.write_text("# two\n<!-- two -->\n<!-- /two -->\n")
    tables.main()
    assert front.read_text() == "<!-- one -->\n| 1 |\n<!-- /one -->\nsee train\n"
    assert train.read_text() == "# two\n<!-- two -->\n| 2 |\n<!-- /two -->\n"
    assert overview.PICTURE.read_text().startswith("<?xml")


def test_no_page_has_a_table_of_figures_that_is_not_generated():
    for page in tables.pages():
        text = page.read_text()
        for name in tables.TABLES:
            text = tables.block(name).sub("", text)
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert not [row for row in rows if re.search(r"\| *[-+]?\d", row)], page


def test_the_picture_shows_the_rows():
    svg = overview.PICTURE.read_text()
    assert html.escape(overview.shown(), quote=False) in svg.replace("&quot;", '"')


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
    rows = tables.read(tables.FEATURES)
    status = {row["feature"]: row["status"] for row in rows}
    assert set(status) == marked()
    assert {row["drafts"] for row in rows} <= {"works", "refused", "not run", ""}
    assert set(status.values()) == {"works", "refused"}
    assert list(status.values()).count("works") >= 24


def test_every_base_was_run():
    rows = base_rows.rows()
    assert [*rows] == base_rows.NAMES
    assert {row["drafts"] for row in rows.values()} <= {"works", "refused on a CPU"}
    for row in rows.values():
        assert row["architecture"] and row["kind"] and row["dtype"], row
        assert float(row["error"]) < (1e-4 if row["dtype"] == "float32" else 5e-3), row


def test_plan_has_the_curve_that_was_measured():
    points, rag = pair_tables.curve(tables.read(tables.RESULTS / "recall.csv"))
    assert ([*recall.CURVE], recall.RAG) == (points, rag)


def test_tables_of_recall(tmp_path, monkeypatch):
    """Rows of two domains: the curve is their mean, and RAG is passed between two budgets."""
    names = ("domain", "pair", "budget", "system", "epochs", "tflop", "original", "question")
    rows = [
        dict(zip((*names, "timestamp"), (*row.split(";"), "2026"), strict=True))
        for domain, shift in (("law", 0), ("factbook", 0.1))
        for row in (
            f"{domain};p;paper;base;0;0;0;0",
            f"{domain};p;paper;RAG (BM25);0;0;{0.3 + shift};0.2",
            f"{domain};p;paper;base + memory;2;1.5;{0.1 + shift};0",
            f"{domain};p;paper;base + memory;6;4.5;{0.5 + shift};0.1",
        )
    ]
    assert pair_tables.curve(rows) == ([(2.0, 0.15), (6.0, 0.55)], 0.35)
    assert pair_tables.passes(rows[:4], "original") == "4 epochs"
    assert pair_tables.passes(rows[:4], "question") == "not within 6 epochs"
    monkeypatch.setattr(pair_tables, "read", lambda path: rows)
    shown = pair_tables.recall()
    assert "| law, p | base + memory | 6 | 4.5 | 50% | 10% |" in shown
    assert "| law, p | the memory passes RAG at |  |  | 4 epochs | not within 6 epochs |" in shown
    monkeypatch.setattr(recall, "CURVE", ((2.0, 0.15), (6.0, 0.55)))
    monkeypatch.setattr(recall, "RAG", 0.35)
    assert recall.epochs_until(0.35) == pytest.approx(4) and recall.epochs_until(0.6) is None
    assert recall.recalled(1) == pytest.approx(0.075)
    assert "35% stick after 4 epochs" in recall.sentence(4)
    assert recall.sentence(20).endswith(
        "(measured up to 6); retrieval's 35% is passed after 4 epochs"
    )


def test_every_system_was_measured_in_every_domain():
    rows = csv_rows.usual(tables.read(tables.RESULTS / "quality.csv"))
    titles = [system.title for system in SYSTEMS]
    found = {(row["domain"], row["system"]) for row in rows}
    assert len(rows) == len(found)
    assert found == {(domain, title) for domain in domains.DOMAINS for title in titles}
    for row in rows:
        base = float(next(r for r in rows if r["domain"] == row["domain"])["perplexity"])
        assert float(row["change"]) == pytest.approx(float(row["perplexity"]) / base - 1, abs=1e-3)
