"""`memdec verify` on a real small build, whole and damaged: each check must see what it is for.

A copy whose content was damaged is sealed again, so that its manifests tell nothing and exactly
the check that looks at this content has to fail.
"""

import json
import re
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from vllm_memdec.train.data.artifacts import HASHED, data_files, file_sha256, json_sha256
from vllm_memdec.train.data.shards import save_array, shards
from vllm_memdec.train.pipeline import STAGES
from vllm_memdec.train.stages import targets as targets_stage
from vllm_memdec.train.stages.index import write_part
from vllm_memdec.train.verify.brute_force import StoredTargets, evenly, nearest, target
from vllm_memdec.train.verify.report import FAILED, MEASURED, NOT_CHECKED, OK, verify

SAMPLE = 192  # rows; what is damaged in a test is among them
LEARNED = {"memory": {"epochs": 6, "learning_rate": 3e-3}}  # enough to know more than word counts
NAMES = ["files", "manifests", "schema", "chain", "tokenizer", "held-out text", "alignment",
         "probabilities", "recall", "label leak", "fidelity", "memorisation"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(pipeline, build, tmp_path_factory):
    """Return the output of a finished run whose memory learned something. Not to be changed."""
    output = shutil.copytree(pipeline.output, tmp_path_factory.mktemp("whole") / "out")
    build(pipeline.base, pipeline.corpus, output, LEARNED)
    return output


@pytest.fixture
def copy(whole, tmp_path):
    """Return a copy of the finished run's output, free to be damaged."""
    return shutil.copytree(whole, tmp_path / "out")


@pytest.fixture(scope="module")
def foreign(tiny_model, pipeline, build, tmp_path_factory):
    """Return a build of the same text with another tokenizer."""
    output = tmp_path_factory.mktemp("foreign") / "out"
    build(tiny_model("llama", tokenizer=1), pipeline.corpus, output, {"memory": {"epochs": 0.1}})
    return output


def seal(output):
    """Make every manifest anew, as if the stages had written what now lies there."""
    hashes = {}
    for stage in STAGES:
        path = output / stage / "manifest.json"
        manifest = json.loads(path.read_text())
        if stage == "export":
            config = json.loads((output / stage / "config.json").read_text())
            made_from = config["memdec"]["provenance"]["artifacts"]
            made_from |= {name: hashes[name] for name in made_from}
            (output / stage / "config.json").write_text(json.dumps(config))
        if stage != "corpus":
            manifest["inputs"] |= {n: hashes[n] for n in manifest["inputs"] if n in hashes}
        manifest["files"] = {
            str(p.relative_to(path.parent)): {
                "bytes": p.stat().st_size,
                "sha256": file_sha256(p),
            }
            for p in data_files(path.parent)
        }
        hashes[stage] = manifest["hash"] = json_sha256({key: manifest[key] for key in HASHED})
        path.write_text(json.dumps(manifest))


def checked(artifact, **options):
    return {check.name: check for check in verify(artifact, sample=SAMPLE, **options)}


def failed(results):
    return [name for name, check in results.items() if check.status == FAILED]


def change_shard(folder, name, change):
    """Rewrite the second of a stage's shards."""
    path = folder / f"{name}-00001.npy"
    save_array(path, change(np.load(path)))


def test_a_sound_build_passes(whole, pipeline):
    results = checked(whole, base=Path(pipeline.base))
    assert list(results) == NAMES
    measured = {name for name, check in results.items() if check.status == MEASURED}
    assert measured == {"held-out text", "memorisation"}
    assert {check.status for check in results.values()} == {OK, MEASURED}
    assert results["held-out text"].figures["equal"] == 0
    assert results["held-out text"].figures["documents"] > 0
    assert (
        results["recall"].figures["recall_at_64"] > 0.95 < results["recall"].figures["recall_at_16"]
    )
    rows = json.loads((whole / "corpus/corpus.json").read_text())["train"]["rows"]
    assert {results[n].figures["rows"] for n in ("alignment", "probabilities")} == {rows}
    tops = [
        probs[start:stop].max()
        for offsets, probs in zip(
            *(
                [np.load(path) for path in sorted((whole / "targets").glob(f"{name}-*.npy"))]
                for name in ("offsets", "probs")
            ),
            strict=True,
        )
        for start, stop in zip(offsets, offsets[1:], strict=False)
    ]
    top = results["probabilities"].figures["mean_top_probability"]
    assert top == pytest.approx(np.mean(tops, dtype=np.float64), rel=1e-4)
    # The corpus repeats sentences, though hardly ever at a document's beginning.
    assert 0 < results["recall"].figures["copies"] < 0.2
    assert results["label leak"].figures["rows"] == SAMPLE
    assert results["label leak"].figures["tv_from_exact"] < 0.02
    fidelity = results["fidelity"].figures
    assert fidelity["memory"]["kl"] < fidelity["unigram"]["kl"] < fidelity["base"]["kl"]
    assert results["memorisation"].figures["passages_16"] > 20


def truncated(path):
    path.write_bytes(path.read_bytes()[:-7])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncated, flipped, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_file_is_named(copy, stage, damage):
    path = max(data_files(copy / stage), key=lambda p: p.stat().st_size)
    damage(path)
    results = checked(copy)
    assert failed(results) == ["files"]
    assert f"{stage}/{path.name}" in results["files"].detail
    assert results["files"].fix.startswith(f"delete the {stage} folder ")
    # Of memory and export either will do to measure fidelity.
    assert stage == "memory" or any(f"{stage} is damaged" in c.detail for c in results.values())
    assert failed(checked(copy / stage)) == ["files"]


def test_a_stray_shard_is_seen(copy):
    """Shards are found by their names: one too many would be read."""
    shutil.copy(copy / "datastore/keys-00000.npy", copy / "datastore/keys-00099.npy")
    results = checked(copy)
    assert (
        failed(results) == ["files"] and "datastore/keys-00099.npy is no" in results["files"].detail
    )


def test_a_file_of_the_user_s_is_not_to_be_deleted(copy):
    """What the sentence says is done: the file is moved, nothing is made again."""
    (copy / "export/notes.md").write_text("My notes.")
    fix = checked(copy)["files"].fix
    assert fix == "move export/notes.md out of the build's folders and verify again."
    (copy / "export/notes.md").rename(copy / "notes.md")
    assert failed(checked(copy)) == []
    (copy / "export/README.md").write_text("My model card.")  # `memdec push` uploads it
    assert failed(checked(copy)) == []
    (copy / "export/notes.md").write_text("My notes.")
    truncated(copy / "targets/ids-00000.npy")
    fix = checked(copy)["files"].fix
    assert fix.startswith("move export/notes.md out of the build's folders; then delete the tar")


def test_manifests_of_others(copy):
    path = copy / "targets/manifest.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"settings": {}}))
    assert failed(checked(copy)) == ["manifests"]
    other = whole | {"schema": 2}
    other["hash"] = json_sha256({key: other[key] for key in HASHED})
    path.write_text(json.dumps(other))
    results = checked(copy)
    assert failed(results) == ["schema", "chain"]  # memory and export were made from version 1
    assert "targets has 2" in results["schema"].detail
    path.write_text("{}")
    results = checked(copy)
    assert failed(results) == ["files", "manifests"]
    assert "targets/manifest.json" in results["files"].detail
    assert results["probabilities"].detail == "targets is damaged"


def test_targets_of_another_tokenizer(copy, foreign):
    shutil.rmtree(copy / "targets")
    shutil.copytree(foreign / "targets", copy / "targets")
    results = checked(copy)
    assert {"chain", "alignment"} <= set(failed(results))
    assert "targets was made from another datastore" in results["chain"].detail
    assert "memory was made from another targets" in results["chain"].detail
    seal(copy)
    assert "alignment" in failed(checked(copy)) and "chain" not in failed(checked(copy))


def test_an_export_of_another_tokenizer(copy, foreign):
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(copy / "export" / name, copy / name)
        shutil.copy(foreign / "export" / name, copy / "export" / name)
        seal(copy)
        results = checked(copy)
        assert failed(results) == ["tokenizer"]
        shutil.copy(copy / name, copy / "export" / name)


def test_an_export_of_another_build(copy, foreign):
    """Whole, of the right tokenizer or not: its config says what it was made from."""
    config = json.loads((copy / "export/config.json").read_text())
    other = json.loads((foreign / "export/manifest.json").read_text())["inputs"]["memory"]
    config["memdec"]["provenance"]["artifacts"]["memory"] = other
    (copy / "export/config.json").write_text(json.dumps(config))
    assert "export was made from another memory" in checked(copy)["chain"].detail


@pytest.mark.parametrize("stage", ["datastore", "targets"])
@pytest.mark.parametrize(
    "change",
    [
        lambda labels: np.roll(labels, 1),
        lambda labels: labels + (np.arange(len(labels)) == 7),
        lambda labels: labels[:-1],
    ],
    ids=["shifted", "one", "fewer"],
)
def test_labels_that_are_not_the_corpus_s(copy, stage, change):
    change_shard(copy / stage, "labels", lambda labels: change(labels).astype(labels.dtype))
    seal(copy)
    results = checked(copy)
    assert "alignment" in failed(results) and stage in results["alignment"].detail
    # The labels of the datastore are those of all neighbours, those of targets nobody else's.
    assert stage == "datastore" or failed(results) == ["alignment"]


def put_row(folder, row, content):
    """Replace one row of the targets by {token: probability}."""
    starts = np.cumsum([0, *(len(part) for part in shards(folder, "labels"))])
    shard = int(np.searchsorted(starts, row, side="right")) - 1
    arrays = {n: np.load(folder / f"{n}-{shard:05d}.npy") for n in ("offsets", "ids", "probs")}
    here = row - starts[shard]
    first, last = arrays["offsets"][here : here + 2]
    for name, values in (
        ("ids", sorted(content)),
        ("probs", [content[t] for t in sorted(content)]),
    ):
        old = arrays[name]
        new = np.r_[old[:first], np.array(values, old.dtype), old[last:]]
        save_array(folder / f"{name}-{shard:05d}.npy", new)
    arrays["offsets"][here + 1 :] += len(content) - (last - first)
    save_array(folder / f"offsets-{shard:05d}.npy", arrays["offsets"])


def test_one_row_that_is_its_own_neighbour(copy):
    """The reference drops the first neighbour, whoever it is: with itself kept, a row leaks."""
    folder = copy / "targets"
    facts = json.loads((folder / "targets.json").read_text())
    keys, labels = (np.concatenate(shards(copy / "datastore", n)) for n in ("keys", "labels"))
    stored = StoredTargets(folder)
    sampled = evenly(len(keys), SAMPLE).tolist()
    row = next(r for r in sampled[20:] if labels[r] not in stored.row(r)[0])
    distances, ids = nearest([keys], keys[row : row + 1], facts["neighbours"])
    assert ids[0, 0] == row
    put_row(folder, row, target(distances[0], labels[ids[0]], facts["temperature"], 0))
    assert labels[row] in StoredTargets(folder).row(row)[0]
    seal(copy)
    results = checked(copy)
    assert failed(results) == ["label leak"] and results["label leak"].figures["leaks"] == 1
    assert str(row) in results["label leak"].detail


def test_a_build_that_keeps_rows_as_their_neighbours(pipeline, build, copy, monkeypatch):
    """The same with the defect in the code: the check does not lean on what it checks."""
    keep = lambda distances, ids, own: (distances[:, :-1], ids[:, :-1])  # noqa: E731
    monkeypatch.setattr(targets_stage, "neighbours_without_self", keep)
    shutil.rmtree(copy / "targets")
    build(pipeline.base, pipeline.corpus, copy, {"memory": {"epochs": 0.1}})
    results = checked(copy / "targets")
    assert failed(results) == ["label leak"]
    figures = results["label leak"].figures
    assert figures["own_neighbour"] > 0.9 * figures["rows"] and figures["tv_from_exact"] > 0.04


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("probs", lambda p: p * np.where(np.arange(len(p)) < 5, 1.03, 1), "row .*off 1 by"),
        ("probs", lambda p: p * (np.arange(len(p)) != 40), "row .*off 1 by"),
        ("ids", lambda ids: ids[::-1], "do not ascend"),
        ("ids", lambda ids: ids + 1000 * (np.arange(len(ids)) == len(ids) - 1), "vocabulary of"),
        ("offsets", lambda o: np.r_[o[:-1], o[-1] + 1], "offsets .* do not fit"),
    ],
    ids=["unnormalised", "zero", "order", "vocabulary", "offsets"],
)
def test_probabilities_that_are_none(copy, name, change, says):
    change_shard(copy / "targets", name, lambda values: change(values).astype(values.dtype))
    seal(copy)
    results = checked(copy)
    assert "probabilities" in failed(results)
    assert re.search(says, results["probabilities"].detail)


def test_an_index_of_other_keys(copy):
    path = next((copy / "index").glob("lists*.faiss"))
    keys = np.concatenate(shards(copy / "datastore", "keys")).astype(np.float32)
    wrong = faiss.read_index(str(copy / "index/trained.faiss"))
    wrong.add(np.roll(keys, 1, axis=0))
    write_part(wrong, path)
    seal(copy)
    results = checked(copy)
    assert "recall" in failed(results) and results["recall"].figures["recall_at_64"] < 0.5
    # Rows are allowed what the index gives them: one that is wrong may allow less than they have.
    assert set(failed(results)) <= {"recall", "label leak"}


def test_a_memory_that_learned_nothing(copy, pipeline):
    """Neither a random one nor one of too few epochs knows more than word counts."""
    assert failed(checked(pipeline.output)) == ["fidelity"]
    config = AutoModelForCausalLM.from_pretrained(copy / "memory").config
    AutoModelForCausalLM.from_config(config).save_pretrained(copy / "memory")
    seal(copy)
    results = checked(copy)
    assert failed(results) == ["fidelity"] and "memory.epochs" in results["fidelity"].fix


def test_what_is_not_there_is_not_checked(copy):
    for path in (copy / "datastore").glob("keys-*"):
        path.unlink()
    seal(copy)
    results = checked(copy)
    assert failed(results) == []
    for name in ("recall", "label leak"):
        assert results[name].status == NOT_CHECKED and "keys were not kept" in results[name].detail
    for stage in ("memory", "export"):
        shutil.rmtree(copy / stage)
    results = checked(copy)
    assert failed(results) == []
    for name in ("fidelity", "memorisation"):
        assert results[name].status == NOT_CHECKED
        assert results[name].detail == "memory or export is not there"
    assert results["tokenizer"].detail == "export is not there"


def test_one_stage_by_itself(whole):
    results = checked(whole / "index")
    assert list(results) == ["files", "manifests", "schema", "chain", "recall"]
    assert {check.status for check in results.values()} == {OK}


def test_the_command(copy, tmp_path, foreign, tiny_model, memdec_here):
    report = tmp_path / "report.json"
    code, out, err = memdec_here("verify", copy, "--json", report, "--sample", 100)
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in lines] == NAMES  # one line each
    said = json.loads(report.read_text())
    assert said["passed"] and [check["name"] for check in said["checks"]] == NAMES
    flipped(copy / "targets/probs-00001.npy")
    code, out, err = memdec_here("verify", copy, "--json", report)
    assert code == 1 and "targets/probs-00001.npy" in out
    assert err.splitlines()[-1] == (
        "memdec: files failed: delete the targets folder and run the same memdec build again: "
        "it makes anew what is gone."
    )
    assert not json.loads(report.read_text())["passed"]
    for words, sentence in (
        ((tmp_path,), f"memdec: {tmp_path} is no build"),
        ((copy, "--base", tiny_model("llama", tokenizer=1)), "is not the base of this build"),
        ((copy, "--json", tmp_path / "nowhere/report.json"), "nowhere is no folder: create it"),
        ((copy, "--json", tmp_path), "is a folder: give --json a file"),
    ):
        code, out, err = memdec_here("verify", *words)
        assert code == 1 and sentence in err.splitlines()[-1] and "Traceback" not in err
