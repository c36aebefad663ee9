"""The model card of an export: what its head tells the hub, and its text a person."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.sharing.card import Naming, parameters, write_card

BASE, COMMIT = "someone/base", "0123456789abcdef" * 2 + "01234567"
NAMING = Naming("someone/memory", base_model=BASE)


@pytest.fixture
def export(pipeline, tmp_path):
    """Return a copy of an export, to be changed."""
    return shutil.copytree(pipeline.output / "export", tmp_path / "export")


def section(export, **changes):
    """Return the memdec section of an export, changed."""
    path = export / "config.json"
    config = json.loads(path.read_text())
    config["memdec"] |= changes
    path.write_text(json.dumps(config))
    return config["memdec"]


def test_the_head(export):
    named = Naming("someone/memory", None, BASE, "apache-2.0", ("en", "no"))
    data = ModelCard(write_card(export, named)).data.to_dict()
    assert data == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "language": ["en", "no"],  # to YAML a bare no is false
        "library_name": "vllm-memdec",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["memory-decoder", "vllm-memdec"],
    }
    plain = ModelCard(write_card(export, NAMING)).data.to_dict()
    assert plain == {key: data[key] for key in data if key not in ("language", "license")}


def test_what_was_measured_is_told(export):
    made = section(export)
    card, provenance = write_card(export, NAMING), made["provenance"]
    for row in provenance["validation_by_context"]:
        systems = " | ".join(f"{row[name]:,.2f}" for name in ("base", "memory", "mixture"))
        assert f"| {row['from']}-{row['to']} | {row['tokens']:,} | {systems} |" in card
    assert f"| corpus | {provenance['training_tokens']:,} tokens of training text |" in card
    assert f"fingerprint {made['tokenizer_fingerprint'][:16]}..." in card
    assert f"{made['alpha_by_context'][0][1]:g} from token 0" in card
    length = json.loads((export / "config.json").read_text())["max_position_embeddings"]
    assert f"- It has {length:,} positions: beyond them the base answers alone." in card
    assert "| gate | none |" in card and "| training | 2 epochs on kNN targets" in card
    assert f"vllm-memdec {provenance['versions']['vllm-memdec']}" in card
    (export / "memdec_gate.npz").touch()
    assert "| gate | yes" in write_card(export, NAMING)
    section(export, alpha=0.25, alpha_by_context=None, provenance={})
    bare = write_card(export, NAMING)
    assert "| alpha | 0.25 |" in bare and "Perplexity" not in bare


def test_no_place_on_the_disk_is_named(pipeline, export):
    card = write_card(export, NAMING)
    for folder in (export, pipeline.output, pipeline.base, pipeline.corpus):
        assert str(folder) not in card
    assert not re.search(r"(?<![\w/:])/(home|root|tmp|work|Users)/", card)


def test_how_it_is_served(export):
    card = write_card(export, Naming("someone/memory", "v2", BASE))
    settings = '{"memdec": {"model": "someone/memory", "revision": "v2"}}'
    assert f"vllm serve {BASE} --model-impl memdec --additional-config '{settings}'" in card


def test_the_base_has_an_id_on_the_hub(export):
    """One that the build had from there is known, with its commit; a folder's must be given."""
    with pytest.raises(MemdecError, match=r"read from a folder, .*: give --base-model ORG/NAME\."):
        write_card(export, Naming("someone/memory"))
    section(export, base=f"{BASE}@{COMMIT}")
    assert f"| base | {BASE}, commit {COMMIT} |" in write_card(export, Naming("someone/memory"))
    other = write_card(export, Naming("someone/memory", base_model="another/base"))
    assert "| base | another/base |" in other and COMMIT not in other


def test_all_weights_are_counted(export):
    assert parameters(export) == sum(p.numel() for p in load_model(str(export)).parameters())


def test_a_perplexity_without_bounds(export):
    made = section(export)["provenance"]
    made["validation_by_context"][0]["memory"] = None
    section(export, provenance=made)
    assert "| infinite |" in write_card(export, NAMING)
