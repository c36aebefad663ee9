"""What `memdec verify` looks for in a build's content; report.py runs it and shows it.

Every check is a function of a Build that returns (passed, sentence, figures), passed None where it
only measures, or raises NotChecked. None of them trusts the code that made what it looks at:
neighbours come from brute_force.py, labels from the corpus.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from vllm_memdec.checkpoint import read_block, tokenizer_fingerprint
from vllm_memdec.train.data.blocks import load_blocks, valid_rows
from vllm_memdec.train.data.duplicates import overlap, stored_documents
from vllm_memdec.train.data.shards import shards
from vllm_memdec.train.model.huggingface import load_tokenizer
from vllm_memdec.train.verify.brute_force import StoredTargets, recall, take, target
from vllm_memdec.train.verify.build import RECALL_AT, Build, NotChecked, without_own
from vllm_memdec.train.verify.fidelity import CONTEXT, RECITED, fidelity, passages, recited

Result = tuple[bool | None, str, dict[str, Any]]
SLICE = 512  # blocks read at once
# A memory is only as good as the neighbours it is taught. Recall of a sound index, by its kind.
LOWEST_RECALL = {"Flat": 0.99, "SQ": 0.9, "PQ": 0.5}
HALF = 2.0**-11  # the relative rounding error of fp16
TINY = 2.0**-25  # its absolute error, below the normal range
LEAK = 2e-3  # what rounding may add to the own label's probability: more is a leak
MAX_EMPTY = 0.01  # share of rows without any neighbour, above which nprobe is too small
COPY = 1e-5  # share of a far neighbour's distance, within which rows are of the same text
PASSAGES = 128  # passages to recite, at most


def next_tokens(build: Build) -> Iterator[np.ndarray]:
    """Yield the labels of some blocks after others, as the corpus has them."""
    tokens, positions = load_blocks(build.folder("corpus"), "train")
    for start in range(0, len(tokens), SLICE):
        part = np.asarray(tokens[start : start + SLICE])
        yield part[:, 1:][valid_rows(np.asarray(positions[start : start + SLICE]))]


def check_tokenizer(build: Build) -> Result:
    """Do corpus, export and the export's own files speak of the same tokenizer?"""
    facts = json.loads((build.folder("corpus") / "corpus.json").read_text())
    export = build.folder("export")
    section = read_block(export)
    fingerprints = {
        "corpus": facts["tokenizer_fingerprint"],
        "config.json of the export": section.tokenizer_fingerprint if section else None,
        "tokenizer of the export": tokenizer_fingerprint(load_tokenizer(str(export))),
    }
    if build.base:
        fingerprints["base"] = tokenizer_fingerprint(load_tokenizer(str(build.base)))
    if len(set(fingerprints.values())) > 1:
        said = ", ".join(f"{name} {str(print_)[:8]}" for name, print_ in fingerprints.items())
        return False, f"different fingerprints: {said}", {}
    return True, f"{facts['tokenizer_fingerprint'][:8]}: {', '.join(fingerprints)}", fingerprints


def check_held_out(build: Build) -> Result:
    """How many held-out documents are trained on too, word for word or nearly so?"""
    corpus = build.folder("corpus")
    leak = overlap(stored_documents(corpus, "train"), stored_documents(corpus, "validation"))
    figures = asdict(leak)
    said = (
        f"of {leak.documents:,} held-out documents {leak.equal:,} are trained on word for word; "
        f"{leak.near:,} of {leak.compared:,} have a near copy in the training text"
    )
    return None, said, figures


def check_alignment(build: Build) -> Result:
    """Are the labels of datastore and targets the next tokens of the corpus, row by row?"""
    build.folder("corpus")
    looked_at = [stage for stage in ("datastore", "targets") if build.has(stage)]
    if not looked_at:
        build.folder("datastore", "targets")
    for stage in looked_at:
        stored = shards(build.root / stage, "labels")
        for name, more in (("keys", 0), ("offsets", 1)):
            counts = shards(build.root / stage, name).lengths - more
            if len(counts) and not np.array_equal(counts, stored.lengths):
                return False, f"{stage}: {name} and labels have different numbers of rows", {}
        rows, row = stored.rows, 0
        for expected in next_tokens(build):
            here = np.arange(row, min(row + len(expected), rows))
            wrong = np.flatnonzero(take(stored, here) != expected[: len(here)])
            if len(wrong):
                return False, f"{stage}: the label of row {row + wrong[0]} is not the corpus's", {}
            row += len(expected)
        if row != rows:
            return False, f"{stage} has {rows:,} rows, the corpus {row:,}", {}
    return True, f"{rows:,} labels of {' and '.join(looked_at)} are the corpus's", {"rows": rows}


def check_probabilities(build: Build) -> Result:
    """Does every row sum to 1 within fp16's rounding, its ids ascending and in the vocabulary?"""
    folder = build.folder("targets")
    vocabulary = None
    for stage in ("memory", "export"):
        if (config := build.root / stage / "config.json").exists():
            vocabulary = json.loads(config.read_text())["vocab_size"]
    rows = empty = entries = first = 0
    furthest = top = 0.0
    for offsets, ids, probs in zip(
        *(shards(folder, name) for name in ("offsets", "ids", "probs")), strict=True
    ):
        lengths = np.diff(offsets)
        if offsets[0] or offsets[-1] != len(ids) or len(ids) != len(probs) or (lengths < 0).any():
            return False, f"the offsets from row {first} on do not fit ids and probabilities", {}
        row = np.repeat(np.arange(len(lengths)), lengths)
        descents = np.flatnonzero((np.diff(ids) <= 0) & (np.diff(row) == 0))
        if len(descents):
            return False, f"row {first + row[descents[0]]}: ids do not ascend", {}
        if len(ids) and (ids.min() < 0 or vocabulary is not None and ids.max() >= vocabulary):
            return False, f"ids of {ids.min()}..{ids.max()} in a vocabulary of {vocabulary}", {}
        p = probs.astype(np.float64)
        off = np.abs(np.bincount(row, p, minlength=len(lengths)) - 1) * (lengths > 0)
        wrong = np.flatnonzero(~(off <= HALF + lengths * TINY + 1e-6))
        if len(wrong) or (p <= 0).any():
            at = wrong[0] if len(wrong) else row[np.flatnonzero(p <= 0)[0]]
            return False, f"row {first + at}: its probabilities are off 1 by {off[at]:.4g}", {}
        rows, empty, entries = rows + len(lengths), empty + (lengths == 0).sum(), entries + len(p)
        furthest, first = max(furthest, off.max(initial=0)), first + len(lengths)
        top += np.maximum.reduceat(p, offsets[:-1][lengths > 0]).sum() if len(p) else 0.0
    figures = {"rows": rows, "empty": int(empty), "tokens_a_row": entries / max(rows, 1)}
    figures["furthest_from_1"] = float(furthest)
    figures["mean_top_probability"] = float(top / max(rows - empty, 1))
    said = (
        f"{rows:,} rows sum to 1 within {furthest:.1e}, {figures['tokens_a_row']:.1f} tokens each, "
        f"the likeliest with {figures['mean_top_probability']:.2f}"
    )
    said += f", {empty} found no neighbour" if empty else ""
    return bool(empty <= rows * MAX_EMPTY), said, figures


def check_recall(build: Build) -> Result:
    """Does the index find the true neighbours?"""
    keys = build.keys
    kind = json.loads((build.folder("index") / "index.json").read_text())["kind"]
    lowest = next(low for name, low in LOWEST_RECALL.items() if name in kind.split(",")[-1])
    (distances, ids), index_ids = build.true, without_own(*build.by_index, build.rows)[1]
    queries = take(keys, build.rows)
    figures: dict[str, float] = {"queries": len(build.rows)}
    for k in sorted({min(RECALL_AT, ids.shape[1]), build.neighbours}):
        cut = (a[:, :k] for a in (index_ids, distances, ids))
        figures[f"recall_at_{k}"] = recall(keys, queries, *cut)
    # Rows of text that occurs twice learn from themselves: a neighbour has the same context.
    copies = distances[:, 0] <= COPY * np.quantile(distances[:, -1], 0.9)
    figures["copies"] = float(np.mean(copies & (ids[:, 0] >= 0)))
    first = next(value for name, value in figures.items() if name.startswith("recall"))
    said = ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in figures.items() if "recall" in k)
    said += f" ({kind}, {len(queries)} queries; at least {lowest})"
    return (
        first >= lowest,
        f"{said}; {figures['copies']:.1%} of rows have one of the same context",
        figures,
    )


def check_leak(build: Build) -> Result:
    """Does any row owe probability of its true label to itself?

    A row leaks if its target gives the label more than brute force without the row does, and more
    than the index without the row does, whose approximation may favour a label by chance.
    """
    from vllm_memdec.train.stages.targets import neighbours_without_self

    folder, rows, k = build.folder("targets"), build.rows, build.neighbours
    temperature = json.loads((folder / "targets.json").read_text())["temperature"]
    min_probability = build.settings("targets")["min_probability"]
    stored = StoredTargets(folder)
    distances, ids = (a[:, : k + 1] for a in build.by_index)
    true_distances, true_ids = (a[:, :k] for a in build.true)
    own = (neighbours_without_self(distances, ids, rows)[1] == rows[:, None]).any(axis=1)
    own_labels = take(build.labels, rows)
    neighbours = [
        (distances, ids, take(build.labels, np.maximum(ids, 0).ravel()).reshape(ids.shape))
        for distances, ids in (without_own(distances, ids, rows), (true_distances, true_ids))
    ]
    leaks, differences = rows[own].tolist(), []
    for i, row in enumerate(rows.tolist()):
        has = dict(zip(*(a.tolist() for a in stored.row(row)), strict=True))
        label, allowed = int(own_labels[i]), 0.0
        for distances, ids, labels in neighbours:
            d = distances[i][ids[i] >= 0].astype(np.float64)
            expected = target(d, labels[i][ids[i] >= 0], temperature, min_probability)
            allowed = max(allowed, expected.get(label, 0.0) + undecided(d, temperature))
        if has.get(label, 0.0) > allowed + LEAK:
            leaks.append(row)
        tokens = set(has) | set(expected)
        differences.append(sum(abs(has.get(t, 0) - expected.get(t, 0)) for t in tokens) / 2)
    figures: dict[str, float] = {
        "rows": len(rows),
        "own_neighbour": int(own.sum()),
        "leaks": len(leaks),
    }
    figures["tv_from_exact"] = float(np.mean(differences))
    if leaks:
        return False, f"{len(leaks)} of {len(rows)} rows know their label: {min(leaks)}", figures
    far = f"{figures['tv_from_exact']:.4f} total variation from exact targets"
    return True, f"none in {len(rows)} rows; {far}", figures


def undecided(distances: np.ndarray, temperature: float) -> float:
    """Return the weight of the furthest neighbours: others as far may have been taken instead."""
    if not len(distances):
        return 0.0
    weights = np.exp(-(distances - distances.min()) / temperature)
    return float(weights[distances >= distances.max() * (1 - 1e-6)].sum() / weights.sum())


def check_fidelity(build: Build) -> Result:
    """Is the memory closer to its targets, on training rows, than the corpus's word counts?"""
    folder = build.folder("targets")
    tokens, positions = load_blocks(build.folder("corpus"), "train")
    models = build.models
    vocabulary = models["memory"].config.vocab_size
    counts = np.zeros(vocabulary, np.int64)
    for part in shards(folder, "labels"):
        counts += np.bincount(part, minlength=vocabulary)
    per_block = [
        valid_rows(np.asarray(positions[start : start + SLICE])).sum(axis=1)
        for start in range(0, len(tokens), SLICE)
    ]
    figures = fidelity(
        models,
        tokens,
        positions,
        np.cumsum(np.r_[0, np.concatenate(per_block)]),
        StoredTargets(folder),
        counts / counts.sum(),
        build.sample,
    )
    said = "; ".join(
        f"{name}: top-1 agreement {f['agreement']:.1%}, KL {f['kl']:.3f}, TV {f['tv']:.3f}, "
        f"Pearson {f['pearson']:.3f}"
        for name, f in figures.items()
        if name != "unigram"
    )
    said += f" (word counts: KL {figures['unigram']['kl']:.3f}; {figures['memory']['rows']} rows)"
    return figures["memory"]["kl"] < figures["unigram"]["kl"], said, figures


def check_memorisation(build: Build) -> Result:
    """How many passages of the corpus does the memory, given their beginning, recite exactly?"""
    tokens, positions = load_blocks(build.folder("corpus"), "train")
    models = build.models
    figures: dict[str, float] = {}
    for length in RECITED:
        texts = passages(tokens, positions, CONTEXT + length, min(build.sample, PASSAGES))
        if len(texts):
            figures[f"passages_{length}"] = len(texts)
            for name, model in models.items():
                figures[f"{name}_exact_{length}"] = recited(model, texts)
    if not figures:
        raise NotChecked(f"no document has {CONTEXT + min(RECITED)} tokens in a block")
    said = [
        f"{name} {figures[f'{name}_exact_{n}']:.1%} of {figures[f'passages_{n}']} at {n} tokens"
        for n in RECITED
        if f"passages_{n}" in figures
        for name in models
    ]
    return None, f"recited after {CONTEXT} tokens: {', '.join(said)}", figures
