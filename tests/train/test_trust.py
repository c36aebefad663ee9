"""Models that bring Python code of their own: refused in one sentence, or run where one says so."""

import json
import shutil

import pytest
import ray

from vllm_memdec.train.executor.ray_executor import QUIET, RayExecutor
from vllm_memdec.train.trust import VARIABLE, allow_code, code_allowed

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).write_text("it ran")


class OwnConfig(LlamaConfig):
    model_type = "llama_of_its_own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
OWN = {
    "config.json": {
        "model_type": "llama_of_its_own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    },
    "tokenizer_config.json": {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
    },
}
REFUSED = "needs code of its own, which is not run unasked: read its .py files, then give --trust-r"


@pytest.fixture
def own(tiny_model, tmp_path, monkeypatch):
    """Return a function: a model of tiny weights whose named files name code; and its marker."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.delenv(VARIABLE, raising=False)

    def make(*names):
        folder = shutil.copytree(tiny_model("llama"), tmp_path / "own")
        for name in names:
            content = json.loads((folder / name).read_text()) | OWN[name]
            (folder / name).write_text(json.dumps(content))
        (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
        return folder, tmp_path / "marker"

    yield make
    allow_code(False)


@pytest.mark.parametrize("name", OWN)
def test_code_is_not_run_unasked(own, pipeline, command, quick, name, monkeypatch):
    folder, marker = own(name)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    memdec = command(str(folder), pipeline.corpus, quick())
    code, err = memdec.here()
    assert code == 1 and REFUSED in err and len(err.splitlines()) == 1, err
    assert not marker.exists()


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--base", "OWN", "--tokens", "5000", "--ray-address", "none"),
        ("explain", "a", "--base", "OWN", "--memory", "EXPORT"),
        ("calibrate", "EXPORT", "--base", "OWN", "--domain", "CORPUS", "--general", "CORPUS"),
        ("verify", "BUILD", "--base", "OWN"),
    ],
    ids=lambda words: words[0],
)
def test_every_command_refuses_it(own, pipeline, memdec_here, words):
    folder, marker = own(*OWN)
    out = pipeline.output
    given = {"OWN": folder, "EXPORT": out / "export", "BUILD": out, "CORPUS": pipeline.corpus}
    code, out, err = memdec_here(*(given.get(word, word) for word in words))
    assert code == 1 and not marker.exists()
    assert words[0] == "verify" or REFUSED in err, err  # another base than the build's


def test_it_runs_where_one_says_so(own, pipeline, command, quick):
    """The export is of that class, and brings the code along."""
    folder, marker = own(*OWN)
    memdec = command(str(folder), pipeline.corpus, quick())
    code, _, err = memdec.memdec_here(*memdec.words({}), "--trust-remote-code")
    assert code == 0 and marker.exists(), err
    assert "--model-impl memdec --trust-remote-code" in " ".join(err.split())
    export = memdec.output / "export"
    assert json.loads((export / "config.json").read_text())["architectures"] == ["OwnModel"]
    assert (export / "own.py").exists()
    assert code_allowed()
    memdec.here(until="none")  # the answer of one command is not the next one's
    assert not code_allowed()


def test_workers_of_a_cluster_have_the_answer_too(monkeypatch):
    """Those of another machine do not inherit this process's environment."""
    from ray.cluster_utils import Cluster

    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(VARIABLE, raising=False)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        allow_code(True)
        assert RayExecutor(cluster.address).call(code_allowed)
    finally:
        allow_code(False)
        ray.shutdown()
        cluster.shutdown()
