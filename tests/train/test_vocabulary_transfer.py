"""Another vocabulary for a model: every row against slow float64 oracles, on real tokenizers."""

import importlib.resources
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.corpora.download import smollm2
from vllm_memdec.train.model.vocabulary_transfer import roles, spelling, texts, transfer

ROOT = Path(__file__).parents[2]
# Spaces, digits, accents, characters of two to four bytes, some of them in no vocabulary.
TEXT = " naïve Ünder 2024\n\n\tπ≈3.14 日本語 🙂👍 𐍈𒀀 (a  b)"
TEXT = (ROOT / "LICENSE").read_text().strip()[:3000] + TEXT
D, PADDING = 5, 7  # columns, rows beyond the tokenizer


def trained(kind, folder):
    """Train a tokenizer of 600 tokens on the licence text and save it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"vocab_size": 600, "special_tokens": ["[UNK]", "<s>", "</s>"]}
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False, **special)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="[UNK]", show_progress=False, **special)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(show_progress=False, **special)
    tokenizer.train_from_iterator([(ROOT / "LICENSE").read_text()], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    ).save_pretrained(folder)


def save_mistral(folder):
    """Save Mistral's first tokenizer, SentencePiece with byte fallback, which vLLM depends on."""
    source = importlib.resources.files("mistral_common") / "data/tokenizer.model.v1"
    (folder / "tokenizer.model").write_bytes(source.read_bytes())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", **names})
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Return a function: the tokenizer of a name, loaded as a user's would be."""
    made = {"smollm2": AutoTokenizer.from_pretrained(smollm2())}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            save_mistral(folder) if name == "mistral" else trained(name, folder)
            made[name] = AutoTokenizer.from_pretrained(folder)
        return made[name]

    return get


def ids_of(tok, text):
    return tok(text, add_special_tokens=False)["input_ids"]


def decoded(tok, ids):
    """Return {id: text} of tokens decoded behind another one, without those that are no text.

    Those are special tokens, parts of characters, and WordPiece's signs, which get a space there.
    """
    ahead = ids_of(tok, "the")
    start, parts = len(tok.decode(ahead)), {}
    for i in set(ids) - tok.backend_tokenizer.get_added_tokens_decoder().keys():
        text = tok.decode([*ahead, i], clean_up_tokenization_spaces=False)[start:]
        sign = spelling(tok) == "wordpiece" and not text[-1:].isalnum()
        if text and "\ufffd" not in text and not sign:
            parts[i] = text
    return parts


@pytest.mark.parametrize("name", ["smollm2", "bytes", "mistral"])
def test_tokens_of_a_text_are_its_bytes(tokenizer, name):
    """Whatever way a text is cut up, characters included, its tokens' bytes join to it again."""
    tok = tokenizer(name)
    known, ids = texts(tok), ids_of(tok, TEXT)
    joined = b"".join(known[i] for i in ids)
    assert joined == b" " * (name == "mistral") + TEXT.encode()
    cut = [i for i in ids if max(known[i]) > 127 and "\ufffd" in known[i].decode(errors="replace")]
    assert len(cut) > 5, "no characters were cut up"


@pytest.mark.parametrize("name", ["smollm2", "mistral", "bytes", "unigram", "wordpiece"])
def test_a_tokens_text_is_what_it_decodes_to(tokenizer, name):
    tok = tokenizer(name)
    text_of = texts(tok)
    expected = decoded(tok, list(text_of)[::3])
    assert len(expected) > 0.2 * len(text_of)
    assert {i: text_of[i].decode() for i in expected} == expected
    assert not set(text_of) & set(tok.all_special_ids)


def by_hand(old, new, matrix_VD, chosen):
    """Return {new id: row} in float64, one by one: decode, look up or tokenise, average."""
    ours = {}
    for i, text in sorted(decoded(old, old.get_vocab().values()).items(), reverse=True):
        if not old.convert_ids_to_tokens(i).startswith("<0x"):
            ours[text] = [i]
    rows = {}
    for i, text in decoded(new, chosen).items():
        if text in ours:
            pieces = ours[text]
        elif spelling(old) == "bytes":
            pieces = ids_of(old, text)
        else:  # the bare model: it knows nothing of starts of texts
            pieces = [p.id for p in old.backend_tokenizer.model.tokenize(text.replace(" ", "▁"))]
            pieces = [p for p in pieces if p != old.unk_token_id]
        pieces = pieces or sorted(old.get_vocab().values())
        rows[i] = np.mean([matrix_VD[p] for p in pieces], axis=0)
    return rows


PAIRS = [("smollm2", "mistral"), ("mistral", "smollm2"), ("bytes", "unigram"),
         ("unigram", "bytes"), ("bytes", "wordpiece")]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_rows_equal_those_made_by_hand(tokenizer, old, new):
    old, new = tokenizer(old), tokenizer(new)
    matrix = np.random.default_rng(0).normal(size=(len(old) + PADDING, D))
    matrix[len(old) :] = 1e9  # rows of padding: none of this may come through
    how = transfer(old, new, len(matrix), len(new) + PADDING)
    made = how.apply(torch.from_numpy(matrix)).numpy()
    expected = by_hand(old, new, matrix, range(0, len(new), 1 + len(new) // 3000))
    assert len(expected) > 400
    for i, row in expected.items():
        np.testing.assert_allclose(made[i], row, atol=1e-12, err_msg=new.convert_ids_to_tokens(i))
    counts = [sum(len(s) == 1 for s in how.sources), sum(len(s) > 0 for s in how.sources)]
    assert how.shared <= counts[0] and how.shared + how.averaged == counts[1]
    assert how.shared > 0.2 * len(new) and how.averaged > 0
    everything = matrix[sorted(old.get_vocab().values())].mean(0)
    np.testing.assert_allclose(made[len(new) :], [everything] * PADDING, atol=1e-12)
    assert np.abs(made).max() < 10


@pytest.mark.parametrize("name", ["smollm2", "bytes", "unigram", "wordpiece"])
def test_the_same_vocabulary_stays_as_it_is(tokenizer, name):
    tok = tokenizer(name)
    matrix = torch.randn(len(tok), D, dtype=torch.float64)
    how = transfer(tok, tok, len(tok), len(tok))
    assert torch.equal(how.apply(matrix), matrix) and how.shared == len(tok)


def test_a_vocabulary_in_another_order_is_a_permutation(tokenizer, tmp_path):
    """Same tokens, other ids: each row goes with its token, and nothing is averaged."""
    old = tokenizer("bytes")
    old.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    order = np.random.default_rng(0).permutation(np.arange(3, 600))
    moved = {t: int(order[i - 3]) if i > 2 else i for t, i in content["model"]["vocab"].items()}
    content["model"]["vocab"] = moved
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    new = AutoTokenizer.from_pretrained(tmp_path)
    how = transfer(old, new, 600, 600)
    assert [how.sources[order[i - 3]] for i in range(3, 600)] == [[i] for i in range(3, 600)]
    assert how.sources[:3] == [[0], [1], [2]]


def test_special_tokens_go_by_role_then_by_name(tokenizer):
    smollm2, mistral, bpe = (tokenizer(name) for name in ("smollm2", "mistral", "bytes"))
    how = transfer(smollm2, mistral, len(smollm2), len(mistral))
    names = {name: getattr(mistral, f"{name}_token_id") for name in ("bos", "eos", "unk")}
    for name, i in names.items():
        assert how.sources[i] == [getattr(smollm2, f"{name}_token_id")], name
    assert len({how.sources[i][0] for i in names.values()}) == 3
    assert roles(bpe, mistral) == {1: 1, 2: 2, 0: 0}
    how = transfer(mistral, smollm2, len(mistral), len(smollm2))
    assert smollm2.pad_token_id == smollm2.eos_token_id  # counts as the end of text
    assert how.sources[smollm2.eos_token_id] == [mistral.eos_token_id]
    assert how.sources[smollm2.get_vocab()["<repo_name>"]] == []  # no such role there


def test_parts_of_characters_come_from_bytes(tokenizer):
    smollm2, mistral = tokenizer("smollm2"), tokenizer("mistral")
    how = transfer(mistral, smollm2, len(mistral), len(smollm2))
    tokens = ("âĢ", "ĠâĢ", "Ċ", "a")
    ids = smollm2.convert_tokens_to_ids(list(tokens))
    pieces = [mistral.convert_ids_to_tokens(how.sources[i]) for i in ids]
    rows = dict(zip(tokens, pieces, strict=True))
    assert rows["âĢ"] == ["<0xE2>", "<0x80>"]
    assert rows["ĠâĢ"] == ["▁", "<0xE2>", "<0x80>"]
    assert rows["Ċ"] == ["<0x0A>"]  # a whole character, which SentencePiece spells as a byte
    back = transfer(smollm2, mistral, len(smollm2), len(mistral))
    byte = mistral.get_vocab()["<0xE2>"]
    assert smollm2.convert_ids_to_tokens(back.sources[byte]) == ["â"]
    # A letter's fallback byte is never used: the letter's own row is the trained one.
    assert rows["a"] == ["a"]


def test_rows_beyond_a_matrix_are_left_out(tokenizer):
    """A base may have fewer rows than its tokenizer has tokens."""
    old, new = tokenizer("bytes"), tokenizer("unigram")
    how = transfer(old, new, 500, 550)
    assert len(how.sources) == 550 and max(map(max, filter(None, how.sources))) < 500
    assert how.known == list(range(500))


def test_an_unknown_spelling_is_refused(tokenizer, tmp_path):
    tokenizer("bytes").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["decoder"] = {"type": "BPEDecoder", "suffix": "</w>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match="tokenizer of .* neither byte-level BPE nor .* give anoth"
    ):
        texts(AutoTokenizer.from_pretrained(tmp_path))
