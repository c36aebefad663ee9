"""Every script of benchmarks/ starts and explains itself, and none imports another."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text()
    for path in sorted((ROOT / "benchmarks").rglob("*.py"))
}
SCRIPTS = [name for name, source in SOURCES.items() if '__name__ == "__main__"' in source]


def imported(source: str) -> set[str]:
    """Return the modules of benchmarks that a source imports, functions' bodies included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & set(SOURCES)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_explains_itself(name, monkeypatch, capsys):
    """And its docstring tells how it is started."""
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out
    commands = re.findall(r"python -m (benchmarks[\w.]*)", module.__doc__)
    assert set(commands) <= set(SCRIPTS)
    assert commands or "`make " in module.__doc__


@pytest.mark.parametrize("name", SOURCES)
def test_no_module_imports_a_script(name):
    assert not imported(SOURCES[name]) & set(SCRIPTS)


def test_commands_of_other_folders_name_scripts():
    """In README and Makefile, and in the docstrings of what is measured."""
    files = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "kernels").glob("*.py")]
    files += (ROOT / "train").rglob("*.py")
    for path in files:
        for command in re.findall(r"python\)? -m (benchmarks[\w.]*\w)", path.read_text()):
            assert command in SCRIPTS, f"{path}: {command}"
