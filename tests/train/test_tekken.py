"""Bases that have only Mistral's own tokenizer file, tekken.json."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from support.mistral_format import save_tekken
from support.tiny_models import VOCAB

from vllm_memdec.checkpoint import read_tokenizer, tokenizer_fingerprint, tokenizer_vocabulary
from vllm_memdec.train.data.blocks import tokenise
from vllm_memdec.train.model.huggingface import load_tokenizer


@pytest.fixture(scope="session")
def tekken(tiny_model, tmp_path_factory):
    """Return a base with weights, config.json and tekken.json."""
    folder = tmp_path_factory.mktemp("tekken")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"{tiny_model('mistral')}/{name}", folder)
    save_tekken(folder, VOCAB)
    return folder


def texts(english):
    return [*english(5), "Größe, 漢字 \n\n\t 12345", "a [INST] is </s> text, <s>no control token"]


def test_ids_are_those_of_mistral_common(tekken, english):
    oracle, tokenizer = Tekkenizer.from_file(tekken / "tekken.json"), load_tokenizer(str(tekken))
    for text, found in zip(texts(english), tokenise(tokenizer, texts(english)), strict=True):
        assert found.tolist() == oracle.encode(text, bos=True, eos=True)
        assert tokenizer.decode(found[1:-1]) == text
    learned, added = tokenizer_vocabulary(tokenizer)
    assert sorted([*learned.values(), *added.values()]) == list(range(VOCAB))
    assert tokenizer.name_or_path == str(tekken)


def test_what_is_saved_is_the_same_tokenizer(tekken, english, tmp_path):
    tokenizer = load_tokenizer(str(tekken))
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    ids = [[found.tolist() for found in tokenise(t, texts(english))] for t in (tokenizer, again)]
    assert ids[0] == ids[1]
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)


def test_a_tokenizer_of_hugging_face_beside_it_is_read(tekken, tiny_model, tmp_path):
    """Most repositories of Mistral's have both, and transformers by itself would read the other."""
    shutil.copytree(tiny_model("mistral"), tmp_path, dirs_exist_ok=True)
    plain = tokenizer_fingerprint(read_tokenizer(tmp_path))
    shutil.copy(tekken / "tekken.json", tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == plain


def test_a_build(tekken, command, quick, english, jsonl, tmp_path):
    corpus = jsonl(tmp_path / "corpus.jsonl", english(40))
    memdec = command(str(tekken), corpus, quick({"memory": {"epochs": 0.1}}))
    code, err = memdec.here()
    assert code == 0, err
    tokens = np.load(memdec.output / "corpus/tokens-train-00000.npy")
    assert tokens[0, 0] == 1 and 2 in tokens  # BOS and EOS of Mistral
    block = json.loads((memdec.output / "export/config.json").read_text())["memdec"]
    ours = tokenizer_fingerprint(load_tokenizer(str(tekken)))
    assert block["tokenizer_fingerprint"] == ours
    assert ours == tokenizer_fingerprint(load_tokenizer(str(memdec.output / "export")))
    content = json.loads((tekken / "tekken.json").read_text())
    Path(tmp_path / "other").mkdir()
    other = shutil.copytree(tekken, tmp_path / "other", dirs_exist_ok=True)
    content["vocab"][300]["token_bytes"] = content["vocab"][301]["token_bytes"]
    (other / "tekken.json").write_text(json.dumps(content))
    code, err = memdec.here(base=other, until="corpus")
    assert code == 0 and "corpus: building again, its settings or inputs changed" in err
