"""The whole chain on a tiny model and some English: skipping, rebuilding, and what comes out."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_memdec.checkpoint import read_block, tokenizer_fingerprint
from vllm_memdec.errors import MemdecError
from vllm_memdec.gate import check_gate, read_gate, write_gate
from vllm_memdec.train.data.artifacts import locked, open_artifact
from vllm_memdec.train.data.inputs import REMEMBERED
from vllm_memdec.train.model.windows import validation_documents, windows
from vllm_memdec.train.pipeline import STAGES

UP_TO_DATE = [f"{stage}: up to date" for stage in STAGES]


def times(folder):
    files = sorted(p for p in folder.rglob("*") if p.name not in (".lock", REMEMBERED))
    return {p: p.stat().st_mtime_ns for p in files}


@pytest.fixture
def copy(pipeline, tmp_path):
    """Return a copy of the finished run's output, free to be changed."""
    return shutil.copytree(pipeline.output, tmp_path / "out")


def test_second_run_builds_nothing_and_says_so(pipeline, build):
    before = times(pipeline.output)
    assert build(pipeline.base, pipeline.corpus, pipeline.output) == UP_TO_DATE
    assert times(pipeline.output) == before
    assert not list(pipeline.output.glob("*.partial"))


@pytest.mark.parametrize(
    ("changes", "rebuilt"),
    [
        ({"targets": {"neighbours": 8}}, {"targets", "memory", "export"}),
        ({"index": {"probes": 7}}, {"targets", "memory", "export"}),
        ({"memory": {"beta": 0.9}}, {"memory", "export"}),
        ({"export": {"alpha": 0.25}}, {"export"}),
        ({"memory": {"checkpoint_seconds": 5}}, set()),
    ],
    ids=["targets", "probes", "memory", "export", "checkpoints"],
)
def test_a_setting_rebuilds_what_depends_on_it(pipeline, build, copy, changes, rebuilt):
    before = times(copy)
    lines = build(pipeline.base, pipeline.corpus, copy, changes)
    for stage in STAGES:
        again = f"{stage}: building again, its settings or inputs changed" in lines
        assert again == (stage in rebuilt)
        assert (f"{stage}: up to date" in lines) == (stage not in rebuilt)
    changed = {p.relative_to(copy).parts[0] for p, t in times(copy).items() if before.get(p) != t}
    assert changed - {"."} == rebuilt


def test_changed_text_rebuilds_everything(pipeline, build, copy, tmp_path, english, jsonl):
    corpus = jsonl(tmp_path / "other.jsonl", english(12, seed=9))
    lines = build(pipeline.base, corpus, copy)
    assert [f"{s}: building again, its settings or inputs changed" in lines for s in STAGES] == [
        True
    ] * len(STAGES)


@pytest.mark.parametrize("name", ["targets/probs-00000.npy", "export/model.safetensors"])
def test_a_damaged_artifact_is_rebuilt_the_same(pipeline, build, copy, hashes, name):
    whole = hashes(copy)
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    lines = build(pipeline.base, pipeline.corpus, copy)
    stage = name.split("/")[0]
    assert f"{stage}: building again, it is damaged" in lines
    assert [f"{s}: up to date" in lines for s in STAGES] == [s != stage for s in STAGES]
    assert hashes(copy) == whole


def test_without_its_manifest_a_folder_is_left_alone(pipeline, build, copy):
    """It could be anybody's: what is no artifact any more is for the user to move or delete."""
    path = copy / "memory/manifest.json"
    path.write_bytes(path.read_bytes()[:100])
    before = times(copy)
    with pytest.raises(MemdecError, match="out/memory is in the way .*: move it elsewhere"):
        build(pipeline.base, pipeline.corpus, copy)
    assert times(copy) == before


def test_same_settings_in_another_folder_give_the_same_hashes(pipeline, build, tmp_path, hashes):
    base = shutil.copytree(pipeline.base, tmp_path / "elsewhere" / pipeline.base.split("/")[-1])
    corpus = shutil.copy(pipeline.corpus, tmp_path / "renamed.jsonl")
    build(str(base), tmp_path / corpus, tmp_path / "other")
    assert hashes(tmp_path / "other") == hashes(pipeline.output)


def test_a_manifest_that_was_edited_counts_as_damaged(copy):
    manifest = json.loads((copy / "memory/manifest.json").read_text())
    assert open_artifact(copy / "memory").hash == manifest["hash"]
    manifest["settings"]["beta"] = 0.75
    (copy / "memory/manifest.json").write_text(json.dumps(manifest))
    assert open_artifact(copy / "memory") is None


def unfinish(artifact):
    """Turn a finished artifact back into the working folder it was made in."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    plan = {key: manifest[key] for key in ("schema", "stage", "settings", "inputs")}
    work = artifact.rename(artifact.with_name(artifact.name + ".partial"))
    (work / "plan.json").write_text(json.dumps(plan))
    return work


def test_work_that_only_lacked_its_name_gets_it(pipeline, build, copy, hashes):
    """Killed between the last file and the rename: nothing is made a second time."""
    whole = hashes(copy)
    unfinish(copy / "export")
    lines = build(pipeline.base, pipeline.corpus, copy)
    assert lines == [*UP_TO_DATE[:-1], "export: resuming"]
    assert hashes(copy) == whole and not (copy / "export/plan.json").exists()


def test_a_half_written_file_does_not_stay(pipeline, build, copy, hashes):
    """Killed while a file is written: what is whole is kept, the rest made again."""
    whole = hashes(copy)
    work = unfinish(copy / "targets")
    (work / "manifest.json").unlink()
    (work / "probs-00002.npy").rename(work / "probs-00002.npy.tmp")
    (work / "checkpoint.pt.tmp").write_bytes(b"half of some file that is not written again")
    kept = (work / "probs-00001.npy").stat().st_mtime_ns
    lines = build(pipeline.base, pipeline.corpus, copy)
    assert "targets: resuming" in lines and hashes(copy) == whole
    assert not list(copy.rglob("*.tmp"))
    assert (copy / "targets/probs-00001.npy").stat().st_mtime_ns == kept


def test_unfinished_work_for_other_settings_is_not_mixed_in(pipeline, build, copy, hashes):
    whole = hashes(copy)
    partial = copy / "targets.partial"
    (copy / "targets").rename(partial)
    plan = {"schema": 1, "stage": "targets", "settings": {"neighbours": 3}, "inputs": {}}
    (partial / "plan.json").write_text(json.dumps(plan))
    np.save(partial / "probs-00000.npy", np.zeros(3, np.float16))
    lines = build(pipeline.base, pipeline.corpus, copy)
    assert any(line.startswith("targets: starting over") for line in lines)
    assert hashes(copy) == whole


def test_two_builds_do_not_share_a_folder(pipeline, build):
    with locked(pipeline.output), pytest.raises(ValueError, match="another memdec build"):
        build(pipeline.base, pipeline.corpus, pipeline.output)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP])
def test_storage_without_locks(pipeline, build, monkeypatch, number):
    """It goes on, with a line; what else goes wrong with a lock is raised."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lines = build(pipeline.base, pipeline.corpus, pipeline.output)
    said = [line for line in lines if "has no locks" in line]
    assert len(said) == 1 and os.strerror(number) in said[0] and lines[-1] == "export: up to date"
    number = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        build(pipeline.base, pipeline.corpus, pipeline.output)


def test_odd_paths_and_a_corpus_that_is_only_read(pipeline, command, quick, hashes, tmp_path):
    """Same artifacts from and to folders with odd names; nothing is written beside the corpus."""
    odd = tmp_path / "a b#c%d[e]'é"
    base = shutil.copytree(pipeline.base, odd / "base%20#1")
    text = odd / "text"
    text.mkdir()
    shutil.copy(pipeline.corpus, text)
    before = {p: p.stat().st_mtime_ns for p in (text, *text.rglob("*"))}
    made = command(base, text, quick(), folder=odd / "to #%s")
    code, said = made.here()
    assert code == 0, said
    assert {p: p.stat().st_mtime_ns for p in (text, *text.rglob("*"))} == before
    named = {"export": None}  # has the base's name in it
    assert hashes(made.output) | named == hashes(Path(pipeline.output)) | named


def test_training_lowers_the_loss_and_draws_it(pipeline):
    logs = pipeline.output / "memory" / "logs"
    rows = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    for name in ("kl", "ce"):
        first, last = (np.mean([r[name] for r in part]) for part in (rows[:5], rows[-5:]))
        assert last < 0.7 * first
    assert (logs / "loss.png").read_bytes().startswith(b"\x89PNG")


@torch.inference_mode()
def label_logprobs(folder, text):
    """Return log p of each scored token by plain forward passes, one context at a time."""
    model, logprobs = AutoModelForCausalLM.from_pretrained(folder), []
    for row, position, scored in zip(text.tokens, text.positions, text.scored, strict=True):
        starts = np.flatnonzero(position == 0)
        for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
            run = torch.from_numpy(row[start:stop].astype(np.int64))
            log_p = model(run[None]).logits[0].double().log_softmax(-1)
            rows = torch.from_numpy(np.flatnonzero(scored[start : stop - 1]))
            logprobs.append(log_p[rows, run[rows + 1]])
    return torch.cat(logprobs).numpy()


@pytest.fixture(scope="module")
def two_domains(pipeline, build, tmp_path_factory, english, jsonl):
    """Return a run whose base knows words backwards, its memory English; validation has both."""
    folder = tmp_path_factory.mktemp("two_domains")
    backwards = [text[::-1] for text in english(40, seed=5)]
    more = {"memory": {"epochs": 6, "learning_rate": 3e-3}}
    build(pipeline.base, jsonl(folder / "backwards.jsonl", backwards), folder / "first", more)
    base = str(folder / "first" / "export")  # an export is a model folder like any other
    both = jsonl(folder / "both.jsonl", backwards[:6] + english(6, seed=6))
    build(base, pipeline.corpus, folder / "second", more, validation=both)
    return base, folder / "second"


def test_export_is_a_checkpoint_with_a_calibrated_weight(two_domains):
    base_folder, output = two_domains
    export = output / "export"
    block = read_block(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    same = AutoTokenizer.from_pretrained(base_folder)
    assert tokenizer("some text")["input_ids"] == same("some text")["input_ids"]
    assert block.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    held_out = validation_documents(output / "corpus", 10**6)
    text = windows(held_out, 256, tokenizer.eos_token_id, 10**6)
    assert block.provenance["context_tokens"] == 256  # as many as the models have positions
    base, memory = (label_logprobs(f, text) for f in (base_folder, export))
    grid = np.linspace(0.001, 0.999, 999)
    mixed = [np.log((1 - a) * np.exp(base) + a * np.exp(memory)).mean() for a in grid]
    assert 0.1 < block.alpha < 0.9  # else this test would not see a wrong one
    assert block.alpha == pytest.approx(grid[np.argmax(mixed)], abs=0.0051)
    assert block.alpha == round(block.alpha, 2)
    by_row = np.zeros(len(base))
    starts = [start for start, _ in block.alpha_by_context]
    assert starts == [0, 64]
    for (start, alpha), stop in zip(block.alpha_by_context, [*starts[1:], 256], strict=True):
        here = (text.position_N >= start) & (text.position_N < stop)
        of = [np.log((1 - a) * np.exp(base[here]) + a * np.exp(memory[here])).mean() for a in grid]
        assert alpha == pytest.approx(grid[np.argmax(of)], abs=0.0051)
        by_row[here] = np.log((1 - alpha) * np.exp(base[here]) + alpha * np.exp(memory[here]))
    said = block.provenance["validation_perplexity"]
    for name, logprob in (
        ("base", base.mean()),
        ("memory", memory.mean()),
        ("fixed", max(mixed)),
        ("mixture", by_row.mean()),
    ):
        assert said[name] == pytest.approx(np.exp(-logprob), rel=1e-3)
    assert said["mixture"] <= said["fixed"] < min(said["base"], said["memory"])
    rows = block.provenance["validation_by_context"]
    assert sum(row["tokens"] for row in rows) == len(base)
    targets = json.loads((output / "targets/targets.json").read_text())
    assert block.temperature == targets["temperature"]
    for stage in ("corpus", "targets", "memory"):
        assert block.provenance["artifacts"][stage] == open_artifact(output / stage).hash


def test_a_fresh_memory_of_another_architecture(pipeline, build, tiny_model, tmp_path):
    """memory.init may be only a config; weights are stored as bfloat16 unless told otherwise."""
    (tmp_path / "init").mkdir()
    shutil.copy(tiny_model("gpt2") + "/config.json", tmp_path / "init")
    out = tmp_path / "out"
    changes = {
        "memory": {"init": str(tmp_path / "init"), "epochs": 0.2},
        "export": {"dtype": "bfloat16"},
    }
    build(pipeline.base, pipeline.corpus, out, changes)
    export = AutoModelForCausalLM.from_pretrained(out / "export", dtype="auto")
    assert type(export).__name__ == "GPT2LMHeadModel" and export.dtype == torch.bfloat16
    assert read_block(out / "export").base == pipeline.base.split("/")[-1]


def test_a_gate_is_kept_with_its_memory(pipeline, build, tmp_path):
    """It is made by another command: an export made again keeps it, or says that it does not."""
    out, more = tmp_path / "out", {"export": {"alpha": 0.5}}
    shutil.copytree(pipeline.output, out)
    export = out / "export"
    gate = {"w1": np.zeros((2, 64)), "b1": np.zeros(2), "w2": np.zeros(2), "b2": np.array(0.0)}
    gate |= {"certainty": np.zeros((4, 1)), "context": np.zeros(2), "longest": np.array(9)}
    path = write_gate(export, gate)
    path.with_suffix(".png").write_bytes(b"a chart")
    lines = build(pipeline.base, pipeline.corpus, out, more)
    assert "export: the gate is kept, its memory is the same" in lines
    assert read_block(export).alpha == 0.5 and read_block(export).alpha_by_context is None
    assert check_gate(path, read_gate(path)) is None
    assert path.with_suffix(".png").read_bytes() == b"a chart"
    lines = build(pipeline.base, pipeline.corpus, out, {"memory": {"seed": 1}})
    assert not path.exists()
    [told] = [line for line in lines if "gate of the export before is not kept" in line]
    assert "run memdec calibrate again" in told
    path = write_gate(export, gate | {"memory": np.array("of another memory")})
    with pytest.raises(MemdecError, match="trained for other weights"):
        check_gate(path, read_gate(path))
