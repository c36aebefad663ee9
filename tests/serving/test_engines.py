"""Engines that a test is done with are collected, as those of users are."""

import gc
import weakref

from support import quick_engines


def test_an_engine_that_was_shut_down_is_collected(tiny_model, engine):
    """Also where a test still holds it, as `llm`, while it starts the next one."""
    with engine(tiny_model("llama"), tiny_model("llama", seed=1)) as llm:
        core = llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        alive = {
            "model": weakref.ref(runner.model),
            "cache": weakref.ref(runner.kv_caches[0]),
            "runner": weakref.ref(runner),
            "core": weakref.ref(core),
            "front end": weakref.ref(llm.llm_engine),
        }
        del core, runner
    quick_engines.settle()  # before the next
    assert alive["core"]() is not None, "nothing was held"
    del llm
    gc.collect()
    assert not [name for name, reference in alive.items() if reference() is not None]
