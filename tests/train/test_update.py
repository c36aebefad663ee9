"""`memdec build --update`: what stays is not made again, what is gone is nowhere any more."""

import json
import os
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.artifacts import HASHED, json_sha256, write_json
from vllm_memdec.train.data.blocks import (
    Owners,
    load_blocks,
    load_texts,
    packed,
    tokenise,
    unmarked,
    valid_rows,
)
from vllm_memdec.train.data.changes import (
    KeptBlocks,
    KeptRows,
    compare,
    gone_fragments,
    resharded,
)
from vllm_memdec.train.data.places import Places
from vllm_memdec.train.data.shards import Sharded, load_array, shards
from vllm_memdec.train.data.splits import digest, split_as_before
from vllm_memdec.train.model import hidden_states
from vllm_memdec.train.model.huggingface import load_tokenizer
from vllm_memdec.train.settings import DatastoreSettings
from vllm_memdec.train.stages import updating
from vllm_memdec.train.stages.stage import Stage
from vllm_memdec.train.verify.brute_force import StoredTargets, nearest, target
from vllm_memdec.train.verify.report import FAILED, verify

# fp16 keeps eleven digits of a key; a forward pass of other blocks beside it adds up in another
# order, so a key may be the next number.
KEY_TOLERANCE = {"rtol": 2**-9, "atol": 2**-12}
# fp16 keeps eleven digits of a probability, and the index adds up distances in float32.
TARGET_TOLERANCE = 2e-3
K = 16


def changed(texts):
    """Return texts with some removed, one changed, one of two copies left, and new ones first."""
    kept = [t for n, t in enumerate(texts[:-1]) if n not in (2, 9, 10)]
    kept[12] += " Changed."
    return kept[::-1]


HELD_OUT = {"corpus": {"validation_fraction": 0.15}}


@pytest.fixture(scope="module")
def build(build):
    """Return the function of that name, several documents being held out."""

    def make(base, corpus, output, changes=None, **options):
        merged = {s: HELD_OUT.get(s, {}) | (changes or {}).get(s, {})
                  for s in HELD_OUT.keys() | (changes or {}).keys()}  # fmt: skip
        return run(base, corpus, output, merged, **options)

    run = build
    return make


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, english, jsonl):
    folder = tmp_path_factory.mktemp("corpora")
    texts = english(24, 3)
    texts.append(texts[5])
    after = english(3, 3, seed=5) + changed(texts)
    old, new = jsonl(folder / "old.jsonl", texts), jsonl(folder / "new.jsonl", after)
    return SimpleNamespace(before=texts, after=after, old=old, new=new, folder=folder)


@pytest.fixture(scope="module")
def done(corpora, tiny_model, build):
    """Return a build of the old corpus and its update to the new one."""
    base = tiny_model("llama")
    old, new = corpora.folder / "old", corpora.folder / "new"
    build(base, corpora.old, old)
    lines = build(base, corpora.new, new, update=old)
    return SimpleNamespace(base=base, old=old, new=new, lines=lines)


def labels_by_document(corpus):
    """Return the predicted tokens of each training document, in the order of its rows."""
    tokens, positions = (array[:] for array in load_blocks(corpus, "train"))
    valid = valid_rows(positions)
    facts = json.loads((corpus / "corpus.json").read_text())
    count = facts["train"]["blocks"]
    owner = Sharded(corpus, "documents-train", count, facts["shard_blocks"])[:]
    labels, of = tokens[:, 1:][valid], owner[:, 1:][valid]
    return [labels[of == n].tolist() for n in range(len(load_texts(corpus, "train")))]


def predicted(base, texts, corpus, split):
    """Return how often each sequence of predicted tokens is to be there, of one split's texts."""
    there = set(load_texts(corpus, split)[:, 0].tolist())
    mine = [text for text in texts if digest(text) in there]
    return Counter(tuple(ids[1:].tolist()) for ids in tokenise(load_tokenizer(base), mine))


@pytest.mark.parametrize("build_of", ["old", "new"])
def test_each_token_of_a_document_is_predicted_once(corpora, done, build_of):
    texts = corpora.before if build_of == "old" else corpora.after
    corpus = getattr(done, build_of) / "corpus"
    found = Counter(map(tuple, labels_by_document(corpus)))
    assert found == predicted(done.base, texts, corpus, "train")
    both = [{*load_texts(corpus, split)[:, 0].tolist()} for split in ("train", "validation")]
    assert both[0] | both[1] == {digest(text) for text in texts} and not both[0] & both[1]


@pytest.mark.parametrize("build_of", ["old", "new"])
def test_each_document_has_the_line_that_it_is_in(corpora, done, build_of):
    """Blocks number the documents of an update in another order than the corpus has them."""
    texts = corpora.before if build_of == "old" else corpora.after
    places, tokenizer = Places(getattr(done, build_of) / "corpus"), load_tokenizer(done.base)
    rows = np.arange(places.first_rows[-1])
    lines = set()
    for document, row in zip(*np.unique(places.documents(rows), return_index=True), strict=True):
        line = int(places.name(document).removeprefix(f"{build_of}.jsonl, line "))
        [ids] = tokenise(tokenizer, [texts[line - 1]])
        assert places.passage(int(row), 0, 10**4).ids == ids[1:].tolist()
        lines.add(line)
    assert len(lines) == len(load_texts(places.corpus, "train"))


def test_what_is_gone_is_nowhere(corpora, done):
    gone = {digest(t) for t in corpora.before} - {digest(t) for t in corpora.after}
    assert len(gone) == 4
    for split in ("train", "validation"):
        assert not gone & {*load_texts(done.new / "corpus", split)[:, 0].tolist()}
    rows = KeptRows(done.old / "datastore", done.new / "corpus", kept=False)
    keys, kept = rows.read("keys", 0, len(rows)), shards(done.new / "datastore", "keys")
    there = {key.tobytes() for part in kept for key in part}
    twins = {key.tobytes() for key in KeptRows(done.old / "datastore", done.new / "corpus").read(
        "keys", 0, 10**6)}  # fmt: skip
    only = [key for key in keys if key.tobytes() not in twins]  # no document left has the context
    assert len(only) > 100 and not [key for key in only if key.tobytes() in there]
    stored = [*map(np.asarray, shards(done.new / "datastore", "labels"))]
    labels = np.fromfile(done.new / "index/labels.i32", "<i4")
    assert np.array_equal(labels, np.concatenate(stored))
    assert labels.tolist() == next_tokens(done.new / "corpus")
    targets = [*map(np.asarray, shards(done.new / "targets", "labels"))]
    assert np.array_equal(labels, np.concatenate(targets))
    assert not list(done.new.rglob("gone"))


def next_tokens(corpus):
    tokens, positions = (array[:] for array in load_blocks(corpus, "train"))
    return tokens[:, 1:][valid_rows(positions)].tolist()


def test_sides_stay(corpora, done):
    """What was trained on is not held out now, and the other way round."""
    before, after = (
        {split: {*load_texts(output / "corpus", split)[:, 0].tolist()}
         for split in ("train", "validation")}
        for output in (done.old, done.new)
    )  # fmt: skip
    assert not before["train"] & after["validation"]
    assert not before["validation"] & after["train"]
    assert before["validation"] & after["validation"]


def test_only_new_blocks_are_embedded(corpora, done, build, tmp_path, monkeypatch):
    embedded = []

    def counting(model, key, tokens, positions, batch, scored=False):
        embedded.append(len(tokens))
        return embed(model, key, tokens, positions, batch, scored)

    embed = hidden_states.embed
    monkeypatch.setattr(hidden_states, "embed", counting)
    build(done.base, corpora.new, tmp_path / "new", until="datastore", update=done.old)
    facts = json.loads((tmp_path / "new/corpus/corpus.json").read_text())
    new = facts["train"]["blocks"] - facts["update"]["kept_blocks"]
    before, after = (
        Counter(map(tuple, labels_by_document(output / "corpus")))
        for output in (done.old, done.new)
    )
    assert facts["update"]["added"] == (after - before).total() > 2
    assert facts["update"]["removed"] == (before - after).total() > 2
    assert sum(embedded) == new < 0.3 * facts["train"]["blocks"]
    # What was copied, and what was made, is what a fresh pass over the same blocks gives.
    corpus = tmp_path / "new/corpus"
    keys = hidden_states.Keys(DatastoreSettings(dtype="float32", batch_blocks=8), done.base,
                              corpus, tmp_path / "new/datastore")  # fmt: skip
    assert len(shards(keys.datastore, "keys")) > 3
    for shard, stored in enumerate(shards(keys.datastore, "keys")):
        fresh, labels = keys.compute(shard)
        np.testing.assert_allclose(stored.astype(float), fresh.astype(float), **KEY_TOLERANCE)
        assert np.array_equal(shards(keys.datastore, "labels")[shard], labels)
    rows = KeptRows(done.old / "datastore", corpus)
    stored = np.concatenate([*map(np.asarray, shards(keys.datastore, "keys"))])
    assert 0 < len(rows) < len(stored)
    assert np.array_equal(rows.read("keys", 0, len(rows)), stored[: len(rows)])


def test_targets_are_those_of_the_corpus_as_it_is(done):
    """Every row against brute force in float64, over the keys that are there now."""
    keys = [np.asarray(part) for part in shards(done.new / "datastore", "keys")]
    flat = np.concatenate(keys)
    assert json.loads((done.new / "index/index.json").read_text())["kind"] == "Flat"
    distances, ids = nearest(keys, flat, K + 1, np.arange(len(flat)))
    labels = np.fromfile(done.new / "index/labels.i32", "<i4")
    temperature = json.loads((done.new / "targets/targets.json").read_text())["temperature"]
    before = json.loads((done.old / "targets/targets.json").read_text())["temperature"]
    assert temperature == before
    stored, compared = StoredTargets(done.new / "targets"), 0
    for row in range(len(flat)):
        if distances[row, K] - distances[row, K - 1] < 1e-4 * distances[row, K]:
            continue  # either may have been taken
        wanted = target(distances[row, :K], labels[ids[row, :K]], temperature, 1e-4)
        has = dict(zip(*(a.tolist() for a in stored.row(row)), strict=True))
        off = [abs(has.get(t, 0) - wanted.get(t, 0)) for t in {*has, *wanted}]
        assert max(off) < TARGET_TOLERANCE, row
        compared += 1
    assert compared > 0.9 * len(flat)


def test_it_is_an_ordinary_build(corpora, done, build, tmp_path):
    """verify finds nothing wrong, a second run makes nothing, and it can be updated itself."""
    statuses = {c.name: c.status for c in verify(done.new, base=done.base)}
    del statuses["fidelity"]  # too few epochs, in the old build as well
    assert FAILED not in statuses.values() and statuses["chain"] == "ok"
    again = build(done.base, corpora.new, done.new, update=done.old)
    assert [line for line in again if "up to date" not in line] == done.lines[-2:]
    back = tmp_path / "back"
    lines = build(done.base, corpora.old, back, update=done.new)
    facts = json.loads((done.new / "corpus/corpus.json").read_text())["update"]
    said = f"corpus: {facts['removed']} documents are new, {facts['added']} are gone"
    assert said in "\n".join(lines)
    assert "not known, as the old one was an update itself" in lines[-1]
    found = Counter(map(tuple, labels_by_document(back / "corpus")))
    assert found == predicted(done.base, corpora.before, back / "corpus", "train")
    statuses = {c.name: c.status for c in verify(back)}
    assert {n: s for n, s in statuses.items() if s == FAILED}.keys() <= {"fidelity"}


def test_the_cost_stands_beside_a_fresh_builds(done):
    facts = json.loads((done.new / "corpus/corpus.json").read_text())
    blocks, rows = facts["train"]["blocks"], facts["train"]["rows"]
    new = blocks - facts["update"]["kept_blocks"]
    work, seconds = done.lines[-2:]
    assert f"embedded {new} of {blocks} token blocks, searched all of {rows:,} rows" in work
    assert "of a fresh build, by the old one's time a row" in seconds


def test_the_old_quantiser_is_kept(corpora, done, build, tmp_path):
    how = {"index": {"kind": "sq8"}}
    old, new = tmp_path / "old", tmp_path / "new"
    build(done.base, corpora.old, old, how, until="index")
    for stage in ("targets", "memory", "export"):
        shutil.copytree(done.old / stage, old / stage)
    build(done.base, corpora.new, new, how, until="targets", update=old)
    name = "index/trained.faiss"
    assert (old / name).read_bytes() == (new / name).read_bytes()
    facts = json.loads((new / "index/index.json").read_text())
    before = json.loads((old / "index/index.json").read_text())["keys"]
    assert (facts["keys"], facts["trained_keys"]) == (len(next_tokens(new / "corpus")), before)
    assert {c.name: c.status for c in verify(new)}["recall"] == "ok"
    # What it was trained on counts, not what the last of several updates had.
    stage = Stage({}, (), lambda work: None, lambda work: [], "")
    for rows, kept in ((before, True), (3 * before, False), (before // 3, False)):
        write_json(new / "index/index.json", facts | {"trained_keys": rows})
        build_of = SimpleNamespace(path=lambda name: new / name)
        assert (updating.index(build_of, stage, new / "index") is not stage) == kept


def edit_manifest(folder, settings=None, **changes):
    """Change entries of an artifact's manifest, and some of its settings."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    manifest["settings"] |= settings or {}
    manifest["hash"] = json_sha256({key: manifest[key] for key in HASHED})
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("unfinished", "has no finished memory: run its memdec build to the end first"),
        ("settings", "corpus.block_tokens is 16 here and was 32 in .*: give the settings"),
        ("neighbours", "targets.neighbours is 8 here and was 16 in "),
        ("epochs", "memory.epochs is 3.0 here and was 2.0 in "),
        ("base", "was built with another tokenizer|was built with another base"),
        ("schema", "has version 99 of the files, 1 is read here: build afresh"),
        ("release", "by a release that did not note which document a token is of"),
        ("same", "holds what .* was built from: there is nothing to update"),
        ("order", "has changed, and none is new: there is nothing to update"),
        ("held-out", "there is nothing to update, as nothing is learnt of held-out text"),
        ("nothing left", "no document of .* is in .* any more: build afresh"),
        ("held out", "held out too little is left to tune alpha on: build afresh"),
        ("group", "--update cannot be used with corpus.group: build afresh"),
        ("keys", "--update cannot be used with datastore.keep_keys false: build afresh"),
        ("mixture", "--update cannot be used with memory.objective mixture: build afresh"),
        ("old mixture", "--update cannot be used with memory.objective mixture: build afresh"),
        ("old keys", "--update cannot be used with datastore.keep_keys false: build afresh"),
        ("index", "index.kind is IVF[0-9]+,SQ8 here and was Flat in .*: give the settings it was"),
        ("inside", "lies inside --update .*: choose a folder outside"),
    ],
)
def test_what_cannot_be_updated_is_refused(
    corpora, done, build, tmp_path, tiny_model, jsonl, english, what, sentence
):
    old = shutil.copytree(done.old, tmp_path / "old")
    base, corpus, output, changes = done.base, corpora.new, tmp_path / "new", None
    if what == "unfinished":
        shutil.rmtree(old / "memory")
    if what == "base":
        base = tiny_model("llama", seed=3)
    if what in ("settings", "neighbours", "epochs", "group", "keys", "mixture", "index"):
        changes = {
            "settings": {"corpus": {"block_tokens": 16}},
            "neighbours": {"targets": {"neighbours": 8}},
            "epochs": {"memory": {"epochs": 3}},
            "group": {"corpus": {"group": "text"}},
            "keys": {"datastore": {"keep_keys": False}},
            "mixture": {"memory": {"objective": "mixture"}},
            "index": {"index": {"kind": "sq8"}},
        }[what]
    if what == "index":  # of an update, whose shape is its ancestor's
        old, corpus = shutil.copytree(done.new, tmp_path / "updated"), corpora.old
    if what == "schema":
        edit_manifest(old / "index", schema=99)
    if what == "old mixture":
        edit_manifest(old / "datastore", settings={"base_logprobs": True})
        edit_manifest(old / "memory", settings={"objective": "mixture"})
    if what == "old keys":
        edit_manifest(old / "datastore", settings={"keep_keys": False})
    if what == "release":
        files = json.loads((old / "corpus/manifest.json").read_text())["files"]
        edit_manifest(old / "corpus", files={n: e for n, e in files.items() if "texts-" not in n})
        (old / "corpus/texts-train.npy").unlink()
    if what in ("same", "order", "nothing left"):
        texts = corpora.before[::-1] if what == "order" else corpora.before
        texts = english(20, 3, seed=77) if what == "nothing left" else texts
        corpus = jsonl(tmp_path / "corpus.jsonl", texts)
    if what in ("held out", "held-out"):  # all of them gone, or one
        there = {*load_texts(old / "corpus", "validation")[:, 0].tolist()}
        there = {*sorted(there)[: 1 if what == "held-out" else None]}
        corpus = jsonl(
            tmp_path / "corpus.jsonl", [t for t in corpora.before if digest(t) not in there]
        )
    if what == "inside":
        output = old / "new"
    with pytest.raises(MemdecError, match=sentence):
        build(base, corpus, output, changes, update=old)


def test_the_old_build_is_left_alone(corpora, done, build, tmp_path):
    def state():
        return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in done.old.rglob("*")}

    before = state()
    (done.old / "export/memdec_gate.npz").write_bytes(b"some gate")
    try:
        lines = build(done.base, corpora.new, tmp_path / "new", update=done.old)
    finally:
        (done.old / "export/memdec_gate.npz").unlink()
    assert {p: s for p, s in state().items() if p.is_file()} == {
        p: s for p, s in before.items() if p.is_file()
    }
    assert not (tmp_path / "new/export/memdec_gate.npz").exists()
    [said] = [line for line in lines if "gate" in line]
    assert "is not taken over" in said and "run memdec calibrate again" in said


def test_settings_of_an_update_need_one(corpora, done, build, tmp_path):
    with pytest.raises(MemdecError, match="update.epochs is for --update: give that as well"):
        build(done.base, corpora.new, tmp_path / "new", {"update": {"epochs": 3}})
    assert not (tmp_path / "new").exists()


def test_removed_text_that_cannot_be_deleted_is_not_sealed(
    corpora, done, build, tmp_path, monkeypatch
):
    rmdir = os.rmdir

    def refuse(path, **where):
        if str(path).endswith("gone"):
            raise OSError("in use")
        rmdir(path, **where)

    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(OSError, match="in use"):
        build(done.base, corpora.new, tmp_path / "new", update=done.old)
    assert not (tmp_path / "new/memory").exists()
    monkeypatch.undo()
    build(done.base, corpora.new, tmp_path / "new", until="memory", update=done.old)
    assert not list((tmp_path / "new").rglob("gone"))


BOS, FILLER = 900, 901


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("gone", [[0], [3], [1, 2, 3], [5], [0, 1, 2, 3, 4], []], ids=str)
def test_holes_keep_all_others_in_their_places(tmp_path, bos, gone):
    """Blocks with holes against what the blocks were, token by token."""
    lengths, rng = [5, 12, 9, 40, 3, 17], np.random.default_rng(0)
    documents = [rng.integers(1, 800, n).astype(np.int32) for n in lengths]
    documents = [np.r_[np.int32(BOS), d] if bos else d for d in documents]
    documents[1][4] = ~documents[1][4]
    owners = Owners(documents, bos)
    blocks = [(t, p, owners(p)) for t, p in packed(owners, 8, FILLER, 3, bos)]
    for shard, arrays in enumerate(blocks):
        for kind, array in zip(("tokens", "positions", "documents"), arrays, strict=True):
            np.save(tmp_path / f"{kind}-train-{shard:05d}.npy", array)
    facts = {"train": {"blocks": sum(len(t) for t, *_ in blocks)}, "shard_blocks": 3}
    (tmp_path / "corpus.json").write_text(json.dumps(facts))
    tokens, positions, owner = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
    for number, document in enumerate(documents):  # the owners themselves
        own = tokens[:, 1:][valid_rows(positions) & (owner[:, 1:] == number)]
        assert own.tolist() == [t for t in document[1:].tolist() if t >= 0]
    stays = ~np.isin(np.arange(6), gone)
    kept = KeptBlocks(tmp_path, stays, FILLER)
    t, p, o = (np.concatenate(arrays) for arrays in zip(*resharded(iter(kept), 2), strict=True))
    kept.save(tmp_path)
    assert np.array_equal(load_array(tmp_path / "kept-blocks.npy"), kept.blocks[0].tolist() + [
        b for part in kept.blocks[1:] for b in part.tolist()])  # fmt: skip
    place = load_array(tmp_path / "kept-blocks.npy")
    there = np.isin(owner[place], np.flatnonzero(stays))
    assert np.array_equal(t[there], tokens[place][there])
    assert np.array_equal(p[there], positions[place][there])
    assert (t[~there] == FILLER).all() and (p[~there] == 0).all() and (o[~there] == -1).all()
    rows = load_array(tmp_path / "kept-rows.npy")
    labels = tokens[:, 1:][valid_rows(positions)]
    assert t[:, 1:][valid_rows(p)].tolist() == labels[rows].tolist()
    assert not np.setdiff1d(np.arange(len(tokens)), place).size or gone
    # What is gone is packed anew, row for row.
    parts = list(gone_fragments(tmp_path, tmp_path))
    if parts:
        t, p = (np.concatenate(a) for a in zip(*packed(parts, 8, FILLER, 3, bos), strict=True))
        assert t[:, 1:][valid_rows(p)].tolist() == labels[~rows].tolist()
        assert (t[unmarked(p) == 0] == BOS).sum() or bos is None
    assert bool(parts) == bool(gone)


def test_copies_are_counted():
    old, new = np.array([7, 7, 3, 7, 5]), np.array([9, 7, 5, 7, 5])
    stays, added = compare(old, new)
    assert stays.tolist() == [True, True, False, False, True]
    assert added.tolist() == [True, False, False, False, True]


def test_new_documents_are_held_out_by_the_same_digests():
    train = np.array([[50, 10], [90, 10], [60, 4]], np.uint64)
    held_out = np.array([[20, 10], [40, 10], [60, 6]], np.uint64)  # 60 is cut
    texts = np.array([90, 20, 60, 30, 45, 5], np.uint64)
    lengths = np.array([10, 10, 10, 10, 10, 500])
    taken = split_as_before(lengths, texts, train, held_out, 0.05)
    # 30 lies below the highest digest that was held out, 40; a long text is not held out.
    assert taken.tolist() == [10, 0, 4, 0, 10, 500]
