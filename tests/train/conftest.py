"""Shared by the tests of the compile pipeline: English text, quick settings, the real command."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import faiss
import pytest
import torch
import yaml
from support import hub_server
from support.forked_cli import Forked
from typer.testing import CliRunner

from vllm_memdec.kernels import sparse_kl

ROOT = Path(__file__).parents[2]
MEMDEC = Path(sys.executable).with_name("memdec")
# Tiny models lose by a second thread, and far more where cores are shared.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
ENVIRONMENT.pop("TRITON_INTERPRET", None)  # of tests/kernels; users have the loss in PyTorch here

QUICK = {
    "corpus": {"block_tokens": 32, "shard_blocks": 16},
    "datastore": {"dtype": "float32", "batch_blocks": 8},
    "targets": {"neighbours": 16},
    "memory": {"layers": 1, "epochs": 2, "dtype": "float32"},
    "export": {"dtype": "float32"},
}


@pytest.fixture(autouse=True, scope="session")
def users_loss():
    """Train with the loss in PyTorch: Triton's interpreter takes milliseconds a row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_kl, "INTERPRETED", False)
        yield


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def quick():
    """Return a function: settings that suit a tiny model, with changes {stage: {name: value}}."""

    def make(changes: dict | None = None) -> dict:
        made = {
            s: values | (changes or {}).get(s, {})
            for s, values in ({"index": {}, "update": {}} | QUICK).items()
        }
        if "init" in made["memory"]:  # a folder keeps its own layers
            del made["memory"]["layers"]
        return made

    return make


@pytest.fixture(scope="session")
def english():
    """Return a function: documents of sentences drawn from the licence text."""
    licence = " ".join((ROOT / "LICENSE").read_text().split())
    sentences = [s for s in re.split(r"(?<=[.;:,]) ", licence) if len(s) > 20]

    def make(documents: int, sentences_each: int = 6, seed: int = 0) -> list[str]:
        rng = random.Random(seed)
        return [" ".join(rng.choices(sentences, k=sentences_each)) for _ in range(documents)]

    return make


@pytest.fixture(scope="session")
def jsonl():
    """Return a function that writes texts as a .jsonl corpus."""

    def write(path: Path, texts: list[str]) -> Path:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write


@pytest.fixture(scope="session")
def memdec_here():
    """Return a function that runs `memdec WORDS` in this process: (exit code, stdout, stderr).

    Where nothing but the answer is tested, it saves the seconds that torch takes to import.
    """
    from vllm_memdec.train.cli import app

    def run(*words: object) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, [str(w) for w in words], env={"COLUMNS": "200"})
        if not isinstance(done.exception, (SystemExit, type(None))):
            raise done.exception
        return done.exit_code, done.stdout, done.stderr

    return run


class Command:
    """Runs `memdec build` in a process group of its own; see also here()."""

    def __init__(
        self, folder: Path, base: str, corpus: Path, settings: dict | str, memdec_here: Callable
    ) -> None:
        self.memdec_here = memdec_here
        folder.mkdir(parents=True, exist_ok=True)
        self.output, config = folder / "out", folder / "settings.yaml"
        config.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
        self.options = {
            "--base": base, "--corpus": corpus, "--output": self.output, "--config": config,
            "--ray-address": "none",  # but where Ray is what is tested: it takes seconds to start
        }  # fmt: skip

    def words(self, options: dict) -> list[str]:
        """Return the command's words, with options changed; those that are None are left out."""
        chosen = self.options | {f"--{name}": value for name, value in options.items()}
        pairs = (pair for pair in chosen.items() if pair[1] is not None)
        return ["build", *(str(word) for pair in pairs for word in pair)]

    def start(self, *prefix: str, **options) -> "subprocess.Popen | Forked":
        """Start it, with options changed and perhaps under another command."""
        words = self.words(options)
        if not prefix and "none" in words:  # Ray's processes start as their driver did
            return Forked(words, self.output.parent, ENVIRONMENT)
        return subprocess.Popen(
            [*prefix, str(MEMDEC), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            start_new_session=True,
            # A suite started in the background may have ctrl-C switched off, and hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *prefix: str, **options) -> tuple[int, str]:
        """Run it to its end; return exit code and what it printed on stderr."""
        process = self.start(*prefix, **options)
        out, err = process.communicate(timeout=300)
        assert out == ""
        return process.returncode, err

    def here(self, **options) -> tuple[int, str]:
        """Run it in this process; return exit code and what it printed on stderr."""
        code, out, err = self.memdec_here(*self.words(options))
        assert out == ""
        return code, err

    @staticmethod
    def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> str:
        """Signal the whole process group; return what it had printed on stderr."""
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(process.pid, number)
        return process.communicate(timeout=60)[1]


@pytest.fixture
def command(tmp_path, memdec_here):
    """Return a function that prepares `memdec build` in a fresh folder."""

    def make(base, corpus, settings, folder="command") -> Command:
        return Command(tmp_path / folder, base, corpus, settings, memdec_here)

    return make


@pytest.fixture(scope="session")
def hashes():
    """Return a function: the manifest hash of every stage under an output folder."""
    from vllm_memdec.train.pipeline import STAGES

    def read(output: Path) -> dict[str, str]:
        return {s: json.loads((output / s / "manifest.json").read_text())["hash"] for s in STAGES}

    return read


@pytest.fixture(scope="session")
def build(quick):
    """Return a function that runs the whole pipeline here and returns the lines it said."""
    from vllm_memdec.train.executor.context import Context
    from vllm_memdec.train.pipeline import build as run
    from vllm_memdec.train.progress import Progress
    from vllm_memdec.train.settings import parse_settings

    class Listening(Progress):
        def say(self, line):
            self.lines.append(line)

    def make(
        base, corpus, output, changes=None, validation=None, until="export", update=None
    ) -> list[str]:
        progress = Listening()
        progress.lines = []
        settings = parse_settings(quick(changes))
        run(base, corpus, output, settings, validation, Context(progress), until, update)
        return progress.lines

    return make


@pytest.fixture(scope="session")
def pipeline(tiny_model, tmp_path_factory, english, jsonl, build):
    """Return a finished run on some English: base, corpus, output, lines. Not to be changed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pipeline")
    base, corpus = tiny_model("llama"), jsonl(folder / "corpus.jsonl", english(40))
    lines = build(base, corpus, folder / "out")
    return SimpleNamespace(base=base, corpus=corpus, output=folder / "out", lines=lines)


@pytest.fixture
def server():
    """Return a hub that a server on this machine speaks for; its address is `url`."""
    content = hub_server.Hub()
    running = hub_server.start(content)
    content.url = f"http://127.0.0.1:{running.server_port}"
    yield content
    running.shutdown()
    running.server_close()


@pytest.fixture
def online(server, tmp_path, monkeypatch):
    """Let this process ask the server, with a cache of its own."""
    from huggingface_hub import constants

    from vllm_memdec.train.data import hub

    monkeypatch.setattr(hub, "OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    files = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    return server
