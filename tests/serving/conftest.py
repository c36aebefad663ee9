"""Engines for the serving tests: real ones, small, in this process, one at a time.

Also the table of features: `--features FILE` writes what the tests marked feature("name") showed.
And the table of bases: `--bases FILE` writes what tests noted of each, see base_row().
"""

import contextlib
import csv
import os
import sys

import pytest
from support import base_rows, forked_serve, quick_engines

ENGINE_ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles a helper of the sampler even when eager
}
os.environ.update(ENGINE_ENV)  # before vllm is imported


@pytest.fixture(scope="session", autouse=True)
def inspect_here():
    """Let vLLM look at a model class in this process: one of its own for each takes 10 s."""
    from vllm_memdec.compat import class_look

    with class_look.in_this_process():
        yield


@pytest.fixture(scope="session")
def quick_starts():
    """Let the engines of this process share what only the first of them needs to do."""
    with pytest.MonkeyPatch.context() as patch:
        quick_engines.install(patch)
        yield


@pytest.fixture(scope="session")
def engine(quick_starts):
    """Return a context manager that yields an LLM and frees it: engine(base, memory, alpha).

    In place of one memory's folder `memory` may be a whole memdec block.
    """
    from vllm_memdec.kernels import interpolate

    @contextlib.contextmanager
    def start(base, memory=None, alpha=0.6, **options):
        from vllm import LLM

        if memory is not None:
            block = memory if isinstance(memory, dict) else {"model": memory, "alpha": alpha}
            options["model_impl"] = "memdec"
            options["additional_config"] = {"memdec": block}
        defaults = {
            "dtype": "float32",
            "max_num_seqs": 16,
            "max_logprobs": -1,
            "seed": 0,
            "enforce_eager": True,
            "disable_log_stats": True,
            **quick_engines.KV_CACHE,
        }
        quick_engines.settle()
        with pytest.MonkeyPatch.context() as patch:
            # Users without a GPU run the PyTorch path; the interpreter would take minutes here.
            patch.setattr(interpolate, "INTERPRETED", False)
            restored = quick_engines.remember_classes(patch)
            llm = LLM(base, **defaults | options)
            try:
                yield llm
            finally:
                restored()
                # The process groups stay: vLLM reuses them for the next engine of a process.
                llm.llm_engine.engine_core.shutdown()

    return start


@pytest.fixture(scope="module")
def hostile():
    """Let engines overwrite what a model inside the composite returned, as CUDA graphs may."""
    from support import emulation

    with pytest.MonkeyPatch.context() as patch:
        emulation.watch(patch, emulation.Hostile())
        yield


@pytest.fixture(scope="session")
def subprocess_env():
    """Return the environment of a user's shell: no interpreter, plugin from this checkout."""
    env = {**os.environ, **ENGINE_ENV, "VLLM_LOGGING_LEVEL": "INFO"}
    env["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; the engines of this process have KV_CACHE
    for name in (
        "TRITON_INTERPRET",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_USE_V2_MODEL_RUNNER",
    ):
        del env[name]
    env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env["PATH"]
    return env


@pytest.fixture(scope="session")
def long_models(tiny_model):
    """Return the folders of the server's models."""
    from support import soak_client

    return soak_client.long_models(tiny_model)


@pytest.fixture(scope="session")
def server_env(subprocess_env):
    """Return the environment of a server."""
    # A kernel for each number of rows, up to 1024 of them, grows by 400 MB before it is full.
    few = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}
    return subprocess_env | few | {"MEMDEC_ALLOW_RUNTIME_LOADING": "1"}


@pytest.fixture(scope="session")
def forked(server_env):
    """Yield a function that runs `vllm WORDS` in a fork, for servers of soak_client.py."""
    launcher = forked_serve.Launcher(server_env)
    try:
        yield launcher.start
    finally:
        launcher.stop()


@pytest.fixture(scope="session")
def server(long_models, server_env, tmp_path_factory):
    """Yield the server that test_http.py asks and test_soak.py fills, and kills at its end."""
    from support import soak_client

    start, log = soak_client.start(server_env), tmp_path_factory.mktemp("server") / "log"
    server = soak_client.Server(long_models, start, log)
    try:
        yield server.wait()
    finally:
        server.stop()


@pytest.fixture(scope="session", params=[3, "auto"])
def drafting_server(request, long_models, forked, server_env, tmp_path_factory):
    """Yield a server whose memories draft, of which one is a user's: an engine that is spawned."""
    from support import soak_client

    start = soak_client.start(server_env) if request.param == 3 else forked
    log = tmp_path_factory.mktemp("server") / "log"
    server = soak_client.Server(long_models, start, log, drafts=request.param)
    try:
        yield server.wait()
    finally:
        server.stop()


# -- The table of features ------------------------------------------------------------------------

# name -> (arguments of its markers, outcomes of its tests without drafts, and with them)
FEATURES = pytest.StashKey[dict]()
NOTED = pytest.StashKey[dict]()  # name of a base -> what tests noted of it


def pytest_addoption(parser):
    parser.addoption("--features", metavar="FILE", help="write what the marked tests showed: CSV")
    parser.addoption("--loads", type=int, default=20, help="of memories, by test_slots_http.py")
    parser.addoption("--bases", metavar="FILE", help="write what was noted of bases: CSV")


def pytest_configure(config):
    config.stash[FEATURES], config.stash[NOTED] = {}, {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    for mark in item.iter_markers("feature"):
        features = item.config.stash[FEATURES]
        arguments, *outcomes = features.setdefault(mark.args[0], ({}, set(), set()))
        arguments.update(mark.kwargs)
        if not mark.kwargs.get("here", True):  # on this machine the test does not show it
            continue
        # Set-up and tear-down count where they go wrong.
        if report.when == "call" or not report.passed:
            outcomes[item.get_closest_marker("drafts") is not None].add(report.outcome)
    return report


def pytest_sessionfinish(session):
    if bases := session.config.getoption("bases", None):
        base_rows.write(bases, session.config.stash[NOTED])
    path = session.config.getoption("features", None)
    if not path:
        return
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["feature", "status", "drafts", "note"])
        for name, (arguments, *outcomes) in session.config.stash[FEATURES].items():
            reason = arguments.get("refused")
            without, drafting = map(shown, outcomes)
            if reason:
                status, drafting = without.replace("works", "refused"), ""
            else:
                status = without if outcomes[0] else drafting
                drafting = arguments.get("drafts", drafting)
            writer.writerow([name, status, drafting, reason or arguments.get("note", "")])


@pytest.fixture
def base_row(request):
    """Return a function that takes what a test showed of a base: base_row(name, column=value).

    It is written where --bases asks for it; else it has to be what vllm_memdec/bases.csv says.
    """

    def note(name, **columns):
        columns = {column: str(value) for column, value in columns.items()}
        request.config.stash[NOTED].setdefault(name, {}).update(columns)
        if request.config.getoption("bases", None) is None:
            base_rows.compare(name, columns)

    return note


def shown(outcomes):
    """Return what the outcomes of tests show, in a word."""
    ran = outcomes - {"skipped"}  # which shows nothing
    if not ran:
        return "not run"
    return "works" if ran == {"passed"} else "FAILED"
