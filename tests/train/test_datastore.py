"""The datastore stage against plain Hugging Face forward passes, one document at a time."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig

from vllm_memdec.train.data.blocks import load_blocks, valid_rows
from vllm_memdec.train.data.shards import shards
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model import hidden_states
from vllm_memdec.train.model.devices import BLOCKS, EMBEDDED, blocks_at_once
from vllm_memdec.train.model.hidden_states import Keys, check_isolation
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.settings import CorpusSettings, DatastoreSettings
from vllm_memdec.train.stages.corpus import build_corpus
from vllm_memdec.train.stages.datastore import build_datastore

TOLERANCE = 2e-3  # of the largest entry: keys are stored in fp16
SHARD_BLOCKS = 4  # neither this nor
SETTINGS = {"batch_blocks": 3, "dtype": "float32"}  # divides the blocks


@pytest.fixture(scope="module")
def corpus(tiny_model, tmp_path_factory, jsonl, english):
    """Return a corpus folder of short documents in blocks of 32, so that most blocks hold many."""
    work = tmp_path_factory.mktemp("corpus")
    texts = [t for i in range(1, 4) for t in english(8, sentences_each=i, seed=i)]
    path = jsonl(work / "text.jsonl", texts)
    settings = CorpusSettings(block_tokens=32, shard_blocks=SHARD_BLOCKS)
    build_corpus(settings, tiny_model("llama"), path, None, work, Context())
    return work


def embed_all(settings, base, corpus, work):
    build_datastore(Keys(settings, base, corpus, work), work, Context())


@torch.inference_mode()
def keys_one_document_at_a_time(folder, key, tokens, positions):
    """Return (keys, labels) of each run of a document within a block, never packed."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    seen = []
    last = model.transformer.h[-1] if hasattr(model, "transformer") else model.model.layers[-1]
    last.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    keys, labels = [], []
    for row, position in zip(tokens, positions, strict=True):
        starts = np.flatnonzero(position == 0)
        for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
            run = torch.from_numpy(row[start:stop].astype(np.int64))
            out = model(run[None], output_hidden_states=True)
            states = {
                "last_mlp_input": seen[-1],
                "final_hidden": out.hidden_states[-1][0],
                "layer": out.hidden_states[1][0],  # hidden_states[0] is the embedding
            }[key]
            keys.append(states[:-1])
            labels.append(run[1:])
    return torch.cat(keys).numpy(), torch.cat(labels).numpy()


@pytest.mark.parametrize("key", ["last_mlp_input", "final_hidden", "layer"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_keys_are_those_of_each_document_alone(tiny_model, corpus, tmp_path, kind, key):
    base = tiny_model(kind)
    depth = {"layer_fraction": 0.5} if key == "layer" else {}  # the first of two
    settings = DatastoreSettings(key=key, **depth, **SETTINGS)
    embed_all(settings, base, corpus, tmp_path)
    tokens, positions = (array[:] for array in load_blocks(corpus, "train"))
    expected, labels = keys_one_document_at_a_time(base, key, tokens, positions)
    parts = shards(tmp_path, "keys")
    assert len(parts) == -(-len(tokens) // SHARD_BLOCKS) > 1
    stored = np.concatenate(parts)
    assert stored.dtype == np.float16
    assert np.array_equal(np.concatenate(shards(tmp_path, "labels")), labels)
    difference = np.abs(stored.astype(np.float32) - expected).max()
    assert difference < TOLERANCE * np.abs(expected).max()
    # The test can see a leak: without the restart of positions keys are far from these.
    naive = AutoModelForCausalLM.from_pretrained(base)(
        torch.from_numpy(tokens[:, :-1].astype(np.int64)), output_hidden_states=True
    )
    if key == "final_hidden":
        leaked = naive.hidden_states[-1].detach().numpy()[valid_rows(positions)]
        assert np.abs(leaked - expected).max() > 0.1 * np.abs(expected).max()


def test_row_numbers_count_valid_pairs_through_all_blocks(tiny_model, corpus, tmp_path):
    embed_all(DatastoreSettings(**SETTINGS), tiny_model("llama"), corpus, tmp_path)
    tokens, positions = (array[:] for array in load_blocks(corpus, "train"))
    rows_of_block = valid_rows(positions).sum(axis=1)
    assert sum(rows_of_block) == json.loads((corpus / "corpus.json").read_text())["train"]["rows"]
    lengths = [len(labels) for labels in shards(tmp_path, "labels")]
    per_shard = [rows_of_block[i : i + 4].sum() for i in range(0, len(tokens), 4)]
    assert lengths == per_shard == [len(keys) for keys in shards(tmp_path, "keys")]


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=2),
        MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2),
    ],
    ids=["bloom", "mamba"],
)
def test_a_memory_that_would_mix_documents_is_refused(config):
    """As a base a Mamba is refused, see test_kinds.py; BLOOM is not among those tried as bases."""
    config.initializer_range = 0.3
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="lets packed documents see each other: give another"):
        check_isolation(model)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_supported_architectures_keep_documents_apart(tiny_model, kind, dtype):
    check_isolation(load_model(tiny_model(kind), dtype))


def test_keys_beyond_fp16_are_refused(tiny_model, corpus, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model.model.layers[-1].post_attention_layernorm.weight.data *= 1e5
    model.save_pretrained(tmp_path / "huge")
    with pytest.raises(ValueError, match="too large for fp16"):
        embed_all(DatastoreSettings(**SETTINGS), str(tmp_path / "huge"), corpus, tmp_path)


def test_keys_that_are_not_kept_are_computed_again(tiny_model, corpus, tmp_path):
    base = tiny_model("qwen2")
    kept, none = (DatastoreSettings(keep_keys=keep, **SETTINGS) for keep in (True, False))
    folders = tmp_path / "kept", tmp_path / "none"
    for folder, settings in zip(folders, (kept, none), strict=True):
        folder.mkdir()
        embed_all(settings, base, corpus, folder)
    assert not list(folders[1].glob("keys-*"))
    again, stored = Keys(none, base, corpus, folders[1]), shards(folders[0], "keys")
    assert len(stored) > 1
    for n, keys in enumerate(stored):
        assert np.array_equal(again(n), keys)
    for path in folders[1].iterdir():
        assert path.read_bytes() == (folders[0] / path.name).read_bytes()
    assert len(list(folders[1].iterdir())) == len(stored)


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("blocks", "block_tokens", "where", "chosen"),
    [
        (None, 512, CPU, BLOCKS),
        (None, 512, CUDA, 32),
        (None, 1 << 15, CUDA, BLOCKS),
        (BLOCKS, 512, CUDA, BLOCKS),  # what is set is obeyed, whatever the device would do
        (1, 512, CUDA, 1),
        (64, 512, CUDA, 64),
    ],
)
def test_blocks_of_a_forward_pass_are_chosen_by_the_device(blocks, block_tokens, where, chosen):
    assert blocks_at_once(blocks, block_tokens, where, EMBEDDED) == chosen


def test_keys_are_the_same_however_many_blocks_pass_at_once(
    tiny_model, corpus, tmp_path, monkeypatch
):
    settings = DatastoreSettings(dtype="float32")
    passes = []
    for n, chosen in enumerate((BLOCKS, 7)):
        monkeypatch.setattr(hidden_states, "blocks_at_once", lambda *_, chosen=chosen: chosen)
        (tmp_path / str(n)).mkdir()
        embed_all(settings, tiny_model("llama"), corpus, tmp_path / str(n))
        passes.append(np.concatenate([*shards(tmp_path / str(n), "keys")]))
    assert np.allclose(*passes, atol=TOLERANCE)
