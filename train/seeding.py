"""`memdec seed`: a start for memories that can speak, made once of a base and of general text.

corpus -> layers -> teacher -> seed. The layers of most influence on the text are kept, and
distilled: trained on the base's own distributions and on the text, by the stage that trains
memories. `memdec build --init OUTPUT/seed` starts a memory of any corpus from it. Every stage is an
artifact: what is up to date is skipped, and a killed run goes on.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data import completeness
from vllm_memdec.train.data.artifacts import Artifact, locked, write_json
from vllm_memdec.train.data.blocks import load_blocks
from vllm_memdec.train.data.hub import model_folder, text_path
from vllm_memdec.train.data.inputs import Hashes
from vllm_memdec.train.data.ownership import check_ours
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model.decoder import can_be_read, first_layers, why_fresh
from vllm_memdec.train.model.devices import BLOCKS, default_device, tell_dtype
from vllm_memdec.train.model.fresh import cut
from vllm_memdec.train.model.huggingface import (
    is_tied,
    load_config,
    load_text_config,
    load_tokenizer,
    skeleton,
    text_config,
)
from vllm_memdec.train.model.layers import influences, most_influential, some_layers
from vllm_memdec.train.pipeline import check_inputs, find_inputs, run
from vllm_memdec.train.settings import CorpusSettings, MemorySettings, Settings
from vllm_memdec.train.stages import corpus, teacher, training
from vllm_memdec.train.stages.stage import OTHERS, Build, Stage

STAGES = ("corpus", "layers", "teacher", "seed")
EPOCHS = 1.0  # of the general text, unless set: more text is worth more than more epochs
JUDGED_TOKENS = 2**13  # tokens on which a layer's influence is measured, at most
FACTS = "seed.json"
# The settings that a seed uses, by stage.
USED = {
    "corpus": {*CorpusSettings.model_fields},
    "datastore": {"batch_blocks", "dtype"},
    "memory": {*MemorySettings.model_fields},
}


def heal(base: str, text: Path, output: Path, settings: Settings, context: Context) -> Artifact:
    """Make a seed of a base under output/; return its artifact, a model folder with tokenizer.

    settings.memory.layers: how many layers it keeps. MemdecError for what cannot work.
    """
    say = context.progress.say
    base, text = model_folder(base, "--base", say), text_path(text, "--text", say)
    base, text, output = os.path.abspath(base), text.absolute(), output.absolute()
    check_settings(settings, base)
    if "epochs" not in settings.memory.model_fields_set:
        settings = settings.changed({"memory": {"epochs": EPOCHS}})
    check_inputs(base, text, None, output, settings.memory)
    for stage in STAGES:
        check_ours(output / stage, stage)
    with locked(output, say):
        hashes = Hashes(output)
        try:
            inputs = find_inputs(base, text, None, settings, hashes, context.progress)
        finally:
            hashes.save()
        weights = inputs["datastore"]
        needed = {"corpus": inputs["corpus"]} | dict.fromkeys(("layers", "teacher"), weights)
        needed["seed"] = {"base": weights["base"], "tokenizer": inputs["corpus"]["tokenizer"]}
        tell_dtype((part.dtype for part in (settings.datastore, settings.memory)), say)
        made = Build(base, text, None, output, settings, context)
        describe = (corpus.stage, layers, teacher.stage, seed)
        return run(made, needed, "seed", dict(zip(STAGES, describe, strict=True)))


def check_settings(settings: Settings, base: str) -> None:
    """Raise MemdecError where a base has no layers to choose from, or settings are for memories."""
    memory, has = settings.memory, load_text_config(base).num_hidden_layers
    for stage in type(settings).model_fields:
        given = getattr(settings, stage)
        for name in sorted(given.model_fields_set - USED.get(stage, set())):
            if getattr(given, name) is not None:
                raise MemdecError(f"a seed does not use {stage}.{name}: leave it out.")
    if memory.init != "base" or memory.adapts:
        raise MemdecError("a seed is made of its base's layers: leave memory.init out.")
    if memory.sampled_negatives is not None:
        raise MemdecError("a seed learns all tokens: leave memory.sampled_negatives out.")
    if memory.objective != "cross_entropy":
        raise MemdecError("a seed speaks for itself: leave memory.objective out.")
    if memory.layers is None or memory.layers >= has:
        raise MemdecError(f"--layers must be from 1 to {has - 1}, fewer than {base} has: set it.")
    if why := why_fresh(memory, base):
        raise MemdecError(f"the layers of {base} cannot be taken ({why}): give another base.")


def layers(build: Build) -> Stage:
    """Return how the layers of most influence are chosen."""
    wanted = build.settings.memory.layers
    assert wanted is not None  # check_settings()
    settings = {"layers": wanted, "by": "influence", "tokens": JUDGED_TOKENS, "spread": True}

    def make(work: Path) -> None:
        whole = first_layers(build.base, load_text_config(build.base).num_hidden_layers)
        arrays = load_blocks(build.path("corpus"), "train")
        count = len(arrays[0])
        blocks = min(count, max(1, JUDGED_TOKENS // (arrays[0].shape[1] - 1)))
        spread = np.linspace(0, count - 1, blocks).astype(np.int64)  # a text may begin otherwise
        tokens, positions = (array[spread] for array in arrays)
        influence_L = influences(whole.to(default_device()), tokens, positions, BLOCKS)
        chosen = most_influential(influence_L, wanted)
        if not can_be_read(text_config(cut(load_config(build.base), chosen))):
            raise MemdecError(
                f"the layers {', '.join(map(str, chosen))} of {build.base}, those of most "
                "influence, are no model by themselves: give another --layers, or another base."
            )
        some_layers(whole.to("cpu"), build.base, chosen).save_pretrained(work)
        load_tokenizer(build.base).save_pretrained(work)
        facts = {"chosen": chosen, "influences": [round(float(x), 5) for x in influence_L]}
        write_json(work / "layers.json", facts)
        said = ", ".join(map(str, chosen))
        build.context.progress.say(f"layers: kept of {build.base}, counted from 0: {said}")

    return Stage(settings, ("corpus",), make, completeness.model_files, OTHERS)


def seed(build: Build) -> Stage:
    """Return how the chosen layers are trained."""
    memory = build.settings.memory.changed(init=str(build.path("layers")), layers=None)
    settings = build.settings.model_copy(update={"memory": memory})
    done = build.done | {"targets": build.done["teacher"]}
    trained = training.stage(replace(build, settings=settings, done=done))

    def make(work: Path) -> None:
        say = build.context.progress.say
        facts = cost(build)
        say(
            f"seed: {facts['tflop']:.3g} TFLOP, {facts['teacher_tflop']:.3g} of them of the base; "
            "spent once, for memories of any corpus"
        )
        trained.make(work)
        load_tokenizer(build.base).save_pretrained(work)
        write_json(work / FACTS, facts)
        say(f"seed: start memories from it with --init {build.output / 'seed'}")

    reads = ("corpus", "layers", "teacher")
    return Stage(trained.settings, reads, make, seed_files, trained.remedy)


def seed_files(work: Path) -> list[str]:
    """Return the names of a seed's files."""
    return [*completeness.model_files(work), FACTS]


def cost(build: Build) -> dict[str, Any]:
    """Return the FLOPs of a seed: two a weight and token forward, four backward; and its layers.

    Attention, the optimiser and what chooses the layers are not counted.
    """
    facts = json.loads((build.path("corpus") / "corpus.json").read_text())
    tokens = facts["train"]["tokens"]
    base, small = (passed(load_text_config(f)) for f in (build.base, str(build.path("layers"))))
    taught, learnt = 2 * base * tokens, 6 * small * tokens * build.settings.memory.epochs
    chosen = json.loads((build.path("layers") / "layers.json").read_text())["chosen"]
    return {
        "tflop": (taught + learnt) / 1e12,
        "teacher_tflop": taught / 1e12,
        "tokens": tokens,
        "layers": chosen,
    }


def passed(config: Any) -> int:
    """Return how many weights a token passes in a causal LM: all but a table that is looked up."""
    model = skeleton(config)
    every = sum(p.numel() for p in model.parameters())
    return every if is_tied(model) else every - model.get_input_embeddings().weight.numel()
