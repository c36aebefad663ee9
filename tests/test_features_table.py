"""The README's table of features is what the last `make features` found, and nothing is missing."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import features  # noqa: E402


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


def test_the_readme_has_the_table():
    [found] = features.BLOCK.findall(features.README.read_text())
    assert found == features.markdown(features.read())


def test_every_row_was_run_and_holds():
    status = {row["feature"]: row["status"] for row in features.read()}
    assert set(status) == marked()
    assert set(status.values()) == {"works", "refused"}
    assert list(status.values()).count("works") >= 24
