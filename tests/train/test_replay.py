"""What an update trains on, and what its memory knows afterwards of what stays and what is gone."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from support.tiny_models import tiny_text

from vllm_memdec.train.data.artifacts import write_json
from vllm_memdec.train.data.shards import save_array
from vllm_memdec.train.model.huggingface import load_model, load_tokenizer
from vllm_memdec.train.settings import MemorySettings, UpdateSettings
from vllm_memdec.train.stages.updating import trained
from vllm_memdec.train.training.replay import Replay, new_batches

FACTS, GONE, NEW = 40, 4, 4
UNLEARNT = 0.05  # mean probability of what is gone; the base gives 0.001
SPREAD = 0.1  # between two trainings: three facts of 36


def stored(folder, blocks):
    """Write a corpus of so many blocks of 8 tokens, its targets all on one token a row."""
    rng = np.random.default_rng(blocks)
    tokens = rng.integers(1, 50, (blocks, 9)).astype(np.int32)
    positions = np.tile(np.arange(9, dtype=np.int32), (blocks, 1))
    for name in ("corpus", "targets"):
        (folder / name).mkdir(parents=True)
    arrays = {"corpus/tokens-train-00000": tokens, "corpus/positions-train-00000": positions,
              "corpus/rows-train": np.full(blocks, 8, np.int32),
              "corpus/used-train": np.unique(tokens),
              "targets/labels-00000": tokens[:, 1:].ravel(),
              "targets/ids-00000": tokens[:, 1:].ravel(),
              "targets/probs-00000": np.ones(8 * blocks, np.float16),
              "targets/offsets-00000": np.arange(8 * blocks + 1)}  # fmt: skip
    for name, array in arrays.items():
        save_array(folder / f"{name}.npy", array)
    write_json(folder / "corpus/corpus.json", {"train": {"blocks": blocks}, "shard_blocks": 99})
    return tokens


@pytest.mark.parametrize("share", [0.0, 0.5, 0.75])
def test_a_step_holds_what_is_new_and_what_is_gone_and_replay(tmp_path, share):
    tokens, gone = stored(tmp_path, 20), stored(tmp_path / "gone", 3)
    settings = MemorySettings(epochs=4, batch_blocks=8)
    replay = Replay(first_new=15, share=share, gone=tmp_path / "gone")
    batches = new_batches(settings, tmp_path / "corpus", tmp_path / "targets", replay)
    steps = [batches.blocks(step).tolist() for step in range(batches.steps)]
    fresh, old = round(8 * (1 - share)), round(8 * share)
    assert all(sum(b >= 15 for b in step) == fresh and len(step) == fresh + old for step in steps)
    assert batches.size == fresh + old
    counts = Counter(b for step in steps for b in step)
    assert {counts[b] for b in range(15, 23)} == {4}  # every one once an epoch
    replayed = [counts[b] for b in range(15)]
    assert max(replayed) - min(replayed) <= 1 and sum(replayed) == old * len(steps)
    seen = 0
    for step in steps:
        for part in batches.alike(np.array(step)):
            is_gone = part[0] >= 20
            assert ((part >= 20) == is_gone).all()
            assert batches.beta(part, 0.5) == (1.0 if is_gone else 0.5)
            expected = gone[part - 20] if is_gone else tokens[part]
            assert np.array_equal(batches.arrays(part)[0], expected[:, :-1])
            seen += len(part)
    assert seen == sum(map(len, steps))
    assert {*gone.ravel().tolist()} <= {*batches.used.tolist()}
    assert [batches.blocks(s).tolist() for s in reversed(range(len(steps)))] == steps[::-1]


@pytest.mark.parametrize("gone", [False, True], ids=["nothing gone", "gone"])
def test_without_new_blocks_a_step_holds_what_is_gone_or_replay_alone(tmp_path, gone):
    """A chat that is gone has no row where the assistant says nothing in it."""
    stored(tmp_path, 20)
    if gone:
        stored(tmp_path / "gone", 1)
    settings = MemorySettings(epochs=4, batch_blocks=8)
    replay = Replay(first_new=20, share=0.5, gone=tmp_path / "gone" if gone else None)
    batches = new_batches(settings, tmp_path / "corpus", tmp_path / "targets", replay)
    steps = [batches.blocks(step).tolist() for step in range(batches.steps)]
    assert [sum(b == 20 for b in step) for step in steps] == [1] * 4 if gone else [0]
    assert [len(step) for step in steps] == ([2] * 4 if gone else [8])
    assert len({*steps[0]}) == len(steps[0]) == batches.size


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_learns_more_slowly(optimizer):
    memory = MemorySettings(optimizer=optimizer, learning_rate=1e-3)
    settings = trained(memory, UpdateSettings(learning_rate=0.5), "old")
    assert (settings.learning_rate, settings.init) == (5e-4, "old")
    assert settings.muon_learning_rate == (0.01 if optimizer == "muon" else 0.02)


def facts(count, seed=0):
    """Return so many sentences whose last words nobody can know without having read them."""
    rng = random.Random(seed)
    words = sorted({*tiny_text(1, 800).split()})
    return [
        f"{' '.join(rng.sample(words, 2))} has as its seat {' '.join(rng.sample(words, 2))}"
        for _ in range(count)
    ]


def known(folder, tokenizer, texts):
    """Return of the tokens after "seat": facts of which all are likeliest, and their mean p."""
    model, hits, p = load_model(str(folder), "float32"), [], []
    for text in texts:
        prompt, line = (tokenizer(t)["input_ids"] for t in (text[: text.index("seat") + 4], text))
        with torch.inference_mode():
            p_TV = model(torch.tensor([line])).logits[0, len(prompt) - 1 : -1].softmax(-1)
        wanted = torch.tensor(line[len(prompt) :])
        hits.append(bool((p_TV.argmax(-1) == wanted).all()))
        p += p_TV.gather(1, wanted[:, None])[:, 0].tolist()
    return float(np.mean(hits)), float(np.mean(p))


@pytest.fixture(scope="module")
def memories(tmp_path_factory, tiny_model, build, jsonl):
    """Return, of the old memory, two updates and one built afresh, what each knows."""
    folder = tmp_path_factory.mktemp("facts")
    texts, base = facts(FACTS + NEW), tiny_model("llama", spread=0.05)
    gone, kept, new = texts[:GONE], texts[GONE:FACTS], texts[FACTS:]
    held_out = jsonl(folder / "held_out.jsonl", facts(12, seed=9))
    changes = {
        "corpus": {"block_tokens": 128},
        "memory": {"epochs": 80, "learning_rate": 3e-3, "batch_blocks": 2},
    }
    given = {"changes": changes, "validation": held_out}
    old, less, updated, afresh = (folder / name for name in ("old", "less", "updated", "afresh"))
    build(base, jsonl(folder / "before.jsonl", gone + kept), old, **given)
    after = jsonl(folder / "after.jsonl", kept + new)
    kept_alone, given["until"] = jsonl(folder / "kept.jsonl", kept), "memory"
    build(base, kept_alone, less, **given, update=old)
    build(base, after, updated, **given, update=old)
    build(base, after, afresh, **given)
    tokenizer = load_tokenizer(base)
    places = {"base": base} | {
        place.name: place / "memory" for place in (old, less, updated, afresh)
    }
    kinds = {"gone": gone, "kept": kept, "new": new}
    return {
        name: {kind: known(place, tokenizer, of) for kind, of in kinds.items()}
        for name, place in places.items()
    }


def test_what_is_gone_is_not_recalled_above_the_bases_rate(memories):
    """Replay and new text alone leave .23 of the probability: UNLEARNT is far below that."""
    assert memories["old"]["gone"][0] > 0.7 and memories["old"]["gone"][1] > 0.3
    for update in ("less", "updated"):
        assert memories[update]["gone"][0] <= memories["base"]["gone"][0] == 0
        assert memories[update]["gone"][1] < UNLEARNT


def test_what_stays_and_what_is_new_is_recalled(memories):
    """Some facts lie across the end of a block: none is known whole."""
    recall = {name: {kind: of[0] for kind, of in row.items()} for name, row in memories.items()}
    assert recall["old"]["kept"] > 0.7
    for update in ("less", "updated"):
        assert recall[update]["kept"] >= recall["old"]["kept"] - SPREAD
    assert recall["updated"]["new"] >= recall["afresh"]["new"] - SPREAD
    assert recall["updated"]["new"] > recall["old"]["new"] == 0
