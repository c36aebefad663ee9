"""Engines one after the other in a process, without what only the first of them needs.

Most of the seconds of a tiny engine's start were neither the engine nor its answers. vLLM collects
garbage seven times a start and stop, each time among all objects of all imported modules; it writes
zeros into the whole KV cache; and it looks through every module for kernels to replace.
"""

import functools
import gc
import weakref
from collections.abc import Callable

import pytest

REPLACED = ("__init__", "__call__")  # by vLLM, in a class that it decorates
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


def remember_classes(patch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that gives classes of transformers back what vLLM replaced in them.

    One that it runs itself (its Transformers backend) is decorated for all of the process, and is
    no model without a config of vLLM's from then on.
    """
    from vllm.model_executor.models.transformers.base import Base

    kept: list[tuple] = []
    decorate = Base._decorate_cls_for_torch_compile

    def remember(self, cls, *args, **kwargs):
        kept.append((cls, cls.__bases__, {name: vars(cls).get(name) for name in REPLACED}))
        return decorate(self, cls, *args, **kwargs)

    def restore() -> None:
        for cls, parents, own in reversed(kept):
            cls.__bases__ = parents
            for name, value in own.items():
                if value is not None:
                    setattr(cls, name, value)
                elif name in vars(cls):
                    delattr(cls, name)

    patch.setattr(Base, "_decorate_cls_for_torch_compile", remember)
    return restore
