"""What /v1/models tells, from the configuration and the files of a start; see test_http.py, too."""

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from support import bases
from support.tiny_models import save_tokenizer
from vllm import EngineArgs

from vllm_memdec.describe import describe

TABLE = [[0, 0.7], [64, 0.2]]


def elements(folder):
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    return sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize("layout", ["whole", "indexed"])
def test_what_is_told_of_a_memory(tiny_model, tmp_path, layout):
    """Its weights by context, and its parameters once, though they lie there in two layouts."""
    base, memory = tiny_model("llama"), tmp_path / "memory"
    shutil.copytree(tiny_model("llama", seed=1), memory)
    expected = elements(memory)
    shutil.copy(memory / "model.safetensors", memory / "consolidated.safetensors")
    if layout == "indexed":
        (memory / "model.safetensors").rename(memory / "model-00001-of-00001.safetensors")
        index = {"weight_map": {"any.weight": "model-00001-of-00001.safetensors"}}
        (memory / "model.safetensors.index.json").write_text(json.dumps(index))
    memories = {
        "steps": {"model": str(memory), "alpha_by_context": TABLE},
        "one": {"model": str(memory), "alpha": 0.4},
    }
    block = {"memories": memories, "default": "steps"}
    args = EngineArgs(
        base, dtype="bfloat16", model_impl="memdec", additional_config={"memdec": block}
    )
    told = describe(args.create_engine_config())
    assert [list(pair) for pair in told["memories"]["steps"]["alpha_by_context"]] == TABLE
    assert "alpha_by_context" not in told["memories"]["one"]
    assert told["memories"]["one"]["alpha"] == 0.4
    assert {each["parameters"] for each in told["memories"].values()} == {expected}
    assert told["base"]["parameters"] == elements(Path(base))


def test_a_hybrid_has_no_share_of_the_cache(tiny_model, tmp_path):
    """Most of its layers keep a state for a request, nothing for a token."""
    bases.granite4().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    memdec = {"model": tiny_model("llama", seed=1), "alpha": 0.5}
    args = EngineArgs(
        str(tmp_path), dtype="float32", model_impl="memdec", additional_config={"memdec": memdec}
    )
    told = describe(args.create_engine_config())
    parts = [told["base"], *told["memories"].values()]
    assert [part["kv_cache_share"] for part in parts] == [None, None]
