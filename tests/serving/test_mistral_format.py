"""Bases in Mistral's own format: tekken.json, and weights that params.json describes."""

import json
import shutil
from pathlib import Path

import pytest
from support import oracle
from support.mistral_format import save_consolidated, save_tekken
from support.tiny_models import VOCAB

from vllm_memdec.checkpoint import (
    MemoryBlock,
    read_tokenizer,
    tokenizer_fingerprint,
    write_block,
)

ALPHA = 0.4


@pytest.fixture(scope="module")
def hugging_face(tiny_model):
    """Return the same base in Hugging Face's format, and a memory; the key reads both."""
    return tiny_model("llama", hidden=96, layers=2), tiny_model("llama", seed=1)


@pytest.fixture(scope="module")
def base(hugging_face, tmp_path_factory):
    """Return a folder of what Mistral publishes, config.json beside its own files."""
    folder = tmp_path_factory.mktemp("mistral")
    config = json.loads(Path(hugging_face[0], "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    save_consolidated(hugging_face[0], folder)
    save_tekken(folder, VOCAB)
    return folder


@pytest.fixture(scope="module")
def memory(hugging_face, base, tmp_path_factory):
    """Return a memory as `memdec build` leaves it for a base of that tokenizer."""
    folder = tmp_path_factory.mktemp("memory")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"{hugging_face[1]}/{name}", folder)
    tokenizer = read_tokenizer(base)
    tokenizer.save_pretrained(folder)
    block = MemoryBlock(ALPHA, tokenizer_fingerprint(tokenizer), "some/base", 16.0)
    write_block(folder, block)
    return folder


def create(base, memory, **options):
    from vllm import EngineArgs

    block = {"model": str(memory), "alpha": ALPHA}
    options |= {"model_impl": "memdec", "additional_config": {"memdec": block}}
    return EngineArgs(str(base), dtype="float32", **options).create_engine_config()


def test_answers_are_the_mixture(base, memory, hugging_face, engine):
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=8, temperature=0, logprobs=5, prompt_logprobs=5)
    with engine(str(base), {"model": str(memory)}) as llm:
        assert type(llm.get_tokenizer()).__name__ == "MistralTokenizer"
        [output] = llm.generate(["some words of a text"], params)
        assert output.prompt_token_ids == read_tokenizer(base)("some words of a text").input_ids
        assert oracle.gap(output, *hugging_face, ALPHA) < oracle.TOLERANCE


def test_tokenizers_are_compared(base, memory, hugging_face, tmp_path):
    """Also those of a memory that is a plain model, and of a base without a config.json."""
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"{hugging_face[1]}/{name}", plain)
    shutil.copy(base / "tekken.json", plain)
    for mode in ("auto", "mistral", "hf"):
        create(base, plain, tokenizer_mode=mode)
    other = shutil.copytree(base, tmp_path / "other")
    (other / "config.json").unlink()
    create(other, plain)
    content = json.loads((other / "tekken.json").read_text())
    content["vocab"][300:302] = reversed(content["vocab"][300:302])
    (other / "tekken.json").write_text(json.dumps(content))
    for each in (memory, plain, hugging_face[1]):
        with pytest.raises(ValueError, match="has another tokenizer than the base"):
            create(other, each)
    (other / "tekken.json").write_text("{}")
    with pytest.raises(ValueError, match="has no readable tokenizer"):
        create(other, memory)
