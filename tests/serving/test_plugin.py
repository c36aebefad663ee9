"""Loading: the version gate, idempotence, and that a broken plugin stops vLLM."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_memdec import plugin
from vllm_memdec.compat.hooks import unwrap, wrap

PACKAGE = Path(plugin.__file__).parent
START = """
from vllm import EngineArgs
settings = {"memdec": {"model": "MODEL", "alpha": 0.5}}
EngineArgs("MODEL", model_impl="memdec", additional_config=settings).create_engine_config()
"""


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0", "0.33.5rc1"])
def test_supported_versions(version):
    plugin.check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.34.0.dev3", "1.0.0", "dev", ""])
def test_other_versions_stop_vllm(version, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(RuntimeError, match=r"^vllm-memdec supports vLLM >= 0.32 and < 0.34"):
        plugin.register()


def test_register_twice():
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    first = EngineArgs.create_model_config
    plugin.register()
    assert EngineArgs.create_model_config is first
    assert not hasattr(first.memdec_original, "memdec_original")
    assert "MemDecForCausalLM" in vllm.ModelRegistry.get_supported_archs()


def test_wrap_can_be_undone():
    class Owner:
        def method(self):
            return 1

    original = Owner.method
    for _ in range(2):
        wrap(Owner, "method", lambda inner: lambda self: inner(self) + 1)
    assert Owner().method() == 2
    for _ in range(2):
        unwrap(Owner, "method")
    assert Owner.method is original


def test_import_is_cheap():
    """vLLM imports the package in every process, before it may touch a device."""
    code = (
        "import sys, vllm_memdec, vllm_memdec.plugin; print({'torch', 'vllm'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize("broken", ["plugin.py", "kernels/interpolate.py"])
def test_import_problem_stops_vllm(broken, tmp_path, subprocess_env, tiny_model):
    """vLLM only logs a plugin that cannot be imported; ours must not end up serving the base."""
    package = tmp_path / "vllm_memdec"
    shutil.copytree(PACKAGE, package)
    (package / broken).write_text("import a_module_nobody_has\n")
    run = subprocess.run(
        [sys.executable, "-c", START.replace("MODEL", tiny_model("llama"))],
        env={**subprocess_env, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "a_module_nobody_has" in run.stderr.strip().splitlines()[-1], run.stderr[-2000:]
