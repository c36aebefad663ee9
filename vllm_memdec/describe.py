"""What a server is made of, seen from the front end, as /v1/models tells it.

The worker logs the same when it starts (model.py), from the loaded models; here it is read from the
files and configurations, because the front end has no model.
"""

import json
import math
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.config.model import ModelConfig
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from vllm_memdec.config import AT_ONCE, AUTO, NONE, MemDecConfig
from vllm_memdec.engine_config import memory_model_config
from vllm_memdec.request import ALPHA, MEMORY


def describe(vllm_config: VllmConfig, settings: MemDecConfig | None = None) -> dict[str, Any]:
    """Return base and memories: alpha, parameters, share of the KV cache (None where unknown).

    Of a memory the positions too, in tokens, at which it has a weight. settings: the server's, if
    left out; those in slots are described by the names that they have there.
    """
    settings = settings or MemDecConfig.from_vllm(vllm_config)
    base = vllm_config.model_config
    ranks = vllm_config.parallel_config.tensor_parallel_size
    models = [base]
    sizes = [kv_bytes_per_token(base, vllm_config, vllm_config.cache_config.cache_dtype)]
    for memory in settings.built:
        models.append(memory_model_config(memory, base))
        dtype = memory.kv_cache_dtype or vllm_config.cache_config.cache_dtype
        copies = ranks if memory.tensor_parallel_size == 1 else 1
        size = kv_bytes_per_token(models[-1], vllm_config, dtype)
        sizes.append(size and size * copies)
    known = [size for size in sizes if size is not None]
    shares = [round(size / sum(known), 4) for size in known]
    parts = [
        {"model": model.model, "parameters": parameters(model), "kv_cache_share": share}
        for model, share in zip(
            models, shares if len(known) == len(sizes) else [None] * len(sizes), strict=True
        )
    ]
    memories = {
        memory.name: {
            **part,
            "positions": model.max_model_len,
            "alpha": memory.alpha,
            "gate": memory.gate,
        }
        | ({"alpha_by_context": memory.alpha_by_context} if memory.alpha_by_context else {})
        | ({} if memory.with_images else {"with_images": False})
        for memory, model, part in zip(settings.built, models[1:], parts[1:], strict=True)
    }
    described = {"base": parts[0], "memories": memories, "default": settings.default}
    return described | ({AT_ONCE: settings.at_once} if settings.at_once > 1 else {})


def describe_model(description: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Return describe()'s part of the memory that a model stands for, with the model's weight.

    Of "auto" the parts of all memories that it mixes.

    asked: what the model's name asks for, as extra_args of a request.
    """
    name = asked[MEMORY]
    if name == AUTO:
        gated = {name: each for name, each in description["memories"].items() if each["gate"]}
        return {"memory": AUTO, "memories": gated}
    described = description["base"] if name == NONE else description["memories"][name]
    return {"memory": name, **described} | ({"alpha": asked[ALPHA]} if ALPHA in asked else {})


def kv_bytes_per_token(model: ModelConfig, vllm_config: VllmConfig, dtype: str) -> int | None:
    """Return the bytes of keys and values of one token; None for compressed ones (MLA).

    None for a hybrid, too: vLLM counts its layers with a state as layers of attention.
    """
    if model.use_mla or model.is_hybrid:
        return None
    parallel = vllm_config.parallel_config
    heads = model.get_total_num_kv_heads()  # of all ranks
    elements = 2 * model.get_num_layers(parallel) * heads * model.get_head_size()
    return elements * kv_cache_dtype_str_to_dtype(dtype, model).itemsize


def parameters(model: ModelConfig) -> int | None:
    """Return the elements of all tensors in a model's safetensors files; None if it has none."""
    from safetensors import SafetensorError, safe_open
    from transformers.utils import cached_file

    total = 0
    try:
        config = cached_file(model.model, "config.json", revision=model.revision)
        if config is None:
            return None
        for path in weight_files(Path(config).parent):
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118, not a dict
                    total += math.prod(tensors.get_slice(name).get_shape())
    except (OSError, ValueError, KeyError, SafetensorError):
        return None  # the model is loaded all the same
    return total or None


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder's weights, which may lie there in another layout as well."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return [folder / name for name in {*json.loads(index.read_text())["weight_map"].values()}]
    return [whole] if whole.exists() else [*folder.glob("*.safetensors")]
