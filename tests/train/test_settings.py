"""Settings: the files we ship parse, and every wrong one is named with its fix."""

import json
from pathlib import Path

import pytest

from vllm_memdec.errors import MemdecError
from vllm_memdec.train import settings as config
from vllm_memdec.train.settings import (
    MemorySettings,
    Settings,
    load_settings,
    parse_settings,
)
from vllm_memdec.train.settings_errors import limits

CONFIGS = Path(config.__file__).parent / "configs"


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_shipped_configs_parse(name):
    assert load_settings(CONFIGS / name) != Settings()


def test_the_papers_set_up():
    s = load_settings(CONFIGS / "wikitext103.yaml")
    assert (s.memory.beta, s.memory.epochs, s.memory.learning_rate) == (0.5, 70, 1e-3)
    assert (s.targets.temperature, s.index.probes, s.datastore.key) == (16, 32, "last_mlp_input")


def test_defaults_are_within_their_ranges_and_every_number_has_one():
    numbers = 0
    for stage in Settings.model_fields.values():
        for name, field in stage.annotation.model_fields.items():
            if "Literal" not in str(field.annotation) and (
                "int" in str(field.annotation) or "float" in str(field.annotation)
            ):
                low, high = limits(field)
                assert field.default is None or low <= field.default <= high, name
                numbers += 1
    assert numbers == 34


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"memroy": {}}, "unknown stage: memroy; did you mean memory?"),
        ({"memory": {"epoch": 3}}, "unknown setting of stage memory: epoch; did you mean epochs?"),
        ({"index": {"zzz": 1}}, "unknown setting of stage index: zzz; known: kind, probes, seed."),
        ({"memory": 3}, "settings of stage memory must be a mapping, got 3."),
        ([1], "settings must be a mapping of stages, as in configs/tiny.yaml."),
        ({"memory": {"epochs": "many"}}, "memory.epochs must be a number, got 'many'."),
        ({"memory": {"epochs": True}}, "memory.epochs must be a number, got True."),
        ({"memory": {"layers": 2.5}}, "memory.layers must be an integer, got 2.5."),
        ({"memory": {"beta": None}}, "memory.beta must be a number, got None."),
        ({"memory": {"layers": [2]}}, "memory.layers must be an integer, got [2]."),
        ({"memory": {"beta": 1.5}}, "memory.beta must be between 0 and 1, got 1.5."),
        ({"memory": {"beta": float("nan")}}, "memory.beta must be a number, got nan."),
        ({"memory": {"beta": "nan"}}, "memory.beta must be a number, got 'nan'."),
        ({"memory": {"epochs": float("inf")}}, "memory.epochs must be between 1e-06 and 1e+06,"),
        ({"memory": {"seed": -1}}, "memory.seed must be between 0 and 2.14748e+09, got -1."),
        ({"memory": {"layers": 10**400}}, "memory.layers must be between 1 and 1024, got 1000"),
        ({"memory": {"early_stop": 3}}, "memory.early_stop needs memory.evaluate_steps: set that"),
        ({"memory": {"layers": 2, "init": "folder"}}, "memory.layers cuts the base, but memory.in"),
        ({"memory": {"compile": 1}}, "memory.compile must be true or false, got 1."),
        ({"memory": {"transfer_fraction": 0.1}}, "memory.transfer_fraction is for memory.adapt_to"),
        ({"memory": {"adapt_tokenizer": True}}, "memory.adapt_tokenizer is for a memory that was"),
        ({"memory": {"tokenizer": "folder"}}, "memory.adapt_tokenizer is for a memory that was"),
        ({"datastore": {"layer_fraction": 0.7}}, "datastore.layer_fraction is for datastore.key"),
        ({"index": {"kind": "flat", "probes": 2}}, "index.probes is for inverted lists, which ind"),
        ({"datastore": {"keep_keys": 1}}, "datastore.keep_keys must be true or false, got 1."),
        ({"memory": {"init": 3}}, "memory.init must be text, got 3."),
        ({"index": {"kind": "hnsw"}}, "index.kind must be one of auto, flat, fp16, sq8, pq, got"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(settings, sentence):
    with pytest.raises(ValueError) as error:
        parse_settings(settings)
    assert str(error.value).startswith(sentence)


def test_numbers_as_yaml_writes_them():
    s = parse_settings({"memory": {"learning_rate": "1e-3", "epochs": 3, "layers": 2.0}})
    assert s.memory.learning_rate == 1e-3 and type(s.memory.epochs) is float
    assert s.memory.layers == 2 and type(s.memory.layers) is int
    s = parse_settings({"targets": {"temperature": None}, "memory": {"sampled_negatives": None}})
    assert s.targets.temperature is None and s.memory.sampled_negatives is None


# Manifests of builds by release 0.1: equal settings must give equal JSON, or all is built again.
BEFORE = {
    "tiny.yaml": """{
        "corpus": {"block_tokens": 64, "shard_blocks": 64, "validation_fraction": 0.05},
        "datastore": {"dtype": "float32", "keep_keys": true,
            "key": "last_mlp_input", "layer_fraction": 0.7},
        "index": {"kind": "auto", "probes": 32, "seed": 42},
        "targets": {"min_probability": 0.0001, "neighbours": 64, "temperature": null},
        "memory": {"batch_blocks": 8, "beta": 0.5, "checkpoint_seconds": 20.0,
            "dtype": "float32", "early_stop": null, "epochs": 4.0, "evaluate_steps": null,
            "gradient_clip": 1.0, "init": "base", "layers": 2, "learning_rate": 0.001,
            "sampled_negatives": null, "schedule": "cosine",
            "seed": 42, "transfer_fraction": 0.1, "warmup_fraction": 0.05,
            "weight_decay": 0.0},
        "export": {"alpha": null, "dtype": "bfloat16"}}""",
    "wikitext103.yaml": """{
        "corpus": {"block_tokens": 1024, "shard_blocks": 128, "validation_fraction": 0.05},
        "datastore": {"batch_blocks": 16, "dtype": "bfloat16", "keep_keys": true,
            "key": "last_mlp_input", "layer_fraction": 0.7},
        "index": {"kind": "pq", "probes": 32, "seed": 42},
        "targets": {"min_probability": 0.0, "neighbours": 1023, "temperature": 16.0},
        "memory": {"batch_blocks": 512, "beta": 0.5, "checkpoint_seconds": 600.0,
            "dtype": "bfloat16", "early_stop": null, "epochs": 70.0, "evaluate_steps": null,
            "gradient_clip": 1.0, "init": "models/gpt2-finetuned-wikitext103",
            "layers": null, "learning_rate": 0.001, "micro_batch_blocks": 16,
            "sampled_negatives": null, "schedule": "linear", "seed": 42,
            "transfer_fraction": 0.1, "warmup_fraction": 0.0, "weight_decay": 0.0},
        "export": {"alpha": null, "dtype": "bfloat16"}}""",
}


@pytest.mark.parametrize("name", BEFORE)
def test_manifests_stay_as_they_were(name):
    settings = load_settings(CONFIGS / name)
    before, now = json.loads(BEFORE[name]), settings.model_dump()
    now["memory"]["batch_blocks"] = settings.memory.batch(1000)  # as the manifest has it
    for stage, entries in before.items():
        kept = {setting: now[stage][setting] for setting in entries}
        # As text: 4 and 4.0 are equal, their hashes are not.
        assert json.dumps(kept, sort_keys=True) == json.dumps(entries, sort_keys=True)


@pytest.mark.parametrize("change", [{"epochs": -1}, {"epoch": 1}, {"early_stop": 2}])
def test_a_change_is_checked_as_a_file_is(change):
    memory = Settings().memory.changed(layers=2, epochs=3)
    assert (memory.layers, memory.epochs, Settings().memory.epochs) == (2, 3.0, 20.0)
    with pytest.raises(MemdecError, match="memory"):
        memory.changed(**change)
    with pytest.raises(MemdecError, match="memory"):
        Settings().changed({"memory": change})


def test_settings_cannot_be_written_to():
    with pytest.raises(ValueError, match="frozen"):
        Settings().memory.epochs = 3


def test_what_is_set_to_nothing_is_not_in_the_way():
    values = {"memory": {"layers": None, "init": "folder", "early_stop": None}}
    assert parse_settings(values).memory.init == "folder"
    both = {"init": "folder", "tokenizer": "base", "transfer_fraction": 0.2}
    assert parse_settings({"memory": both}).memory.adapts
    assert parse_settings({"datastore": {"key": "layer", "layer_fraction": 0.5}})


def test_defaults_of_a_trained_memory_give_way_to_what_is_set():
    settings = MemorySettings(init="folder").pretrained()
    assert (settings.learning_rate, settings.epochs) == (1e-4, 15)
    settings = MemorySettings(init="folder", epochs=20).pretrained()
    assert (settings.learning_rate, settings.epochs) == (1e-4, 20)
    assert settings == MemorySettings(init="folder", epochs=20, learning_rate=1e-4)
