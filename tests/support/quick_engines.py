"""Engines one after the other in a process, without what only the first of them needs.

Most of the seconds of a tiny engine's start were neither the engine nor its answers. vLLM collects
garbage seven times a start and stop, each time among all objects of all imported modules; it writes
zeros into the whole KV cache; and it looks through every module for kernels to replace.
"""

import functools
import gc
import weakref

import pytest

KV_CACHE = {"kv_cache_memory_bytes": 1 << 26}  # of LLM: thousands of tokens of a tiny model
ALIVE: weakref.WeakSet = weakref.WeakSet()  # engines that nothing has collected yet


def install(patch: pytest.MonkeyPatch) -> None:
    """Let settle() alone freeze and unfreeze, and replace vLLM's kernels once."""
    from vllm.platforms import current_platform
    from vllm.v1.engine.core import EngineCore

    platform = type(current_platform)
    once = functools.cache(platform.register_triton_kernel_overrides)
    patch.setattr(platform, "register_triton_kernel_overrides", staticmethod(once))
    patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # it would go before KV_CACHE
    for name in ("freeze", "unfreeze"):
        patch.setattr(gc, name, lambda: None)
    start = EngineCore.__init__

    @functools.wraps(start)
    def noted(self, *args, **kwargs):
        ALIVE.add(self)  # one that fails to start, too
        start(self, *args, **kwargs)

    patch.setattr(EngineCore, "__init__", noted)


def settle(freeze=gc.freeze) -> None:
    """Before an engine: modules above all, which no collection has to look at again.

    Not beside an engine that is shut down but still alive: frozen, it would never be collected.
    """
    gc.collect()
    if not ALIVE:
        freeze()
