"""Options of `memdec build` and `plan` that change settings or stop early, and the Python API."""

import doctest
import json
import shutil

import pytest

from vllm_memdec.errors import MemdecError
from vllm_memdec.train import pipeline as building
from vllm_memdec.train.model.decoder import with_defaults
from vllm_memdec.train.pipeline import STAGES
from vllm_memdec.train.settings import MemorySettings, load_settings

REBUILT = [f"{s}: building again, its settings or inputs changed" for s in ("memory", "export")]


def test_assignments_win_over_the_file(tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text("memory: {epochs: 9, layers: 3}")
    given = ["memory.epochs=5", "memory.epochs = 1e-1", "memory.layers=null", "index.kind=sq8"]
    settings = load_settings(config, given)
    assert (settings.memory.epochs, settings.memory.layers) == (0.1, None)
    assert settings.index.kind == "sq8"
    assert settings == load_settings(None, [*given, "memory.init=base"])
    assert load_settings(None, ["datastore.keep_keys=false"]).datastore.keep_keys is False


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("epochs=3", "--set must be STAGE.NAME=VALUE, such as memory.epochs=3, got 'epochs=3'."),
        ("memory.epochs", "--set must be STAGE.NAME=VALUE, such as memory.epochs=3, got"),
        ("memory.epoch=3", "unknown setting of stage memory: epoch; did you mean epochs?"),
        ("memroy.epochs=3", "unknown stage: memroy; did you mean memory?"),
        ("memory.epochs=-1", "memory.epochs must be between 1e-06 and 1e+06, got -1."),
        ("memory.epochs=", "memory.epochs must be a number, got None."),
        ("memory.epochs=[1]", "memory.epochs must be a number, got [1]."),
        ("memory.init='a", "--set memory.init='a: the value is no YAML, put it in quotes."),
        ("memory.early_stop=2", "memory.early_stop needs memory.evaluate_steps: set that as well."),
    ],
)
def test_wrong_assignments_are_named(given, sentence):
    with pytest.raises(MemdecError) as error:
        load_settings(None, [given])
    assert str(error.value).startswith(sentence)


def test_a_build_in_steps_is_the_build(pipeline, command, quick, hashes):
    """--until makes a stage and all before it; what --set says is as if the file said it."""
    settings = quick()
    words = [f"memory.{name}={value}" for name, value in settings["memory"].items()]
    memdec = command(pipeline.base, pipeline.corpus, settings | {"memory": {"layers": 2}})
    options = memdec.words({}) + [word for given in words for word in ("--set", given)]
    for number, stage in enumerate(STAGES, 1):
        code, _, err = memdec.memdec_here(*options, "--until", stage)
        assert code == 0, err
        made = {path.parent.name for path in memdec.output.glob("*/manifest.json")}
        assert made == set(STAGES[:number])
        last = f"The last stage made is {memdec.output / stage}."
        assert (last in "".join(err.splitlines())) == (stage != "export"), err
    assert "vllm serve" in err
    assert hashes(memdec.output) == hashes(pipeline.output)


def test_until_a_stage_that_is_none(pipeline, command, quick):
    memdec = command(pipeline.base, pipeline.corpus, quick())
    code, err = memdec.here(until="train")
    assert code == 1 and not memdec.output.exists()
    assert "--until must be one of corpus, datastore, index, targets, memory, export" in err


def test_a_plan_takes_assignments(pipeline, memdec_here, tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text(json.dumps({"memory": {"layers": 1}}))
    words = ["plan", "--base", pipeline.base, "--config", config, "--tokens", 5000]
    code, _, err = memdec_here(*words, "--set", "memory.epochs=many")
    assert code == 1 and "memory.epochs must be a number, got 'many'." in err


def test_a_trained_memory_is_trained_on_gently(pipeline, build, tmp_path):
    """The defaults depend on init, are said first, and make the manifest that set ones make."""
    output = shutil.copytree(pipeline.output, tmp_path / "out")
    init = shutil.copytree(output / "export", tmp_path / "init")

    def run(**memory):
        lines = build(pipeline.base, pipeline.corpus, output, {"memory": memory})
        settings = json.loads((output / "memory/manifest.json").read_text())["settings"]
        return lines, (settings["learning_rate"], settings["epochs"])

    lines, used = run(init=str(init), epochs=1)
    assert lines[0] == f"memory: {init} is trained already, so memory.learning_rate 0.0001"
    assert used == (1e-4, 1)
    lines, used = run(init=str(init), epochs=1, learning_rate=1e-4)
    assert lines == [f"{stage}: up to date" for stage in STAGES]
    lines, used = run()
    assert used == (1e-3, 2) and [line for line in lines if "again" in line] == REBUILT


def test_other_memories_keep_the_defaults(pipeline, tiny_model, tmp_path):
    said = []
    assert with_defaults(MemorySettings(), pipeline.base, said.append) == MemorySettings()
    fresh = MemorySettings(init=str(tmp_path))  # a configuration alone
    shutil.copy(f"{pipeline.base}/config.json", tmp_path)
    assert with_defaults(fresh, pipeline.base, said.append) == fresh
    adapted = MemorySettings(init=tiny_model("llama", tokenizer=3), adapt_tokenizer=True)
    assert with_defaults(adapted, pipeline.base, said.append) == adapted
    assert said == []
    same = MemorySettings(init=pipeline.base, adapt_tokenizer=True)
    changed = with_defaults(same, pipeline.base, said.append)
    assert (changed.learning_rate, changed.epochs) == (1e-4, 15)
    usual = "is trained already, so memory.learning_rate 0.0001 and memory.epochs 15"
    assert said == [f"memory: {pipeline.base} {usual}"]


def test_the_example_of_the_python_api(pipeline, tmp_path, monkeypatch):
    """The docstring of pipeline.build runs as it stands, where the folders are that it names."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/base").symlink_to(pipeline.base)
    (tmp_path / "corpus.jsonl").symlink_to(pipeline.corpus)
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder(recurse=False).find(building.build, "build", globs={})
    assert len(example.examples) == 6
    done = doctest.DocTestRunner().run(example)
    assert done.attempted == 6 and done.failed == 0
    assert (tmp_path / "build/memory/export/config.json").exists()
