"""Keys, scores and memories of every base that people serve, against transformers as it is."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from support.bases import BASES, decoder, save
from support.tiny_models import VOCAB, save_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    DbrxConfig,
    Mistral3Config,
    RecurrentGemmaConfig,
)

from vllm_memdec.errors import MemdecError
from vllm_memdec.kernels import interpolate
from vllm_memdec.train.data.blocks import pack, valid_rows
from vllm_memdec.train.evaluation import explain as explaining
from vllm_memdec.train.model import fresh
from vllm_memdec.train.model.decoder import build_memory, memory_config, starts_from
from vllm_memdec.train.model.fresh import principal, without_layers
from vllm_memdec.train.model.hidden_states import (
    embed,
    keeps_apart,
    key_fallback,
    last_mlp,
    states_of_rows,
)
from vllm_memdec.train.model.huggingface import load_model, load_text_config, skeleton
from vllm_memdec.train.model.kinds import check_init, why_not_its_layers
from vllm_memdec.train.model.scoring import label_logprobs
from vllm_memdec.train.settings import MemorySettings

BLOCK = 32
# Of these transformers lets packed documents see each other.
LEAKING = {
    "gpt-oss", "Qwen3-Next", "Qwen3.5", "Qwen3.5, multimodal", "Qwen3.5-MoE", "Granite 4",
    "Falcon-H1", "Nemotron-H", "LFM2", "Jamba",
}  # fmt: skip
STATES = LEAKING - {"gpt-oss"}
EXPERTS = {"Mixtral", "Qwen3-MoE", "GLM-4 MoE", "gpt-oss", "DeepSeek V3"}
# What the last layer calls the module that the paper takes its keys before.
MLP = {"Falcon-H1": "feed_forward", "LFM2": "feed_forward", "Jamba": "feed_forward",
       "Granite 4": "block_sparse_moe"}  # fmt: skip

VISION = dict.fromkeys(("hidden_size", "intermediate_size", "image_size", "out_hidden_size"), 32)
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}
VISION |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "depth", "num_heads"), 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a function: the folder of a tiny base, by its name."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp("bases") / name.replace(", ", "-"))
            save(name, made[name])
        return made[name]

    return make


@pytest.fixture(scope="module")
def blocks():
    """Return tokens and positions [B, T+1] of documents of 2 to 80 tokens, packed."""
    rng = np.random.default_rng(0)
    lengths = [2, 7, 40, 3, 20, 80, 5, 2, 11]
    return pack([rng.integers(2, VOCAB, n).astype(np.int32) for n in lengths], BLOCK, filler=1)


@torch.inference_mode()
def alone(folder, name, tokens, positions):
    """Return final states, last MLP inputs [N, D] and log p [N] of each document alone, plain."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    last = model.transformer.h[-1] if name == "GPT-2" else model.get_decoder().layers[-1]
    inputs, states, logprobs = [], [], []
    if name != "Nemotron-H":
        mlp = getattr(last, MLP.get(name, "mlp"))
        mlp.register_forward_pre_hook(lambda m, a: inputs.append(a[0].reshape(-1, 64)[:-1]))
    for row, position in zip(tokens, positions, strict=True):
        starts = np.flatnonzero(position == 0)
        for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
            ids = torch.from_numpy(row[start:stop].astype(np.int64))
            out = model(ids[None], output_hidden_states=True, use_cache=False)
            states.append(out.hidden_states[-1][0, :-1])
            logp_TV = out.logits[0, :-1].log_softmax(-1)
            logprobs.append(logp_TV.gather(1, ids[1:, None])[:, 0])
    states, logprobs = torch.cat(states), torch.cat(logprobs)
    return states, torch.cat(inputs) if inputs else states, logprobs.double().numpy()


def apart(ours, theirs):
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", BASES)
def test_keys_and_scores_are_those_of_each_document_alone(folder, blocks, name):
    tokens, positions = blocks
    assert positions.min() >= 0 and valid_rows(positions).sum() > 150
    final, mlp_input, logprobs = alone(folder(name), name, tokens, positions)
    model = load_model(folder(name))
    assert keeps_apart(model) == (name not in LEAKING)
    assert keeps_apart(load_model(folder(name), "bfloat16")) == (name not in LEAKING)
    for key, expected in (("final_hidden", final), ("last_mlp_input", mlp_input)):
        keys, labels = zip(*embed(model, key, tokens, positions, 2), strict=True)
        assert apart(np.concatenate(keys).astype(np.float32), expected.numpy()) < 1e-3  # fp16
        assert np.array_equal(np.concatenate(labels), tokens[:, 1:][valid_rows(positions)])
    assert apart(label_logprobs(model, tokens, positions, 2), logprobs) < 1e-5
    if name in LEAKING:  # the test can see a leak
        input_ids, position_ids = (
            torch.from_numpy(array[:, :-1].astype(np.int64)) for array in (tokens, positions)
        )
        model.base_model.eval()
        packed = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        leaked = packed.last_hidden_state[torch.from_numpy(valid_rows(positions))].detach()
        assert apart(leaked.numpy(), final.numpy()) > 0.1


def test_any_rows_are_given_in_their_order(folder):
    """Where documents are read one by one: any rows, of one window also across documents."""
    model = load_model(folder("Qwen3.5"))
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, VOCAB, (3, BLOCK))
    positions = np.stack([np.arange(BLOCK), np.arange(BLOCK) % 5, np.arange(BLOCK) % 17])
    rows = rng.random((3, BLOCK)) < 0.3
    found = states_of_rows(model, "final_hidden", tokens, positions, rows)
    for state, (n, t) in zip(found, np.argwhere(rows), strict=True):
        ids = torch.from_numpy(tokens[n, t - positions[n, t] : t + 1])[None]
        with torch.inference_mode():
            expected = model.base_model(ids, use_cache=False).last_hidden_state[0, -1]
        assert torch.allclose(state, expected, atol=1e-4)
    none = states_of_rows(model, "final_hidden", tokens, positions, np.zeros_like(rows))
    assert none.shape == (0, 64)
    half, several = load_model(folder("Qwen3.5"), "bfloat16"), np.ones((3, BLOCK + 1), np.int64)
    nothing = label_logprobs(half, several, several, 2, scored=np.zeros_like(rows))
    assert nothing.shape == (0,)


def test_the_last_mlp_by_whatever_name():
    recurrent = {"num_hidden_layers": 3, "hidden_size": 64, "lru_width": 64, "vocab_size": VOCAB}
    plain = decoder("GraniteMoeHybrid", layer_types=["full_attention"] * 2, num_local_experts=0)
    for config in (RecurrentGemmaConfig(**recurrent, num_attention_heads=2), plain):
        assert last_mlp(skeleton(config)) is not None


def test_the_key_of_a_base_without_a_known_mlp_is_told(folder):
    assert key_fallback(folder("Jamba"), "last_mlp_input") is None
    assert key_fallback(folder("Nemotron-H"), 0.5) is None
    said = key_fallback(folder("Nemotron-H"), "last_mlp_input")
    assert "has no MLP that is known here, so keys are its final hidden states" in said


def why(name):
    """Return why a base's layers cannot start a memory."""
    if name in STATES:
        return "not all of its layers are attention"
    if name in EXPERTS:
        return "it is a mixture of experts"
    return "its layers share parts" if name == "Gemma 4" else None


@pytest.mark.parametrize("name", BASES)
def test_what_a_memory_starts_from(folder, tmp_path, name):
    base, settings = folder(name), MemorySettings(layers=1)
    said, memory = starts_from(settings, base), build_memory(settings, base, BLOCK)
    assert memory.config.num_hidden_layers == 1 and memory.config.vocab_size == VOCAB
    weights = f"{sum(p.numel() for p in memory.parameters()) / 1e6:.4g} M weights"
    better = "a dense model" if why(name) else "a whole pretrained model"
    assert f"{weights}; {better} of the same tokenizer, given with --init, may be" in said, said
    memory.save_pretrained(tmp_path)
    check_init(str(tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    if reason := why(name):
        assert f"cannot be taken ({reason}), so it starts fresh around its embedding" in said
        assert memory.config.model_type == "qwen3"
        for part in ("get_input_embeddings", "get_output_embeddings"):
            ours, theirs = (getattr(m, part)().weight.detach().ravel() for m in (memory, plain))
            assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9999
            assert ours.std() == pytest.approx(memory.config.initializer_range, rel=0.05)
        return
    assert said.startswith(f"memory: starts from the first layers of {base}: 1 layers of width 64")
    layers = plain.transformer.h if name == "GPT-2" else plain.get_decoder().layers
    del layers[1:]
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.allclose(memory.eval()(ids).logits, plain(ids).logits, atol=1e-5)


def test_a_fresh_memory_learns_the_same_from_a_seed(folder):
    first, again, other = (
        build_memory(MemorySettings(seed=seed), folder("Mixtral"), BLOCK) for seed in (1, 1, 2)
    )
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_wide_bases_embedding_is_projected(folder, monkeypatch):
    """On directions that keep the products of rows best: as numpy's decomposition has it."""
    monkeypatch.setattr(fresh, "MAX_WIDTH", 24)
    memory = build_memory(MemorySettings(), folder("DeepSeek V3"), BLOCK)
    assert memory.config.hidden_size == 24
    rows_VD = without_layers(folder("DeepSeek V3")).get_input_embeddings().weight.detach()
    U, s, _ = np.linalg.svd(rows_VD.numpy().astype(np.float64), full_matrices=False)
    best_VV = (U[:, :24] * s[:24] ** 2) @ U[:, :24].T
    ours = principal(rows_VD, 24).numpy()
    assert apart(ours @ ours.T, best_VV) < 1e-4
    kept = memory.get_input_embeddings().weight.detach().numpy()
    assert np.corrcoef((kept @ kept.T).ravel(), best_VV.ravel())[0, 1] > 0.9999


def test_directions_have_one_sign_whatever_the_machine(folder, monkeypatch):
    rows_VD, eigh = torch.randn(50, 16), torch.linalg.eigh
    ours = principal(rows_VD, 8)
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: (eigh(gram)[0], -eigh(gram)[1]))
    assert torch.equal(ours, principal(rows_VD, 8))


def test_what_a_checkpoint_replaces_is_not_computed(folder, monkeypatch):
    monkeypatch.setattr(fresh, "principal", None)  # a call would raise
    memory = build_memory(MemorySettings(), folder("DeepSeek V3"), BLOCK, restored=True)
    assert memory.config.model_type == "qwen3"


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_tied_as_in_the_checkpoint(tmp_path, tied):
    """Of Mistral 3 the text decoder's config alone says it."""
    text = decoder("Mixtral", tie_word_embeddings=tied, num_local_experts=2).to_dict()
    vision = VISION | {"model_type": "pixtral"}
    model = AutoModelForMultimodalLM.from_config(
        Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    )
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    memory = build_memory(MemorySettings(layers=1), str(tmp_path), BLOCK)
    assert memory.config.tie_word_embeddings == tied
    heads = [m.get_output_embeddings().weight.detach().ravel() for m in (memory, model)]
    assert torch.cosine_similarity(*heads, dim=0) > 0.9999


@pytest.mark.parametrize(
    ("name", "text", "sees", "reason"),
    [
        ("Mistral3", "Mistral", "pixtral", None),
        ("Llava", "Llama", "clip_vision_model", None),
        ("Qwen2_5_VL", "Qwen2_5_VLText", None, "its text decoder is no model by itself"),
    ],
)
def test_what_a_memory_of_another_multimodal_base_starts_from(tmp_path, name, text, sees, reason):
    own = decoder(text, num_hidden_layers=3, rope_parameters=ROPE).to_dict()
    vision = VISION | ({"model_type": sees} if sees else {})
    config = getattr(transformers, f"{name}Config")(text_config=own, vision_config=vision)
    config.tie_word_embeddings, config.initializer_range = False, 0.3
    plain = AutoModelForMultimodalLM.from_config(config).eval()
    plain.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    said = starts_from(MemorySettings(layers=2), str(tmp_path))
    memory = build_memory(MemorySettings(layers=2), str(tmp_path), BLOCK)
    assert memory.config.num_hidden_layers == 2
    assert ("starts from the first layers of" in said) == (reason is None), said
    assert keeps_apart(load_model(str(tmp_path))) == (reason is None)
    if reason is not None:
        assert f"({reason}), so it starts fresh" in said
        return
    del plain.get_decoder().layers[2:]
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.allclose(memory.eval()(ids).logits, plain(ids).logits, atol=1e-5)


def test_an_embedding_of_another_shape_is_refused(folder, tmp_path):
    base = shutil.copytree(folder("Mixtral"), tmp_path / "base")
    written = json.loads((base / "config.json").read_text()) | {"vocab_size": VOCAB + 8}
    (base / "config.json").write_text(json.dumps(written))
    with pytest.raises(MemdecError, match="of another shape than its config.json says: copy"):
        without_layers(str(base))


def test_the_experts_of_dbrx_are_seen():
    config = DbrxConfig(ffn_config={"moe_num_experts": 4}, n_layers=2)
    assert why_not_its_layers(config) == "it is a mixture of experts"


def test_the_shape_of_a_fresh_memory(folder, tmp_path):
    """The rule, for a base as wide as the largest, and what --init changes about it."""
    config = AutoConfig.from_pretrained(folder("DeepSeek V3"))
    config.hidden_size, config.vocab_size, config.max_position_embeddings = 7168, 129280, 163840
    config.save_pretrained(tmp_path)
    shape = memory_config(MemorySettings(layers=8), str(tmp_path), BLOCK)
    heads = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    assert (shape.hidden_size, *heads, shape.intermediate_size) == (2048, 16, 4, 128, 6144)
    assert (shape.num_hidden_layers, shape.max_position_embeddings) == (8, 163840)
    assert shape.tie_word_embeddings is False and shape.vocab_size == 129280
    said = starts_from(MemorySettings(layers=4), str(tmp_path))
    assert "4 layers of width 2,048, 722.5 M weights; a dense model of the same tokenizer" in said
    said = starts_from(MemorySettings(init=folder("Llama 3")), folder("Qwen3-MoE"))
    assert said.startswith(f"memory: starts from {folder('Llama 3')}: 2 layers of width 64")


@pytest.mark.parametrize(("layers", "fresh"), [(4, True), (6, False)])
def test_first_layers_that_are_no_model_are_not_taken(tmp_path, layers, fresh):
    """Gemma 4 without a table a layer: its last layer has larger heads, wherever it is cut."""
    sliding = ["sliding_attention"] * 5 + ["full_attention"]
    own = {"layer_types": sliding, "num_hidden_layers": 6, "hidden_size_per_layer_input": 0}
    own |= {"global_head_dim": 64, "architectures": ["Gemma4ForCausalLM"]}
    base = str(tmp_path / "base")
    save(decoder("Gemma4Text", **own), base)
    settings = MemorySettings(layers=layers)
    memory = build_memory(settings, base, BLOCK)
    assert (memory.config.model_type == "qwen3") == fresh
    assert ("(they are none by themselves), so it starts" in starts_from(settings, base)) == fresh
    memory.save_pretrained(tmp_path / "memory")
    assert load_model(str(tmp_path / "memory")).config.num_hidden_layers == layers


def test_quantised_layers_are_not_taken(folder, tmp_path):
    config = json.loads((AutoConfig.from_pretrained(folder("Llama 3"))).to_json_string())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert why_not_its_layers(AutoConfig.from_pretrained(tmp_path)) == "it is quantised"


@pytest.mark.parametrize("name", ["Jamba", "gpt-oss", "Gemma 3, multimodal"])
def test_explained_as_the_plain_model_has_it(folder, tiny_model, name, monkeypatch):
    """Pieces of a text go on where the last one ended, whatever state a layer keeps."""
    monkeypatch.setattr(interpolate, "INTERPRETED", False)
    monkeypatch.setattr(explaining, "CHUNK", 4)
    prompt = "some words of a text that goes on"
    found = explaining.explain(folder(name), tiny_model("llama"), prompt, 0.3, write=3)
    ids = AutoTokenizer.from_pretrained(folder(name))(prompt)["input_ids"]
    assert len(ids) > 9
    model = AutoModelForCausalLM.from_pretrained(folder(name)).eval()
    with torch.inference_mode():
        p_TV = model(torch.tensor([ids])).logits[0].softmax(-1)
    expected = p_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    known = [token.base for token in found.tokens if not token.written]
    assert known == pytest.approx(expected, rel=1e-3, abs=1e-8)
    assert found.tokens[len(known)].base == pytest.approx(
        float(p_TV[-1, ids_of(found, folder(name))]), rel=1e-3, abs=1e-8
    )


def ids_of(explanation, folder):
    """Return the id of the first token that the mixture wrote."""
    written = next(token for token in explanation.tokens if token.written)
    vocabulary = AutoTokenizer.from_pretrained(folder)
    [chosen] = [i for i in range(VOCAB) if vocabulary.decode([i]) == written.text][:1]
    return chosen


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Qwen3.5, multimodal", "Gemma 3, multimodal"])
def test_a_whole_build(folder, tmp_path, english, jsonl, build, memdec_here, name):
    base = folder(name)
    corpus = jsonl(tmp_path / "corpus.jsonl", english(20))
    learned = {"epochs": 6, "learning_rate": 3e-3, "evaluate_steps": 100}
    lines = build(base, corpus, tmp_path / "out", {"memory": learned})
    told = [line for line in lines if line.startswith("memory: ")]
    assert told[0] == starts_from(MemorySettings(layers=1), base)
    export = tmp_path / "out" / "export"
    check_init(str(export))
    assert load_text_config(str(export)).vocab_size == VOCAB
    code, out, err = memdec_here("verify", tmp_path / "out", "--base", base, "--sample", 64)
    assert code == 0 and "FAILED" not in out, out + err
    code, out, err = memdec_here("evaluate", export, "--base", base, "--text", corpus)
    assert code == 0 and "documents by themselves" in out, out + err


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Nemotron-H"])
def test_a_plan_says_what_is_made(folder, tmp_path, monkeypatch, name):
    from vllm_memdec.train.executor.executor import LocalExecutor
    from vllm_memdec.train.plan import report
    from vllm_memdec.train.progress import Progress
    from vllm_memdec.train.settings import Settings

    def measure(*_):
        raise MemdecError("measured")

    said = []
    progress = Progress()
    progress.say = said.append
    monkeypatch.setattr(report, "probe_rates", measure)
    with pytest.raises(MemdecError, match="measured"):
        report.plan(
            folder(name), None, None, 1000, Settings(), tmp_path, progress, LocalExecutor(), 10**9
        )
    assert said[0] == starts_from(MemorySettings(), folder(name))
    assert said[1:] == [key_fallback(folder(name), "last_mlp_input")] * (name == "Nemotron-H")
