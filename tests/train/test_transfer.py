"""A memory for another tokenizer: the model it starts from, the build it takes, what is refused."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig

from vllm_memdec.checkpoint import read_block, tokenizer_fingerprint
from vllm_memdec.config import MemoryConfig
from vllm_memdec.memory_checks import check_tokenizers
from vllm_memdec.train.model.decoder import build_memory, training_budget
from vllm_memdec.train.model.vocabulary_transfer import exchange
from vllm_memdec.train.pipeline import STAGES
from vllm_memdec.train.settings import MemorySettings

BLOCK = 32
ROWS = 1024  # of a base that pads its 1000 tokens
OTHER = 3  # seed of another tokenizer


def phi():
    """A small model whose head has a bias."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = PhiConfig(vocab_size=1000, num_attention_heads=2, tie_word_embeddings=False, **small)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def reordered(folder, source):
    """Save a tokenizer with the same tokens under other ids; return where each id went."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((folder / "tokenizer.json").read_text())
    order = np.r_[0, 1, 2 + np.random.default_rng(0).permutation(998)]  # <s> and </s> stay
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: int(order[i]) for token, i in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return torch.from_numpy(order)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "phi"])
def test_the_same_tokens_under_other_ids_make_the_same_model(kind, tiny_model, tmp_path):
    """Untied, tied and biased heads: only the numbers of the tokens have changed."""
    source = tiny_model("llama" if kind == "phi" else kind)
    order_V = reordered(tmp_path / "new", source)
    load = AutoModelForCausalLM.from_pretrained
    before, after = (phi(), phi()) if kind == "phi" else (load(source), load(source))
    after.load_state_dict(before.state_dict())
    old, new = (AutoTokenizer.from_pretrained(f) for f in (source, tmp_path / "new"))
    exchange(after, old, new, ROWS)
    after.save_pretrained(tmp_path / "saved")
    after = load(tmp_path / "saved").eval()
    assert after.config.vocab_size == ROWS
    assert after.config.eos_token_id == new.eos_token_id == 1
    tokens = torch.randint(2, 1000, (2, 20))
    with torch.no_grad():
        logits, moved = before.eval()(tokens).logits, after(order_V[tokens]).logits
    assert torch.allclose(moved[..., order_V], logits, atol=1e-5)
    # The mean of all rows and biases, so the mean of all logits.
    assert torch.allclose(moved[..., 1000:], logits.mean(-1, keepdim=True), atol=1e-4)
    tied = after.get_output_embeddings().weight is after.get_input_embeddings().weight
    assert tied == (kind in ("gpt2", "qwen2"))


def test_no_row_is_kept_from_training(tiny_model, tmp_path):
    """The old padding id is now some other token's, whose embedding would get no gradient."""
    source = tiny_model("llama")
    reordered(tmp_path / "new", source)
    old, new = (AutoTokenizer.from_pretrained(f) for f in (source, tmp_path / "new"))
    model = AutoModelForCausalLM.from_pretrained(source, pad_token_id=7)
    assert model.get_input_embeddings().padding_idx == 7
    exchange(model, old, new, ROWS)
    tokens = torch.arange(2, 20)[None]
    model(tokens, labels=tokens).loss.backward()
    used = tokens[0, :-1]  # nothing is to be said after the last
    assert (model.get_input_embeddings().weight.grad[used].abs().sum(1) > 0).all()


@pytest.fixture(scope="module")
def bases(pipeline, tiny_model, tmp_path_factory):
    """Return folders: a base of another tokenizer and another width, and that tokenizer alone."""
    folder = tmp_path_factory.mktemp("bases")
    base = tiny_model("gpt2", vocab=ROWS, hidden=96, tokenizer=OTHER)
    shutil.copytree(base, folder / "tokenizer", ignore=shutil.ignore_patterns("*.safe*", "config*"))
    return SimpleNamespace(base=base, tokenizer=str(folder / "tokenizer"))


@pytest.fixture(scope="module")
def adapted(pipeline, bases, build, tmp_path_factory):
    """Return a finished run that adapted the pipeline's memory: output, changes, lines."""
    output = tmp_path_factory.mktemp("adapted") / "out"
    init = str(pipeline.output / "export")
    changes = {"memory": {"init": init, "adapt_tokenizer": True, "epochs": 5}}
    lines = build(bases.base, pipeline.corpus, output, changes)
    return SimpleNamespace(output=output, changes=changes, lines=lines, init=init)


def steps(output):
    return len((output / "memory/logs/metrics.jsonl").read_text().splitlines())


def test_adapting_takes_a_tenth_of_the_epochs_and_says_so(adapted):
    blocks = json.loads((adapted.output / "corpus/corpus.json").read_text())["train"]["blocks"]
    assert steps(adapted.output) == round(0.5 * blocks / 8)
    assert any("adapting" in x and "rows copied" in x for x in adapted.lines)
    said = "memory: training 0.5 epochs, memory.transfer_fraction 0.1 of memory.epochs 5"
    assert said in adapted.lines


def test_an_adapted_memory_is_one_of_its_new_base(adapted, bases):
    export = adapted.output / "export"
    tokenizer = AutoTokenizer.from_pretrained(bases.base)
    block, config = read_block(export), json.loads((export / "config.json").read_text())
    assert block.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert block.tokenizer_fingerprint != read_block(adapted.init).tokenizer_fingerprint
    assert block.base == bases.base.split("/")[-1]
    same = AutoTokenizer.from_pretrained(export)
    assert tokenizer_fingerprint(same) == block.tokenizer_fingerprint
    assert (config["vocab_size"], config["model_type"]) == (ROWS, "llama")
    assert "memdec" not in json.loads((adapted.output / "memory/config.json").read_text())
    memory = MemoryConfig(name="adapted", model=str(export), alpha=block.alpha, block=block)

    def serving(folder):
        return SimpleNamespace(
            model=folder, tokenizer=folder, tokenizer_revision=None, trust_remote_code=False
        )

    check_tokenizers(serving(bases.base), memory)
    with pytest.raises(ValueError, match="another tokenizer"):
        check_tokenizers(serving(adapted.init), memory)


def test_adapting_is_training_from_the_exchanged_model(
    adapted, pipeline, bases, build, tmp_path, hashes
):
    """The same memory, file for file, as from a folder in which the exchange was done by hand."""
    by_hand = AutoModelForCausalLM.from_pretrained(adapted.init, dtype=torch.float32)
    old, new = (AutoTokenizer.from_pretrained(f) for f in (adapted.init, bases.base))
    exchange(by_hand, old, new, ROWS)
    by_hand.save_pretrained(tmp_path / "by_hand")
    new.save_pretrained(tmp_path / "by_hand")
    memory = {"init": str(tmp_path / "by_hand"), "epochs": 0.5, "learning_rate": 1e-3}
    changes = {"memory": memory}
    build(bases.base, pipeline.corpus, tmp_path / "out", changes)
    outputs = (adapted.output, tmp_path / "out")
    first, second = ((o / "memory/model.safetensors").read_bytes() for o in outputs)
    assert first == second


def rebuilt(lines):
    return {s for s in STAGES if f"{s}: building again, its settings or inputs changed" in lines}


def test_what_rebuilds_an_adapted_memory(adapted, pipeline, bases, build, tmp_path):
    output = shutil.copytree(adapted.output, tmp_path / "out")

    def run(**changes):
        memory = adapted.changes["memory"] | changes
        return build(bases.base, pipeline.corpus, output, {"memory": memory})

    assert run() == [f"{stage}: up to date" for stage in STAGES]
    elsewhere = shutil.copytree(bases.tokenizer, tmp_path / "elsewhere")
    old_spelling, *lines = run(tokenizer=str(elsewhere))
    assert old_spelling.startswith("--tokenizer FOLDER (memory.tokenizer) is now --adapt-tokenizer")
    assert lines == [f"{stage}: up to date" for stage in STAGES]
    assert rebuilt(run(transfer_fraction=0.2)) == {"memory", "export"}
    assert abs(steps(output) - 2 * steps(adapted.output)) <= 1
    init = shutil.copytree(adapted.init, tmp_path / "init")
    weights = (init / "model.safetensors").read_bytes()
    run(init=str(init))
    (init / "model.safetensors").write_bytes(weights[:-4] + bytes(4))
    assert rebuilt(run(init=str(init))) == {"memory", "export"}


def test_memories_that_are_not_adapted_know_nothing_of_it(pipeline):
    """Nor do those of before there was such a setting: their manifests are equal."""
    manifest = json.loads((pipeline.output / "memory/manifest.json").read_text())
    adapting = {"adapt_tokenizer", "tokenizer", "transfer_fraction"}
    assert not adapting & manifest["settings"].keys()


def test_the_same_tokenizer_needs_no_adapting(pipeline, tiny_model):
    """Another base of one family: the memory is trained on as it is, for all the epochs."""
    base, init = tiny_model("qwen3", seed=4), str(pipeline.output / "export")
    settings = MemorySettings(init=init, adapt_tokenizer=True)
    said = []
    assert training_budget(settings, base, said.append) == settings
    assert said == [f"memory: {init} has the tokenizer of {base} already, nothing to adapt"]
    expected = AutoModelForCausalLM.from_pretrained(init, dtype=torch.float32).state_dict()
    memory = build_memory(settings, base, BLOCK)
    assert all(torch.equal(v, expected[k]) for k, v in memory.state_dict().items())


def test_misfits_are_refused(pipeline, bases, adapted, tiny_model, tmp_path):
    base, init = bases.base, adapted.init

    def refused(match, **changes):
        settings = MemorySettings(**{"init": init, "adapt_tokenizer": True} | changes)
        with pytest.raises(ValueError, match=match):
            build_memory(settings, base, BLOCK)

    refused("another tokenizer than .*: give --adapt-tokenizer to adapt", adapt_tokenizer=False)
    refused("the memory is to serve beside: give --adapt-tokenizer instead", tokenizer=init)
    folder = shutil.copytree(init, tmp_path / "init")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    refused("init is quantised, so it cannot be adapted", init=str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    refused("has no weights to adapt: copy the whole memory there", init=str(folder))
    shutil.copy(f"{init}/model.safetensors", folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["decoder"] = {"type": "BPEDecoder", "suffix": "</w>"}
    del content["model"]["vocab"]["."], content["model"]["merges"][:]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refused("neither byte-level BPE nor SentencePiece", init=str(folder))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused("init has no readable tokenizer: copy its tokenizer files", init=str(folder))


def test_the_command(pipeline, bases, command, quick, tmp_path):
    """--init and --adapt-tokenizer of the command line; what it refuses in one sentence."""
    init, settings = str(pipeline.output / "export"), quick({"memory": {"layers": None}})

    def refused(match, **options):
        memdec = command(bases.base, pipeline.corpus, settings, match)
        code, err = memdec.here(**options)
        said = [line for line in err.splitlines() if "is now --adapt-tokenizer" not in line]
        assert code == 1 and len(said) == 1 and match in said[0], err
        assert not any((memdec.output / stage).exists() for stage in STAGES)

    refused("to adapt it, or a model of one family", init=init)
    refused("give that memory with --init", tokenizer=bases.tokenizer)
    refused("nowhere is not a model folder", init=tmp_path / "nowhere", tokenizer=bases.tokenizer)
    refused("nowhere is not a folder: check the path", init=init, tokenizer=tmp_path / "nowhere")
    refused("is to serve beside: give --adapt-tokenizer", init=init, tokenizer=pipeline.base)
    refused("memory.layers cuts the base, but memory.init", init=init, set="memory.layers=1")
    memdec = command(bases.base, pipeline.corpus, settings)
    code, _, err = memdec.memdec_here(*memdec.words({"init": init}), "--adapt-tokenizer")
    assert code == 0 and "memory.transfer_fraction 0.1 of memory.epochs 2" in err, err
    fingerprint = read_block(memdec.output / "export").tokenizer_fingerprint
    assert fingerprint == tokenizer_fingerprint(AutoTokenizer.from_pretrained(bases.base))
    inside = memdec.output / "export"
    code, err = memdec.here(init=inside, tokenizer=bases.tokenizer)
    assert code == 1 and "lies inside --output" in err and len(err.splitlines()) == 1, err
