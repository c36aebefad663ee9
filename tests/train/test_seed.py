"""`memdec seed`: the layers that matter, the base's own distributions as targets, and the whole."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.bases import decoder, save
from transformers import AutoModelForCausalLM

from vllm_memdec.train import seeding
from vllm_memdec.train.data.blocks import load_blocks, load_rows, unmarked, valid_rows
from vllm_memdec.train.data.shards import shards
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.model.layers import influences, most_influential, some_layers
from vllm_memdec.train.stages.teacher import drawn_targets

INFLUENCE = 1e-5  # float32 states, summed in float64
LOGIT = 1e-5  # of the largest: the same products


def blocks_of(pipeline, count=6):
    return (array[:count] for array in load_blocks(pipeline.output / "corpus", "train"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_influence_is_how_far_a_layer_turns_its_states(pipeline, tiny_model, kind):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind, layers=3)).eval()
    tokens, positions = blocks_of(pipeline)
    got = influences(model, tokens, positions, 4)  # does not divide the blocks
    exact = model.double()
    ids = torch.from_numpy(tokens[:, :-1].astype(np.int64))
    places = torch.from_numpy(unmarked(positions.astype(np.int64))[:, :-1])
    outputs = []
    inner = exact.transformer.h if kind == "gpt2" else exact.model.layers
    for layer in inner:
        layer.register_forward_hook(lambda m, args, out: outputs.append((args[0], out)))
    with torch.no_grad():
        exact(input_ids=ids, position_ids=places)
    mask = torch.from_numpy(valid_rows(positions))
    for number, (before, after) in enumerate(outputs):
        after = after if isinstance(after, torch.Tensor) else after[0]
        a, b = before[mask], after[mask]
        cosine = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
        assert got[number] == pytest.approx(float((1 - cosine).mean()), abs=INFLUENCE)
    assert len(outputs) == 3 and len(set(got.round(6))) == 3
    assert most_influential(np.array([0.1, 0.5, 0.2, 0.4]), 2) == [1, 3]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_a_model_of_some_layers_is_the_base_without_the_others(tiny_model, tmp_path, kind):
    base = tiny_model(kind, layers=4)
    whole = load_model(base, device=torch.device("cpu"))
    some_layers(whole, base, [1, 3]).save_pretrained(tmp_path)
    small = load_model(str(tmp_path))
    inner = whole.transformer if kind == "gpt2" else whole.model
    name = "h" if kind == "gpt2" else "layers"
    setattr(inner, name, torch.nn.ModuleList([getattr(inner, name)[n] for n in (1, 3)]))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        want, got = (m(input_ids=ids, use_cache=False).logits for m in (whole, small))
    assert (got - want).abs().max() <= LOGIT * want.abs().max()
    assert small.config.num_hidden_layers == 2


def test_targets_are_the_base_s_distribution():
    """The likeliest exactly; the others in the mean over draws."""
    logits_NV = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)) * 2
    p_NV = logits_NV.double().softmax(-1).numpy()
    total = np.zeros((3, 40))
    runs = 2_000
    generator = torch.Generator().manual_seed(2)
    for _ in range(runs):
        offsets, ids, probs = drawn_targets(logits_NV, 5, 4, generator)
        row = np.repeat(np.arange(3), np.diff(offsets))
        dense = np.zeros((3, 40))
        dense[row, ids] = probs
        assert np.allclose(dense.sum(1), 1, atol=1e-6)
        for n in range(3):
            top = np.argsort(-p_NV[n])[:5]
            assert np.allclose(dense[n, top], p_NV[n, top], atol=1e-6)
        total += dense
    # Four draws share what is left, 2,000 times: three standard errors of each token.
    left = np.array([1 - np.sort(p_NV[n])[-5:].sum() for n in range(3)])[:, None]
    error = 3.5 * np.sqrt(left * p_NV / (4 * runs)) + 1e-6
    assert (np.abs(total / runs - p_NV) < error).mean() > 0.98
    offsets, ids, probs = drawn_targets(logits_NV, 40, 4, generator)  # nothing is left to draw
    assert np.allclose(probs.reshape(3, 40), p_NV, atol=1e-6)


@pytest.fixture(scope="module")
def seeded(tiny_model, tmp_path_factory, english, jsonl, memdec_here):
    """Return (base, text, output, words of the command, what it printed)."""
    folder = tmp_path_factory.mktemp("seeded")
    base = tiny_model("qwen2", layers=4)
    text = jsonl(folder / "general.jsonl", english(60, seed=5))
    # A random base's distribution is not that of any text, so nothing else is learnt: beta 1.
    settings = ("corpus.block_tokens=32", "corpus.shard_blocks=16", "datastore.dtype=float32",
                "memory.dtype=float32", "memory.epochs=3", "memory.batch_blocks=2",
                "memory.learning_rate=3e-3", "memory.beta=1")  # fmt: skip
    words = ["seed", "--base", base, "--text", text, "--layers", 2, "--output", folder / "out",
             "--ray-address", "none",
             *(w for each in settings for w in ("--set", each))]  # fmt: skip
    code, _, err = memdec_here(*words)
    assert code == 0, err
    return base, text, folder / "out", words, err


def test_a_seed_is_a_model_that_speaks_better_than_its_layers(seeded, tiny_model):
    base, _, output, _, said = seeded
    facts = json.loads((output / "seed/seed.json").read_text())
    chosen = json.loads((output / "layers/layers.json").read_text())["chosen"]
    assert facts["layers"] == chosen and len(chosen) == 2
    weights = [sum(x.numel() for x in load_file(output / f / "model.safetensors").values())
               for f in ("seed", "layers")]  # fmt: skip
    assert weights[0] == weights[1]
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    tokens = json.loads((output / "corpus/corpus.json").read_text())["train"]["tokens"]
    # The base's embedding is tied to its head: all of its weights are passed.
    want = (2 * whole * tokens + 6 * weights[0] * tokens * 3) / 1e12
    assert facts["tflop"] == pytest.approx(want, rel=1e-6)
    assert "spent once" in said and f"--init {output / 'seed'}" in said
    rows = [json.loads(x) for x in (output / "seed/logs/metrics.jsonl").read_text().splitlines()]
    first, last = (np.mean([row["kl"] for row in part]) for part in (rows[:5], rows[-5:]))
    assert last < 0.8 * first


def test_targets_of_a_seed_are_those_of_every_row(seeded):
    base, _, output, *_ = seeded
    tokens, positions = (array[:] for array in load_blocks(output / "corpus", "train"))
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    valid = valid_rows(positions)
    assert valid.sum() == load_rows(output / "corpus", "train").sum()
    labels = np.concatenate(shards(output / "teacher", "labels"))
    assert np.array_equal(labels, tokens[:, 1:][valid])
    ids, probs = (shards(output / "teacher", name)[0] for name in ("ids", "probs"))
    offsets = shards(output / "teacher", "offsets")[0]
    start = np.flatnonzero(positions[0] == 0)
    stop = start[1] if len(start) > 1 else len(tokens[0])
    run = torch.from_numpy(tokens[0][:stop].astype(np.int64))
    with torch.no_grad():
        p_NV = model(run[None, :-1]).logits[0].double().softmax(-1).numpy()
    for n in range(len(run) - 1):
        part = slice(offsets[n], offsets[n + 1])
        likeliest = p_NV[n].argmax()
        [place] = np.flatnonzero(ids[part] == likeliest)
        assert probs[part][place] == pytest.approx(p_NV[n].max(), rel=2e-3, abs=1e-4)  # fp16


def test_a_seed_is_made_once_and_starts_a_memory(seeded, memdec_here, pipeline, tmp_path):
    base, _, output, words, _ = seeded
    _, _, said = memdec_here(*words)
    assert [f"{stage}: up to date" in said for stage in ("corpus", "layers", "teacher", "seed")]
    assert "training" not in said
    settings = ("corpus.block_tokens=32", "memory.epochs=1", "targets.neighbours=16",
                "datastore.dtype=float32")  # fmt: skip
    code, _, said = memdec_here(
        "build", "--base", base, "--corpus", pipeline.corpus, "--output", tmp_path / "out",
        "--init", output / "seed", "--ray-address", "none",
        *(word for each in settings for word in ("--set", each)),
    )  # fmt: skip
    assert code == 0, said
    assert "is trained already, so memory.learning_rate 0.0001" in said
    assert "memory: starts from" in said and "2 layers" in said


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--layers", 4], "--layers must be from 1 to 3, fewer than"),
        (["--set", "memory.sampled_negatives=5"], "a seed learns all tokens: leave memory.sampl"),
        (
            ["--set", "memory.objective=mixture", "--set", "memory.beta=0.5"],
            "a seed speaks for itself: leave memory.object",
        ),
        (["--set", "memory.init=folder"], "memory.layers cuts the base, but memory.init folder"),
        *(
            (["--set", setting], f"a seed does not use {setting.split('=')[0]}: leave it out.")
            for setting in (
                "targets.neighbours=8",
                "index.kind=flat",
                "export.alpha=0.3",
                "update.epochs=3",
                "datastore.key=final_hidden",
                "datastore.keep_keys=false",
            )
        ),
    ],
)
def test_bad_input(seeded, memdec_here, tmp_path, more, sentence):
    *_, words, _ = seeded
    given = [tmp_path / "new" if w == words[8] else w for w in words]
    code, _, said = memdec_here(*given, *more)
    assert code == 1 and f"memdec: {sentence}" in said
    assert not (tmp_path / "new").exists()


def gemma4(folder, layers):
    """Write a dense Gemma 4: every sixth layer, and always the last, has larger heads."""
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * (layers // 6)
    own = {"layer_types": kinds, "num_hidden_layers": layers, "hidden_size_per_layer_input": 0}
    own |= {"global_head_dim": 64, "architectures": ["Gemma4ForCausalLM"]}
    save(decoder("Gemma4Text", **own), folder)
    return folder


def changed(words, output, **options):
    """Return a seed's words with another output, and other values of some options."""
    options = {"--output": output} | {f"--{name}": value for name, value in options.items()}
    return [options.get(words[n - 1], word) for n, word in enumerate(words)]


def test_first_layers_that_are_no_model_are_refused_at_once(seeded, memdec_here, tmp_path):
    base = gemma4(tmp_path / "base", 6)
    words = changed(seeded[3], tmp_path / "new", base=base, layers=4)
    code, _, said = memdec_here(*words)
    assert code == 1
    assert f"the layers of {base} cannot be taken (they are none by themselves): give" in said
    assert not (tmp_path / "new").exists()


def test_chosen_layers_that_are_no_model_are_refused_before_the_teacher(
    seeded, memdec_here, tmp_path, monkeypatch
):
    base = gemma4(tmp_path / "base", 6)
    monkeypatch.setattr(seeding, "why_fresh", lambda *a: None)  # other layers may be a model
    monkeypatch.setattr(seeding, "influences", lambda *a: np.array([3, 4, 5, 6, 1, 2.0]))
    words = changed(seeded[3], tmp_path / "new", base=base, layers=4)
    code, _, said = memdec_here(*words)
    assert code == 1
    assert f"the layers 0, 1, 2, 3 of {base}, those of most influence, are no model" in said
    assert {path.name for path in (tmp_path / "new").iterdir() if path.is_dir()} == {
        "corpus", "layers.partial"
    }  # fmt: skip


def test_layers_are_judged_on_all_of_the_text(seeded, memdec_here, tmp_path, monkeypatch):
    """And what the models run in is told first."""
    judged, told = [], []

    def judge(model, tokens, positions, batch):
        judged.extend((tokens, positions))
        raise KeyboardInterrupt

    monkeypatch.setattr(seeding, "influences", judge)
    monkeypatch.setattr(seeding, "JUDGED_TOKENS", 3 * 32)
    monkeypatch.setattr(seeding, "tell_dtype", lambda dtypes, say: told.extend(dtypes))
    code, _, _ = memdec_here(*changed(seeded[3], tmp_path / "new"))
    whole = [array[:] for array in load_blocks(tmp_path / "new/corpus", "train")]
    last = len(whole[0]) - 1
    assert code == 130 and last > 10 and told == ["float32", "float32"]
    for part, array in zip(judged, whole, strict=True):
        assert np.array_equal(part, array[[0, last // 2, last]])


def test_a_killed_seed_goes_on(seeded, memdec_here, tmp_path, monkeypatch):
    """Half of the teacher's shards are there: they are not made again, and the end is the same."""
    *_, output, words, _ = seeded
    from vllm_memdec.train.stages import teacher

    given = [tmp_path / "new" if w == words[8] else w for w in words]
    made = []
    call = teacher.Teacher.__call__

    def some(self, shard):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(shard)
        return call(self, shard)

    monkeypatch.setattr(teacher.Teacher, "__call__", some)
    code, _, _ = memdec_here(*given)
    assert code == 130 and len(made) == 2
    monkeypatch.setattr(teacher.Teacher, "__call__", lambda *a: made.append(a[1]) or call(*a))
    code, _, said = memdec_here(*given)
    assert code == 0 and "teacher: resuming" in said
    assert sorted(made) == list(range(len(shards(output / "teacher", "labels"))))
    ours, theirs = (load_file(o / "seed/model.safetensors") for o in (tmp_path / "new", output))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
