"""What `pip install` gives: one package, both entry points, and an import that costs nothing."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vllm_memdec import __version__

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.py", "README.md", "LICENSE", "vllm_memdec", "kernels", "train")
HEAVY = ("torch", "vllm", "transformers", "numpy", "faiss", "ray", "typer", "rich")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy of the sources, so that nothing stale gets in, nothing out."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    options = ["--no-deps", "--no-build-isolation", "--use-pep517", "--no-index", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(folder), *options, "-w", str(folder / "out")],
        check=True,
    )
    (path,) = (folder / "out").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Return a function that runs Python code where only the wheel is installed."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    options = ["--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", *options], check=True
    )

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [str(folder / "bin" / words[0]), *words[1:]]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder)

    return run


def python(installed, code: str) -> str:
    done = installed("python", "-I", "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_holds_only_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vllm_memdec"}
    for folder, link in ((ROOT / "kernels", "kernels"), (ROOT / "train", "train")):
        files = {p.relative_to(folder) for p in folder.rglob("*.py")}
        expected = {f"vllm_memdec/{link}/{path}" for path in files}
        assert len(expected) > 3 and expected <= set(names)
    configs = {f"vllm_memdec/train/configs/{p.name}" for p in ROOT.glob("train/configs/*.yaml")}
    assert len(configs) >= 2 and configs <= set(names)
    assert {"vllm_memdec/bases.csv", "vllm_memdec/py.typed"} <= set(names)
    parts = {f"vllm_memdec/train/playground/page.{kind}" for kind in ("html", "js")}
    assert parts <= set(names)
    for folder in ("vllm_memdec", "vllm_memdec/compat"):
        ours = {f"{folder}/{p.name}" for p in ROOT.glob(f"{folder}/*.py")}
        assert ours and ours <= set(names)


def test_entry_points_are_registered(installed):
    code = """
from importlib.metadata import entry_points
for group in ("vllm.general_plugins", "console_scripts"):
    for e in entry_points(group=group):
        print(group, e.name, e.value)
"""
    assert python(installed, code).splitlines() == [
        "vllm.general_plugins memdec vllm_memdec:register",
        "console_scripts memdec vllm_memdec.train.cli:main",
    ]


def test_import_costs_nothing(installed):
    code = f"""
import sys
import vllm_memdec, vllm_memdec.plugin
print(vllm_memdec.__version__, sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    assert python(installed, code) == f"{__version__} []"
    here = subprocess.run(  # where they are installed they could be imported
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert here.stdout.strip() == f"{__version__} []"


def test_without_vllm_the_plugin_says_so(installed):
    done = installed("python", "-I", "-c", "import vllm_memdec; vllm_memdec.register()")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "vllm" in last.lower() and "Error: " in last


def test_without_the_train_extra_the_command_says_so(installed):
    done = installed("memdec", "build")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "memdec: typer is not installed: pip install 'vllm-memdec[train,cpu]', or [train,cuda].\n"
    )


def test_source_folders_are_no_packages_and_links_resolve():
    for name in ("kernels", "train"):
        assert not (ROOT / name / "__init__.py").exists()  # it would shadow other packages
        link = ROOT / "vllm_memdec" / name
        assert link.is_symlink() and link.resolve() == ROOT / name
    tracked = subprocess.run(
        ["git", "ls-files", "-s", "vllm_memdec"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    if tracked:  # absent in an unpacked archive
        modes = {line.split("\t")[1]: line.split()[0] for line in tracked.splitlines()}
        assert modes["vllm_memdec/kernels"] == modes["vllm_memdec/train"] == "120000"


def test_version_is_written_once(wheel):
    assert wheel.name.startswith(f"vllm_memdec-{__version__}-")
    assert __version__ not in (ROOT / "setup.py").read_text()
