"""What changes nothing rebuilds nothing, and what a sentence says to do keeps what is done."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data import inputs
from vllm_memdec.train.data.documents import READER
from vllm_memdec.train.data.inputs import REMEMBERED, Hashes, model_hash
from vllm_memdec.train.data.shards import load_shard
from vllm_memdec.train.model import hidden_states
from vllm_memdec.train.pipeline import STAGES
from vllm_memdec.train.settings import parse_settings
from vllm_memdec.train.stages import datastore, export, index, search
from vllm_memdec.train.stages import training as trainer
from vllm_memdec.train.verify.report import FAILED, verify

UP_TO_DATE = [f"{stage}: up to date" for stage in STAGES]


@pytest.fixture
def copy(pipeline, tmp_path):
    """Return a copy of the finished run: base, corpus and output, free to be changed."""
    shutil.copytree(pipeline.base, tmp_path / "base")
    shutil.copy(pipeline.corpus, tmp_path / "corpus.jsonl")
    shutil.copytree(pipeline.output, tmp_path / "out")
    return tmp_path


def again(copy, build, changes=None, until="export"):
    corpus = copy / "corpus.jsonl"
    return build(str(copy / "base"), corpus, copy / "out", changes, until=until)


def rebuilt(lines):
    return [s for s in STAGES if f"{s}: building again, its settings or inputs changed" in lines]


@pytest.mark.parametrize(
    "changes",
    [
        {"datastore": {"batch_blocks": 1}},
        {"memory": {"micro_batch_blocks": 1}},
        {"memory": {"checkpoint_seconds": 1}},
        {"memory": {"evaluate_steps": 7}},  # looked at, no more
    ],
    ids=lambda changes: next(iter(next(iter(changes.values())))),
)
def test_settings_that_change_nothing(copy, build, changes):
    assert again(copy, build, changes) == UP_TO_DATE


def test_unfinished_work_is_taken_up_with_another_batch_size(copy, build):
    whole = hashes_of(copy / "out", ["datastore"])
    for stage in STAGES[1:]:
        shutil.rmtree(copy / "out" / stage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datastore, "save_array", stopping_at("keys-00002"))
        with pytest.raises(KeyboardInterrupt):
            again(copy, build, until="datastore")
    kept = (copy / "out/datastore.partial/keys-00001.npy").stat().st_mtime_ns
    lines = again(copy, build, {"datastore": {"batch_blocks": 2}}, "datastore")
    assert "datastore: resuming" in lines
    assert (copy / "out/datastore/keys-00001.npy").stat().st_mtime_ns == kept
    assert hashes_of(copy / "out", ["datastore"]) == whole


def hashes_of(output, stages):
    return [json.loads((output / s / "manifest.json").read_text())["hash"] for s in stages]


def stopping_at(name):
    from vllm_memdec.train.data.shards import save_array

    def save(path, array):
        if name in path.name:
            raise KeyboardInterrupt
        save_array(path, array)

    return save


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BESIDE = {
    "template": lambda base: (base / "chat_template.jinja").write_text("{# another #}"),
    "template in the tokenizer": lambda base: edit(
        base / "tokenizer_config.json", chat_template="{{ messages }}"
    ),
    "README": lambda base: (base / "README.txt").write_text("Read me."),
    "generation": lambda base: (base / "generation_config.json").write_text('{"top_k": 7}'),
    "scores": lambda base: (base / "eval_results.json").write_text('{"loss": 1}'),
    "version": lambda base: edit(base / "config.json", transformers_version="9.9.9"),
    "optimiser": lambda base: (base / "training_args.bin").write_bytes(b"no weights"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_files_beside_a_base_that_no_stage_reads(copy, build, name):
    BESIDE[name](copy / "base")
    assert again(copy, build) == UP_TO_DATE


def test_places_that_moved(copy, build, tmp_path):
    os.rename(copy / "base", copy / "moved")
    os.symlink(copy / "moved", copy / "base")
    os.rename(copy / "corpus.jsonl", copy / "other.jsonl")
    os.symlink(copy / "other.jsonl", copy / "corpus.jsonl")
    assert again(copy, build) == UP_TO_DATE


def test_a_memory_to_start_from_may_move(pipeline, build, tmp_path, monkeypatch):
    init = shutil.copytree(pipeline.output / "export", tmp_path / "models" / "x")
    out = tmp_path / "out"
    changes = {"memory": {"epochs": 0.1, "init": str(init), "layers": None}}
    shutil.copytree(pipeline.output, out)
    assert rebuilt(build(pipeline.base, pipeline.corpus, out, changes)) == ["memory", "export"]
    monkeypatch.chdir(tmp_path)
    for place in ("models/x", "./models/x", "elsewhere"):
        if place == "elsewhere":
            os.rename("models", "elsewhere")
            place = "elsewhere/x"
        changes["memory"]["init"] = place
        assert rebuilt(build(pipeline.base, pipeline.corpus, out, changes)) == []
    (tmp_path / "elsewhere/x/README.md").write_text("A card.")
    assert rebuilt(build(pipeline.base, pipeline.corpus, out, changes)) == []
    # And no path of this machine is in what is published.
    for path in (out / "export").rglob("*.json"):
        assert str(tmp_path) not in path.read_text() and "elsewhere" not in path.read_text()


def last_bytes(path):
    with open(path, "r+b") as file:
        file.seek(-4, 2)
        file.write(bytes(4))


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (lambda base: edit(base / "tokenizer_config.json", eos_token="<s>"), "corpus"),
        (lambda base: edit(base / "config.json", max_position_embeddings=128), "corpus"),
        (lambda base: last_bytes(base / "model.safetensors"), "datastore"),
        (lambda base: edit(base / "config.json", rms_norm_eps=1e-4), "datastore"),
    ],
    ids=["tokenizer", "positions", "weights", "config"],
)
def test_what_does_change_the_result(copy, build, change, first):
    """A stage's hash of the base covers what it reads: the tokens outlive other weights."""
    change(copy / "base")
    lines = again(copy, build, until="datastore")
    assert rebuilt(lines) == {"corpus": ["corpus", "datastore"]}.get(first, [first]), lines


def test_a_field_that_groups_is_an_input(pipeline, build, tmp_path):
    rows = [json.loads(line) for line in Path(pipeline.corpus).read_text().splitlines()]
    corpus, out, grouped = tmp_path / "corpus.jsonl", tmp_path / "out", {"corpus": {"group": "b"}}

    def building(first):
        lines = [json.dumps(row | {"b": first + n // 2}) + "\n" for n, row in enumerate(rows)]
        corpus.write_text("".join(lines))
        return build(pipeline.base, corpus, out, grouped, until="corpus")

    building(0)
    assert building(0) == ["corpus: up to date"]
    assert rebuilt(building(100)) == ["corpus"]


def test_a_field_is_not_asked_for_where_nothing_is_held_out(pipeline, build, tmp_path):
    text, out = tmp_path / "validation.jsonl", tmp_path / "out"
    text.write_text('{"text": "Of this text, which has no groups, nothing is trained on."}\n' * 9)
    given = {"validation": text, "until": "corpus"}
    build(pipeline.base, pipeline.corpus, out, {"corpus": {"group": "book"}}, **given)
    assert build(pipeline.base, pipeline.corpus, out, **given) == ["corpus: up to date"]


def test_what_shapes_the_index_is_in_its_manifest(pipeline):
    """Not the setting, which may be "auto", but what it came to."""
    settings = json.loads((pipeline.output / "index/manifest.json").read_text())["settings"]
    kind = json.loads((pipeline.output / "index/index.json").read_text())["kind"]
    assert settings["kind"] == kind and settings["kind"] != "auto" and "probes" not in settings


def test_hashes_are_remembered_beside_the_output(copy, build, monkeypatch):
    before = sorted(p.name for p in (copy / "base").iterdir())
    for path in [*(copy / "base").iterdir(), copy / "corpus.jsonl"]:
        os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(inputs, "SETTLED", 0)
    again(copy, build)
    assert sorted(p.name for p in (copy / "base").iterdir()) == before
    remembered = json.loads((copy / "out" / REMEMBERED).read_text())
    assert any(name.startswith(f"text {READER} of ") for name in remembered), "whose reading it was"
    assert any(name.endswith("model.safetensors") for name in remembered)

    def not_again(path, *_):
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(inputs, "file_sha256", not_again)
    monkeypatch.setattr(inputs, "read_whole", not_again)
    assert again(copy, build) == UP_TO_DATE
    with pytest.raises(AssertionError, match="model.safetensors was read again"):
        last_bytes(copy / "base/model.safetensors")
        os.utime(copy / "base/model.safetensors", (1e9, 1e9))  # another content, the same time
        again(copy, build)
    with pytest.raises(AssertionError, match="corpus.jsonl was read again"):
        (copy / "corpus.jsonl").write_text((copy / "corpus.jsonl").read_text() * 2)
        Hashes(copy / "out").text(copy / "corpus.jsonl")


def test_a_file_that_was_written_just_now_is_not_remembered(copy):
    """It may change once more within the clock's tick."""
    (copy / "a.txt").write_text("Some text.")
    hashes_ = Hashes(copy)
    hashes_.file(copy / "a.txt"), hashes_.save()
    assert not (copy / REMEMBERED).exists()
    (copy / REMEMBERED).write_text("{broken")
    assert Hashes(copy).file(copy / "a.txt") == hashes_.file(copy / "a.txt")


# -- Memory that runs out ------------------------------------------------------------------------

TOO_LARGE = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")


def refusing_above(monkeypatch, stage):
    """Let a stage run out of memory, after some work, unless it does what its sentence says."""
    limit = {"budget": 2**26, "blocks": 2}

    def guarded(owner, name, too_large, after=2):
        whole, calls = getattr(owner, name), [0]

        def call(*args, **options):
            calls[0] += 1
            if calls[0] > after and too_large(*args):
                raise TOO_LARGE
            return whole(*args, **options)

        monkeypatch.setattr(owner, name, call)

    match stage:
        case "datastore":
            guarded(hidden_states, "embed", lambda *given: given[-1] > limit["blocks"])
        case "index":
            # By 4 GiB a part takes two shards, by 64 MiB one.
            monkeypatch.setattr(index, "PART_SHARE", 2**32 // (2**11 * 40))
            guarded(index.Filler, "__call__", lambda filler, n: len(filler.parts[n]) > 1, 1)
        case "targets":
            guarded(search.Index, "_add", lambda self, *_: self.budget > limit["budget"], 3)
        case "memory":
            guarded(
                trainer, "add_gradients",
                lambda m, batches, blocks, *_: len(blocks) > limit["blocks"], 20,
            )  # fmt: skip
        case "export":
            calls = [0]

            def once(*args):
                calls[0] += 1
                return calls[0] == 1

            guarded(export, "best_alpha", once, 0)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_what_to_do_if_memory_runs_out(stage, pipeline, command, quick, monkeypatch):
    """The printed sentence is followed: what was finished is kept, and the result is the same."""
    settings = quick({"memory": {"checkpoint_seconds": 0}})
    memdec = command(pipeline.base, pipeline.corpus, settings)
    shutil.copytree(pipeline.output, memdec.output)
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(memdec.output / later)
    refusing_above(monkeypatch, stage)
    code, err = memdec.here(until=stage)
    said = err.splitlines()[-1]
    assert code == 1 and said.startswith(f"memdec: out of memory in the {stage} stage: "), err
    assert said.endswith("and run again, finished parts are kept.")
    files = ("*-0000?.npy", "lists-*.faiss")
    done = {p: p.stat().st_mtime_ns for name in files for p in memdec.output.rglob(name)}
    options, followed = {}, 0
    while "lower" in said or "set " in said:  # until it says no more, or works
        followed += 1
        assert followed < 9, said
        if "--memory-budget" in said:
            options["memory-budget"] = "64MiB"
        if remedy := re.search(r"lower (\w+)\.(\w+) \(it is (\d+)\)", said):
            settings[remedy[1]][remedy[2]] = int(remedy[3]) // 2
        if remedy := re.search(r"set (\w+)\.(\w+) to (\w+)", said):
            settings[remedy[1]][remedy[2]] = json.loads(remedy[3])
        path = memdec.output.parent / "settings.yaml"
        path.write_text(json.dumps(settings))  # JSON is YAML
        code, err = memdec.here(until=stage, **options)
        if code == 0:
            break
        said = err.splitlines()[-1]
    else:
        code, err = memdec.here(until=stage)
    assert code == 0, err
    assert "starting over" not in err and "building again" not in err
    if stage == "memory":
        assert re.search(r"resuming at step [1-9]", err)
    for path, when in done.items():
        kept = path.parent.with_name(path.parent.name.removesuffix(".partial")) / path.name
        assert kept.stat().st_mtime_ns == when, path
    partly = ("datastore", "index", "targets")
    assert any(".partial" in str(p) for p in done) == (stage in partly)
    if stage == "index":  # in other parts
        remedy = [search.Index(o / "index", 8, 2**30) for o in (memdec.output, pipeline.output)]
        queries = load_shard(pipeline.output / "datastore", "keys", 1)
        (a, near_a), (b, near_b) = (each.search(queries, 9) for each in remedy)
        assert len(remedy[0].sizes) > len(remedy[1].sizes) == 1
        assert np.array_equal(near_a, near_b) and np.array_equal(a, b)
    elif stage != "memory":  # another size of batches adds in another order: last bits may differ
        assert hashes_of(memdec.output, [stage]) == hashes_of(pipeline.output, [stage])


# -- Whole or not sealed -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("corpus", "positions-train-00001.npy"),
        ("corpus", "used-validation.npy"),
        ("datastore", "keys-00002.npy"),
        ("datastore", "labels-00002.npy"),
        ("index", "lists-00000.faiss"),
        ("index", "trained.faiss"),
        ("targets", "ids-00001.npy"),
        ("targets", "probs-00003.npy"),
        ("memory", "model.safetensors"),
        ("export", "config.json"),
    ],
)
def test_a_stage_without_one_of_its_files_is_not_sealed(copy, build, monkeypatch, stage, name):
    """As if a worker had written it to a folder of the same name on its own disk."""
    from vllm_memdec.train import pipeline

    whole = hashes_of(copy / "out", [stage])
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(copy / "out" / later)
    make_stage, elsewhere = pipeline.build_artifact, copy / "elsewhere"

    def losing(path, given, settings, read, make, *rest):
        def made(work):
            make(work)
            if given == stage:
                (work / name).rename(elsewhere)

        return make_stage(path, given, settings, read, made, *rest)

    monkeypatch.setattr(pipeline, "build_artifact", losing)
    with pytest.raises(MemdecError, match=f"{name} are not in .*{stage}.partial .* run again"):
        again(copy, build, until=stage)
    assert not (copy / "out" / stage).exists()
    assert not (copy / "out" / f"{stage}.partial" / "manifest.json").exists()
    monkeypatch.undo()
    if stage not in ("datastore", "targets"):  # a listing that was late: it is there after all
        elsewhere.rename(copy / "out" / f"{stage}.partial" / name)
    again(copy, build, until=stage)  # of the others the lost shard is made again
    if stage != "export":  # which names its base's folder, another one here
        assert hashes_of(copy / "out", [stage]) == whole


# -- Builds of before ----------------------------------------------------------------------------


def as_before(copy, build):
    """Give the stages the settings and inputs that manifests had at first, and all that follows."""
    settings, hashes = parse_settings({}), {}
    base = model_hash(str(copy / "base"), "--base")
    for stage in STAGES:
        path = copy / "out" / stage / "manifest.json"
        manifest = json.loads(path.read_text())
        was = getattr(settings, stage).model_dump() | manifest["settings"]
        if stage == "index":
            was = {"kind": "auto", "seed": 42}
        for name in ("checkpoint_seconds", "tokenizer", "adapt_tokenizer", "transfer_fraction"):
            was.pop(name, None)
        read = {n: hashes.get(n, h) for n, h in manifest["inputs"].items()}
        if stage == "corpus":
            read = {"corpus": read["corpus"]}
        if stage in ("corpus", "datastore", "memory", "export"):
            read["base"] = base
        manifest |= {"settings": was, "inputs": read}
        if stage == "export":
            config = json.loads((path.parent / "config.json").read_text())
            made_from = config["memdec"]["provenance"]["artifacts"]
            made_from |= {name: hashes[name] for name in made_from}
            (path.parent / "config.json").write_text(json.dumps(config))
            manifest["files"]["config.json"] = {
                "bytes": (path.parent / "config.json").stat().st_size,
                "sha256": inputs.file_sha256(path.parent / "config.json"),
            }
        from vllm_memdec.train.data.artifacts import HASHED, json_sha256

        manifest["hash"] = hashes[stage] = json_sha256({key: manifest[key] for key in HASHED})
        path.write_text(json.dumps(manifest))


def test_a_build_of_before(copy, build):
    as_before(copy, build)
    results = verify(copy / "out", sample=16, base=copy / "base")
    assert [c.name for c in results if c.status == FAILED] in ([], ["fidelity"])
    lines = again(copy, build, until="datastore")
    said = [line for line in lines if "again" in line]
    of_another = "building again, another release made it"
    assert said == [f"{stage}: {of_another}" for stage in ("corpus", "datastore")]
    assert not any("damaged" in line for line in lines)
