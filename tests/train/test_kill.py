"""`kill -9` in the middle of every stage: the run after it ends with the undisturbed result.

One output folder is killed once in each stage, in order. The text is large enough, the shards are
small enough, that each stage takes some tenths of a second and the kill lands inside it; each time
this is asserted, never assumed.
"""

import json
import re
import shutil
import signal
import time

import pytest
import torch

SETTINGS = {
    "corpus": {"block_tokens": 32, "validation_fraction": 0.02, "shard_blocks": 4},
    "datastore": {"dtype": "float32", "batch_blocks": 1},
    "index": {"kind": "sq8"},
    "targets": {"neighbours": 32},
    "memory": {"layers": 1, "epochs": 0.7, "dtype": "float32", "checkpoint_seconds": 0},
    "export": {"dtype": "float32"},
}
# For each stage a pattern of files in NAME.partial, and how many of them mean "in the middle".
MIDDLE = {
    "corpus": ("plan.json", 1),
    "datastore": ("labels-*.npy", 5),
    "index": ("trained.faiss", 1),
    "targets": ("probs-*.npy", 5),
    "memory": ("checkpoint.pt", 1),
    "export": ("config.json", 1),
}


def kill_in_the_middle(command, stage, number=signal.SIGKILL):
    """Run until a stage is in its middle, kill it there, and return what was said.

    Some middles last a tenth of a second: where the kill came too late, the stage is undone and
    the same tried again.
    """
    pattern, count = MIDDLE[stage]
    done, partial = command.output / stage, command.output / f"{stage}.partial"
    for _ in range(5):
        process = command.start()
        while process.poll() is None and not done.exists():
            if len(list(partial.glob(pattern))) >= count:
                break
            time.sleep(0.001)
        if stage == "memory":  # let some steps pass
            time.sleep(0.1)
        said = command.kill(process, number)
        if not done.exists() and not (partial / "manifest.json").exists():
            assert process.returncode == (130 if number == signal.SIGINT else -number), said
            return said
        for folder in (done, partial):
            shutil.rmtree(folder, ignore_errors=True)
    return pytest.fail(f"{stage} was never caught in its middle")


def assert_in_the_middle(output, stage, whole):
    """Check that the stage has begun, is not done, and that sharded work is there in part."""
    partial = output / f"{stage}.partial"
    assert not (output / stage).exists() and (partial / "plan.json").exists()
    made = {p.name for p in partial.rglob("*") if p.suffix != ".tmp"} - {"plan.json"}
    total = json.loads((whole / stage / "manifest.json").read_text())["files"]
    if stage in ("datastore", "targets"):
        assert 5 <= len(made & set(total)) < len(total)
    assert not (partial / "manifest.json").exists()


def test_killed_in_every_stage(tiny_model, tmp_path, command, build, english, jsonl, hashes):
    corpus = jsonl(tmp_path / "corpus.jsonl", english(60))
    base = tiny_model("gpt2")  # has dropout: its random numbers must resume too
    undisturbed = tmp_path / "undisturbed"
    build(base, corpus, undisturbed, SETTINGS)
    broken = command(base, corpus, SETTINGS, "broken")
    said = {}
    for stage in MIDDLE:
        said[stage] = kill_in_the_middle(broken, stage)
        assert_in_the_middle(broken.output, stage, undisturbed)
        if stage == "memory":
            # The kill may come while the files of checkpoints are being renamed.
            written = (broken.output / "memory.partial").glob("checkpoint*.pt")
            checkpoint = max(torch.load(path)["step"] for path in written)
    code, said["end"] = broken.run()
    assert code == 0, said["end"]
    stages = list(MIDDLE)
    for stage, after in zip(stages, [*stages[1:], "end"], strict=True):
        # The run after a kill goes on with the stage and does not touch those before it.
        assert f"{stage}: resuming" in said[after]
        for earlier in stages[: stages.index(stage)]:
            assert f"{earlier}: up to date" in said[after]
    step, steps = map(int, re.search(r"resuming at step (\d+) of (\d+)", said["export"]).groups())
    assert 1 <= step < steps
    assert step == checkpoint  # what was saved is not lost; at most one interval was not saved
    assert hashes(broken.output) == hashes(undisturbed)
    assert not list(broken.output.glob("*.partial")) and not list(broken.output.rglob("*.tmp"))


def test_an_update_killed_in_its_stages(
    tiny_model, tmp_path, command, build, english, jsonl, hashes
):
    """What is copied, filled, unlearnt and learnt goes on where it was."""
    texts, base = english(60), tiny_model("gpt2")
    old, undisturbed = tmp_path / "old", tmp_path / "undisturbed"
    build(base, jsonl(tmp_path / "old.jsonl", texts), old, SETTINGS)
    corpus = jsonl(tmp_path / "new.jsonl", texts[5:] + english(10, seed=3))
    settings = SETTINGS | {"update": {"epochs": 4.0}}
    build(base, corpus, undisturbed, settings, update=old)
    broken = command(base, corpus, settings, "broken")
    broken.options["--update"] = old
    for stage in ("datastore", "targets", "memory"):
        kill_in_the_middle(broken, stage)
        assert_in_the_middle(broken.output, stage, undisturbed)
    code, said = broken.run()
    assert code == 0 and "memory: resuming at step" in said, said
    assert hashes(broken.output) == hashes(undisturbed)
    assert not list(broken.output.rglob("gone")) and not list(broken.output.rglob("*.tmp"))


def test_ctrl_c_stops_with_a_word(tiny_model, tmp_path, command, english, jsonl):
    memdec = command(tiny_model("llama"), jsonl(tmp_path / "corpus.jsonl", english(60)), SETTINGS)
    err = kill_in_the_middle(memdec, "datastore", signal.SIGINT)
    assert err.splitlines()[-1] == "Stopped. Run the same command again to go on."
    assert "Traceback" not in err
    assert len(list(memdec.output.glob("datastore.partial/labels-*.npy"))) >= 5


def test_killed_while_adapting_a_memory(tiny_model, tmp_path, command, english, jsonl, hashes):
    """The exchange of the vocabulary is made again by the next run, to the same numbers."""
    corpus = jsonl(tmp_path / "corpus.jsonl", english(60))
    memory = SETTINGS["memory"] | {"layers": None, "transfer_fraction": 1.0}
    settings = SETTINGS | {"memory": memory}
    base, init = tiny_model("gpt2", tokenizer=3), tiny_model("gpt2", seed=5)
    undisturbed, broken = (command(base, corpus, settings, name) for name in ("whole", "broken"))
    for memdec in (undisturbed, broken):
        memdec.options |= {"--init": init, "--tokenizer": base}
    code, err = undisturbed.here()
    assert code == 0, err
    kill_in_the_middle(broken, "memory")
    code, err = broken.run()
    assert code == 0 and "memory: resuming at step" in err, err
    assert hashes(broken.output) == hashes(undisturbed.output)
