"""Settings: the files we ship parse, and every wrong one is named with its fix."""

import dataclasses
from pathlib import Path

import pytest

from vllm_memdec.train import config
from vllm_memdec.train.config import RANGES, Settings, load_settings, parse_settings

CONFIGS = Path(config.__file__).parent / "configs"


@pytest.mark.parametrize("name", ["tiny.yaml", "wikitext103.yaml"])
def test_shipped_configs_parse(name):
    assert load_settings(CONFIGS / name) != Settings()


def test_the_papers_set_up():
    s = load_settings(CONFIGS / "wikitext103.yaml")
    assert (s.memory.beta, s.memory.epochs, s.memory.learning_rate) == (0.5, 70, 1e-3)
    assert (s.targets.temperature, s.index.probes, s.datastore.key) == (16, 32, "last_mlp_input")


def test_defaults_are_within_their_ranges_and_every_number_has_one():
    values = {}
    for stage in dataclasses.fields(Settings):
        for field in dataclasses.fields(stage.default_factory):
            if any(t in str(field.type) for t in ("int", "float")) and "Literal" not in str(
                field.type
            ):
                values[f"{stage.name}.{field.name}"] = field.default
    assert values.keys() == RANGES.keys()
    for name, value in values.items():
        low, high = RANGES[name]
        assert value is None or low <= value <= high


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
