"""`memdec check`: the answer of a start, from folders without weights."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from support import bases
from support.tiny_models import save_tokenizer
from typer.testing import CliRunner

from vllm_memdec import check
from vllm_memdec.train.cli import app


@pytest.fixture
def bare(tiny_model, tmp_path):
    """Return a function that copies a tiny model without its weights, its config changed."""

    def make(kind, name="base", **changed):
        folder = tmp_path / name
        shutil.copytree(tiny_model(kind), folder, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((folder / "config.json").read_text()) | changed
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return make


@pytest.fixture
def run():
    """Return a function that runs `memdec check WORDS`: (exit code, stdout, stderr)."""
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed

    configure_logging_if_needed(LoggingConfig())  # into a stream that outlasts the command's

    def check_command(*words):
        done = CliRunner().invoke(app, ["check", *words])
        if not isinstance(done.exception, (SystemExit, type(None))):
            raise done.exception
        return done.exit_code, done.stdout, done.stderr

    return check_command


def sentence_at_start(base, memory):
    """Return what a start with them ends with."""
    from vllm import EngineArgs

    block = {"memdec": {"model": memory, "alpha": 0.5}}
    with pytest.raises(ValueError) as raised:
        EngineArgs(base, model_impl="memdec", additional_config=block).create_engine_config()
    return str(raised.value)


def test_supported(run, bare, tiny_model):
    base = bare("qwen3")
    expected = "supported: Qwen3ForCausalLM (Qwen3), dense\ndrafts by the memory: work\n"
    assert run(base) == (0, expected, "")
    assert run(base, tiny_model("llama", seed=1)) == (0, expected, "")
    shorter = expected.replace("dense", "dense, the memory for 64 of 256 positions")
    assert run(base, tiny_model("llama", seed=1, positions=64)) == (0, shorter, "")


def test_what_a_base_needs_on_a_cpu(run, tmp_path, monkeypatch):
    """A start without it is not refused, and answers wrong."""
    bases.lfm2().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    code, out, _ = run(str(tmp_path))
    assert code == 0 and f"hybrid, on a CPU with {bases.CASES['LFM2'].needs}\n" in out
    monkeypatch.setattr(check, "on_cpu", lambda: False)
    _, out, _ = run(str(tmp_path))
    assert "supported: Lfm2ForCausalLM (LFM2), hybrid\n" in out


def test_unknown(run, bare, tmp_path, monkeypatch):
    """An architecture that vLLM has and no test covers."""
    row = check.TESTED.read_text().splitlines()[0]
    (tmp_path / "none.csv").write_text(f"{row}\n")
    monkeypatch.setattr(check, "TESTED", tmp_path / "none.csv")
    code, out, _ = run(bare("qwen3"))
    assert code == 0 and out.startswith("unknown: Qwen3ForCausalLM: ")


def test_drafts_may_be_refused_alone(run, bare, monkeypatch):
    from vllm_memdec import startup

    def refuse(*arguments):
        raise ValueError("This base takes no drafts: leave them out.")

    monkeypatch.setattr(startup, "draft_with_memory", refuse)
    code, out, _ = run(bare("qwen3"))
    assert code == 0 and out.startswith("supported: ")
    assert out.endswith("by the memory: refused: This base takes no drafts: leave them out.\n")


def test_refused_as_at_start(run, bare, tiny_model):
    base = bare("qwen3")
    for memory in (bare("qwen3_moe", "moe"), tiny_model("llama", seed=1, tokenizer=7)):
        code, out, _ = run(base, memory)
        assert (code, out) == (1, f"refused: {sentence_at_start(base, memory)}\n")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"architectures": ["OfNobodyForCausalLM"]}, "['OfNobodyForCausalLM'] are not supported"),
        ({"architectures": ["OfNobodyForCausalLM"], "model_type": "nobodys"}, "type `nobodys` but"),
        # Of a malformed config; transformers lets it through, or says no more than the key.
        ({"rope_parameters": {"rope_type": "yarn"}}, "vLLM ends with KeyError ("),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": "two"}}, "with TypeError ("),
        ({"hidden_size": "wide"}, "with StrictDataclassFieldValidationError ("),
    ],
)
def test_what_vllm_refuses_is_one_sentence(changed, sentence, run, bare):
    code, out, err = run(bare("llama", **changed))
    assert code == 1 and out.startswith("refused: ") and sentence in out
    assert out.count("\n") == 1 and len(out) < 400 and err == ""


def test_custom_code(run, bare):
    """Its tokenizer is code, too: a start reads the config first."""
    base = bare("llama", model_type="own", auto_map={"AutoConfig": "own.Config"})
    file = Path(base, "tokenizer_config.json")
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    code, out, err = run(base)
    assert code == 1 and err == "" and out.count("\n") == 1
    assert "contains custom code" in out
    assert out.endswith("read its .py files, then give --trust-remote-code.\n")


def test_a_tokenizer_of_custom_code(run, bare):
    base = bare("llama")
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    Path(base, "tokenizer_config.json").write_text(json.dumps(own))
    code, out, _ = run(base)
    assert code == 1 and out.count("--trust-remote-code") == 1 and "copy the" not in out


def test_no_tokenizer(run, bare):
    base = bare("llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path(base, name).unlink()
    code, out, _ = run(base)
    assert code == 1 and "has no readable tokenizer" in out


def test_no_folder(run):
    code, out, err = run("/nowhere")
    assert (code, out, err) == (1, "", "memdec: /nowhere is not a folder: check the path.\n")


def test_without_vllm(run, bare, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    code, out, err = run(bare("llama"))
    assert (code, out) == (1, "")
    assert err.startswith("memdec: vllm-memdec needs vLLM")
    assert err.endswith("pip install 'vllm-memdec[cpu]', or [cuda].\n")


def test_without_a_device(run, bare, monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "device_type", "")
    code, out, err = run(bare("llama"))
    assert code == 1 and err.startswith("memdec: vLLM finds no device here")


def test_logging_is_as_before(bare):
    """Also for who calls it from Python."""
    import logging

    check.check(bare("llama"))
    assert logging.root.manager.disable == 0


def test_no_process_is_started(bare, monkeypatch):
    """vLLM would start one for each class that it has not seen on this machine: 10 s each."""
    from vllm.model_executor.models import registry

    def start(look):
        raise AssertionError("a process was started")

    monkeypatch.setattr(registry, "_run_in_subprocess", start)
    monkeypatch.setattr(
        registry._LazyRegisteredModel, "_load_modelinfo_from_cache", lambda *_: None
    )
    registry._try_inspect_model_cls.cache_clear()
    assert check.check(bare("qwen3")).status == check.SUPPORTED
    assert registry._run_in_subprocess is start
