"""Who may import whom, read from the syntax tree of every file (functions' bodies included)."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("vllm_memdec", "kernels", "train", "benchmarks", "tests")
FAISS = (
    "train/plan/index_rates.py",
    "train/stages/faiss_gpu.py",
    "train/stages/index.py",
    "train/stages/search.py",
)
RAY = ("train/executor/ray_executor.py", "train/executor/ray_crew.py")
LINKS = (ROOT / "vllm_memdec/kernels", ROOT / "vllm_memdec/train")
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if not any(path.is_relative_to(link) for link in LINKS)
)


def imported(source: str) -> set[str]:
    """Return the dotted names a source imports; `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            names |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return names


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def forbidden(file: str, name: str) -> str | None:
    """Return why a file, given by its path in the repository, may not import a name."""
    folder = file.split("/")[0]
    if within(name, "kernels", "train"):
        return "a second copy: import vllm_memdec.kernels or vllm_memdec.train"
    if folder in ("benchmarks", "tests"):
        return None
    if within(name, "benchmarks", "tests"):
        return "nothing imports benchmarks or tests"
    if within(name, "faiss") and file not in FAISS:
        return "faiss belongs to what writes an index, searches it or times it"
    if within(name, "ray") and file not in RAY:
        return "ray belongs to train/executor/ray_executor.py and its processes, ray_crew.py"
    root = name.split(".")[0]
    if folder == "kernels" and not (
        root in sys.stdlib_module_names or within(name, "torch", "triton", "vllm_memdec.kernels")
    ):
        return "kernels need torch and triton only"
    if folder == "vllm_memdec" and within(name, "vllm_memdec.train"):
        return "serving does not need training"
    if folder == "train":
        if within(name, "vllm"):
            return "training does not need vLLM"
        if file == "train/cli.py" and within(name, "vllm_memdec.check"):
            return None  # the command is of both halves
        shared = [
            f"vllm_memdec.{module}"
            for module in ("checkpoint", "errors", "gate", "kernels", "train")
        ]
        if root == "vllm_memdec" and not within(name, *shared):
            return "training shares kernels and what lies in a memory's folder with serving"
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_keep_to_the_rule(path):
    file = str(path.relative_to(ROOT))
    found = {name: forbidden(file, name) for name in imported(path.read_text())}
    assert not {name: why for name, why in found.items() if why}


def test_all_files_are_looked_at():
    files = {str(p.relative_to(ROOT)) for p in FILES}
    assert {"train/stages/index.py", "vllm_memdec/checkpoint.py", "tests/test_imports.py"} <= files
    assert any(f.startswith("kernels/") for f in files)
    assert not any(f.startswith(("vllm_memdec/train/", "vllm_memdec/kernels/")) for f in files)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("train/a.py", "import vllm"),
        ("train/a.py", "def f():\n    from vllm.config import ModelConfig"),
        ("train/a.py", "from vllm_memdec import plugin"),
        ("train/a.py", "from vllm_memdec import check"),
        ("train/a.py", "from vllm_memdec.model import MemDecForCausalLM"),
        ("train/stages/targets.py", "import faiss.contrib"),
        ("train/a.py", "import ray"),
        ("vllm_memdec/a.py", "from vllm_memdec.train import settings"),
        (
            "vllm_memdec/a.py",
            "import importlib\nimportlib.import_module('vllm_memdec.train.stages.index')",
        ),
        ("vllm_memdec/a.py", "import faiss"),
        ("kernels/a.py", "import vllm"),
        ("kernels/a.py", "import numpy"),
        ("kernels/a.py", "from vllm_memdec.checkpoint import read_block"),
        ("tests/a.py", "from train import config"),
        ("benchmarks/a.py", "import kernels.interpolate"),
    ],
)
def test_the_rule_sees_what_breaks_it(file, source):
    assert any(forbidden(file, name) for name in imported(source))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("train/stages/index.py", "import faiss"),
        ("train/stages/search.py", "from faiss.contrib import ivf_tools"),
        ("train/a.py", "from vllm_memdec.checkpoint import read_block"),
        ("train/a.py", "from vllm_memdec.gate import read_gate"),
        ("train/cli.py", "from vllm_memdec import check"),
        ("train/a.py", "from vllm_memdec.kernels.sparse_kl import sparse_kl"),
        ("train/a.py", "from vllm_memdec.train.settings import Settings"),
        ("kernels/a.py", "import math, torch, triton.language"),
        ("vllm_memdec/a.py", "from vllm.config import VllmConfig"),
        ("tests/a.py", "from vllm_memdec.train import settings\nimport faiss"),
    ],
)
def test_the_rule_allows_what_it_should(file, source):
    assert not any(forbidden(file, name) for name in imported(source))


# What a wing of train/ may import: those before it. Files in no wing are for all (the first row) or
# stand above the wings that they use.
WINGS = (
    ("settings", "settings_errors", "progress", "faults", "trust", "heap"),
    ("data",), ("executor",), ("model",), ("training",), ("stages",), ("pipeline",), ("seeding",),
    ("verify",), ("plan",), ("evaluation",), ("options", "explained"), ("playground",),
    ("sharing",), ("cli",),
)  # fmt: skip
WING = {name: number for number, names in enumerate(WINGS) for name in names}


def graph(folder: str, package: str) -> dict[str, set[str]]:
    """Return what each module of a folder imports of it, functions' bodies included."""
    root = ROOT / folder
    files = [path for path in FILES if path.is_relative_to(root)]
    modules = {
        ".".join([package, *path.relative_to(root).with_suffix("").parts]): path for path in files
    }
    imports = {}
    for module, path in modules.items():
        names = imported(path.read_text())
        imports[module] = {m for m in modules if m != module and any(within(n, m) for n in names)}
    return imports


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that reach each other."""
    reach = {module: set(found) for module, found in imports.items()}
    for middle in imports:
        for found in reach.values():
            if middle in found:
                found |= reach[middle]
    groups = {frozenset(m for m in reach[a] if a in reach[m]) for a in reach if a in reach[a]}
    return sorted(sorted(group) for group in groups)


@pytest.mark.parametrize(
    ("folder", "package"),
    [
        ("vllm_memdec", "vllm_memdec"),
        ("train", "vllm_memdec.train"),
        ("kernels", "vllm_memdec.kernels"),
        ("benchmarks", "benchmarks"),
    ],
)
def test_no_module_imports_itself_through_others(folder, package):
    imports = graph(folder, package)
    assert len(imports) > 3 and any(imports.values())
    assert not circles(imports)


def test_a_circle_is_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]


def test_imports_between_wings_run_one_way():
    wings = {}
    for module, found in graph("train", "vllm_memdec.train").items():
        for other in (module, *found):
            name = other.split(".")[2]
            assert name in WING, f"{other}: name its wing above"
        mine = WING[module.split(".")[2]]
        wings[module] = {m for m in found if WING[m.split(".")[2]] > mine}
    assert not {module: later for module, later in wings.items() if later}


LINES, TEST_LINES = 400, 500
LONGER: dict[str, str] = {}  # file -> why it is one


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    file, lines = str(path.relative_to(ROOT)), len(path.read_text().splitlines())
    if lines <= (TEST_LINES if file.startswith("tests/") else LINES):
        assert file not in LONGER, "it is short now: take it out of LONGER"
    else:
        assert file in LONGER, f"{lines} lines: divide it by its jobs"
