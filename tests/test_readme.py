"""What the READMEs tell a person to type works, with the small demo in place of the full one."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.server import environment, free_port, run_server
from benchmarks.tables import pages

ROOT = Path(__file__).parent.parent
BLOCKS = [
    text
    for page in pages()
    for kind, text in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    if kind != "mermaid"
]
SMALL = {
    "build/demo": "build/demo-quick",
    "benchmarks/demo/demo.yaml": "benchmarks/demo/demo-quick.yaml",
}
BASE = "SmolLM2-135M-Instruct"
BIN = Path(sys.executable).parent


def block(start: str) -> str:
    """Return the pages' only code block that starts so, with the small demo's paths."""
    found = [text for text in BLOCKS if text.startswith(start)]
    assert len(found) == 1, f"the READMEs have {len(found)} blocks starting with {start!r}"
    text = found[0]
    for full, small in SMALL.items():
        text = text.replace(full, small)
    return text


@pytest.fixture(scope="module", autouse=True)
def users_shell():
    """Take back what other tests set for engines in their own process; commands here inherit it."""
    ours = [n for n in os.environ if n.startswith(("VLLM_", "TRITON_", "TORCHDYNAMO_"))]
    with pytest.MonkeyPatch.context() as patch:
        for name in ours:
            patch.delenv(name)
        yield


def run(command: str, timeout: int = 600) -> str:
    """Run shell lines as a person with the virtual environment active; return what they print."""
    env = environment()
    env["PATH"] = f"{BIN}:{env['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo():
    """Run the quickstart's first command and return its report."""
    demo_command, test_command = (
        line.split("#")[0].strip() for line in block("make demo").strip().splitlines()
    )
    assert test_command == "make test"  # this very run
    run(f"{demo_command} DEMO_OPTIONS=--quick")
    return json.loads((ROOT / "build/demo-quick/report.json").read_text())


def test_the_demo_reports_everything(demo):
    for key in ("base", "memory", "mixture", "knn_lm"):
        assert demo["perplexity"][key] > 1
    # By position; 0: the small demo's memory learns nothing.
    assert all(0 <= alpha <= 1 for _, alpha in demo["perplexity"]["alpha"])
    assert {"base", "mixture"} <= set(demo["general_perplexity"])
    assert demo["recall"]["facts"] == 8  # the small demo's; the full one asks 120
    assert {"base", "mixture"} <= set(demo["recall"])
    assert len(demo["facts"]) >= 10
    for row in demo["facts"]:
        assert all(0 <= row[p] <= 1 for p in ("p_base", "p_memory", "p_mixture")), row
    assert demo["versions"]["vllm"] and demo["commit"]
    for stage in ("corpus", "datastore", "index", "targets", "memory", "export"):
        assert demo["seconds"][f"memdec build: {stage}, when it was built"] >= 0
    assert "exact recall" in (ROOT / "build/demo-quick/report.md").read_text()


def test_install_command():
    """Everything is installed: pip only has to find that out."""
    command = block("pip install").strip()
    printed = run(f"python -m {command} --dry-run --no-index --no-build-isolation --no-deps")
    assert "Would install vllm-memdec-" in printed


def test_commands_on_a_build(demo, tmp_path):
    run(block("memdec build").replace("build/my-memory", str(tmp_path / "memory")))
    assert json.loads((tmp_path / "memory/export/config.json").read_text())["memdec"]["alpha"] >= 0
    commands = block("memdec plan").replace("build/my-memory", str(tmp_path / "memory"))
    plan, verify, evaluate = (f"memdec {words}" for words in commands.split("memdec ")[1:])
    printed = run(plan)
    assert all(stage in printed for stage in ("datastore", "targets", "memory", "1e+10"))
    run(f"{verify.strip()} --json {tmp_path}/found.json || test $? = 1")
    checks = json.loads((tmp_path / "found.json").read_text())["checks"]
    # The small demo's memory learns nothing, see above, and that is said.
    assert [check["name"] for check in checks if check["status"] == "FAILED"] == ["fidelity"]
    assert "base" in run(evaluate)
    printed = run(block("memdec alpha").replace("build/my-memory", str(tmp_path / "memory")))
    assert "alpha_by_context" in printed
    calibrate = block("memdec calibrate").replace("build/my-memory", str(tmp_path / "memory"))
    assert "general" in run(calibrate)
    assert (tmp_path / "memory/export/memdec_gate.npz").exists()


def test_explain_command(demo):
    printed = run(block("memdec explain"))
    assert "P(mixture)" in printed and "written by the mixture" in printed
    assert "comes from" in printed or "no sources" in printed  # a memory may have learnt nothing
    assert "<title>memdec explain</title>" in (ROOT / "build/explain.html").read_text()


def test_seed_command(demo, tmp_path):
    """As printed: a third of the demo's base heals on the demo's text and starts a memory."""
    text = ROOT / "build/demo-quick-text/corpus.jsonl"
    commands = re.sub(r"build/(seed|memory)", rf"{tmp_path}/\1", block("memdec seed"))
    commands = re.sub(r"general.jsonl|corpus.jsonl", str(text), commands)
    run(commands.replace("models/base", f"build/{BASE}"))
    config = json.loads((tmp_path / "memory/export/config.json").read_text())
    assert config["num_hidden_layers"] == 10


def test_check_command(demo):
    printed = run(block("memdec check")).splitlines()
    assert len(printed) == 4 and printed[:2] == printed[2:]
    assert printed[0].startswith("supported: LlamaForCausalLM")
    assert printed[1] == "drafts by the memory: work"


def serve_and_run(serve: str, commands: list[str], folder: Path) -> tuple[list[str], str]:
    """Run a server and commands as printed; return what each prints, and the server's log."""
    port = free_port()
    command = shlex.split(serve.replace("\\\n", " "))
    command[0] = str(BIN / command[0])
    options = ["--port", str(port), "--max-model-len", "256", "--enforce-eager"]
    with run_server([*command, *options], port, folder / "log"):
        printed = [run(command.replace(":8000", f":{port}")) for command in commands]
    return printed, (folder / "log").read_text()


def serve_and_curl(serve: str, curl: str, folder: Path) -> tuple[str, str]:
    """Run a server and a request as printed; return the answer's text and the server's log."""
    [printed], log = serve_and_run(serve, [curl], folder)
    return json.loads(printed)["choices"][0]["text"], log


SERVE = f"vllm serve build/{BASE} --model-impl memdec"


def test_serve_and_curl(demo, tmp_path):
    answer, log = serve_and_curl(block(f"{SERVE} \\\n"), block("curl"), tmp_path)
    # The README names this line as the sign that the memory is live.
    assert answer and re.search(r"memdec: memory 'memory' .*, alpha", log)


def test_several_memories(demo, tmp_path):
    serve, curl = block(f"{SERVE} --additional-config").split("curl", maxsplit=1)
    answer, log = serve_and_curl(serve, f"curl{curl}", tmp_path)
    assert answer and len(re.findall(r"memdec: memory '(?:countries|cautious)'", log)) == 2


def test_memories_in_and_out(demo, tmp_path, monkeypatch):
    setting, rest = block("export MEMDEC_").split("\n", maxsplit=1)
    monkeypatch.setenv(*setting.removeprefix("export ").split("="))
    serve, *curls = re.split(r"\n(?=curl)", rest)
    (loaded, listed, answer, unloaded), log = serve_and_run(serve, curls, tmp_path)
    assert loaded == "Success: memory 'countries' loaded from build/demo-quick/export."
    assert [slot["name"] for slot in json.loads(listed)["slots"]] == ["countries", None]
    answer = json.loads(answer)
    assert answer["model"] == "countries" and answer["choices"][0]["text"]
    assert unloaded == "Success: memory 'countries' unloaded."
    assert log.count("memdec: slot ") == 2


def test_python_example(demo, monkeypatch):
    """In this process: it has vLLM imported, three more that import it take half a minute."""
    from vllm_memdec.kernels import interpolate

    for name, value in (environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(interpolate, "INTERPRETED", False)  # users have the mixture in PyTorch
    # vLLM 0.32 looks at every attribute of every module, and trips over llvmlite's, which bm25s
    # brings into processes that have tested a benchmark.
    for name in [name for name in sys.modules if name.split(".")[0] == "llvmlite"]:
        monkeypatch.delitem(sys.modules, name)
    small = "enforce_eager=True, max_model_len=256, additional_config"
    base, memory = (ROOT / "build" / name for name in (BASE, "demo-quick/export"))
    names = {"BASE": str(base), "MEMORY": str(memory)}
    exec(block("from vllm").replace("additional_config", small), names)
    names["llm"].llm_engine.engine_core.shutdown()


def test_every_block_is_run_here():
    starts = re.findall(r'block\(\s*f?"(.+?)"\)', Path(__file__).read_text())
    starts = [start.replace("{SERVE}", SERVE).replace("\\\\\\n", "\\\n") for start in starts]
    assert not [text for text in BLOCKS if not text.startswith(tuple(starts))]


def test_links_lead_somewhere():
    for page in pages():
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page} links {link}"


def test_the_front_page_is_short():
    """A person reads it; every other figure has a page of its own."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    assert re.findall(r"<!-- (\w+) -->", text) == ["overview"]
