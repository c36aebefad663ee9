"""Memories of several domains that decide together: each token of each text by all of them.

    python -m benchmarks.quality.quality --pair smollm2-whole --budget paper
    python -m benchmarks.quality.together --pair smollm2-whole --budget paper --domains law factbook

With the memories and gates of quality.py, perplexity on unseen text of each domain and on general
text: the base; the text's own memory alone by its gate, which an oracle would have to choose, and
on general text the base; the gates as they are, all together; with a number added to each gate's
score; and trained together, as `memdec calibrate` of several memories does. `alone` is the text's
own memory alone by the gate that was trained together. Writes results/together.csv; the last line
is JSON, `accepted` where all domains are within 2 % of the oracle and general text within 1 %.
"""

import json
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, provenance, replace_rows, rounded
from benchmarks.corpora import domains
from benchmarks.quality.domain import WORK, Domain, made_in
from benchmarks.quality.measuring import domains_of, new_parser, parsed
from benchmarks.quality.pair import columns
from benchmarks.systems.gated import WINDOW, Gated, gate_ids
from benchmarks.systems.memory import Memory
from vllm_memdec.train.data.artifacts import Artifact, build_artifact
from vllm_memdec.train.data.blocks import bos_of, valid_rows
from vllm_memdec.train.data.inputs import model_hash
from vllm_memdec.train.evaluation import gate_texts
from vllm_memdec.train.evaluation import gate_together as joint
from vllm_memdec.train.evaluation.gate_training import Scored, even, mixture, read_windows
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.model.scoring import perplexity
from vllm_memdec.train.model.windows import Windows, window_logprobs, windows

TABLE = RESULTS / "together.csv"
# Rows read of each kind.
ROWS = {"domain": 2**13, "corpus": 2**13, "general": 2**15, "in turn": 2**13}
WITHIN = {"domain": 0.02, "general": 0.01}  # of the oracle
GENERAL = "general"


class Together:
    """Memories of several domains beside one base, and what all of them read."""

    def __init__(self, of: Sequence[Domain]) -> None:
        self.domains = {domain.name: domain for domain in of}
        self.first = of[0]
        self.members = [joint.Member(name, Path(name)) for name in self.domains]
        self.stream = f"stream-{'-'.join(self.domains)}"

    def texts(self, name: str) -> dict[str, Windows]:
        """Return the texts of a domain, general text, or the stream of all, by kind."""
        domain = self.domains.get(name, self.first)
        if name == self.stream:
            kinds = {kind: [*gate_ids(d, "domain")] for kind, d in self.domains.items()}
            kinds[GENERAL] = [*gate_ids(domain, GENERAL)]
            parts = [gate_texts.passages(ids, *gate_texts.PASSAGE) for ids in kinds.values()]
            trained, scored = {"in turn": gate_texts.in_turn(*parts)}, ()
        elif name == GENERAL:
            trained, scored = {GENERAL: gate_ids(domain, GENERAL)}, tuple(domains.GENERAL)
        else:
            trained = {kind: gate_ids(domain, kind) for kind in ("domain", "corpus")}
            scored = ("test",)
        ends = domain.tokenizer.eos_token_id, bos_of(domain.tokenizer)
        read = {k: windows(ids, WINDOW, ends[0], ROWS[k], ends[1]) for k, ids in trained.items()}
        for text in scored:
            tokens, positions = domain.blocks(text)
            read[text] = Windows(tokens, positions, valid_rows(positions))
        return read

    def read(self, reader: str, name: str) -> dict[str, Scored]:
        """Return what the memory of a domain and the base give to such texts, by kind."""
        base, own = self.artifact("base", name), self.artifact(reader, name)
        found = {}
        for path in own.path.glob("*.npz"):
            with np.load(path) as file, np.load(base.path / path.name) as theirs:
                rows = len(file["logp"])
                features_NF = torch.from_numpy(file["features"])
                found[path.stem] = Scored(
                    theirs["logp"], file["logp"], features_NF, np.zeros(rows, int), file["position"]
                )
        return found

    def artifact(self, reader: str, name: str) -> Artifact:
        """Return the readings of the base, or of a domain's memory, of such texts."""
        progress, tokenizer = self.first.progress, self.first.tokenizer
        folder = self.first.base
        if reader != "base":
            folder = self.domains[reader].system(Memory).folder

        def make(work: Path) -> None:
            model = self.model(folder)
            for kind, text in self.texts(name).items():
                told = f"{reader}, {name}, {kind}"
                if reader == "base":
                    arrays = {"logp": window_logprobs(model, text, progress, told)}
                else:
                    nothing_N = np.zeros(len(text.position_N))
                    part = read_windows(nothing_N, model, tokenizer, text, told, progress)
                    arrays = {"logp": part.memory_N, "features": part.features_NF.numpy()}
                    arrays["position"] = part.position_N
                np.savez(work / f"{kind}.npz", **arrays)

        of = [self.domains.get(name, self.first)]  # general text is the same in all
        if name == self.stream:
            of = [*self.domains.values()]
        inputs = {domain.name: domain.text.hash for domain in of}
        inputs["model"] = model_hash(folder, reader)
        settings = {"rows": ROWS, "window": WINDOW} | made_in()
        place = self.first.folder.parent / self.first.pair.budgeted("together") / reader / name
        return build_artifact(place, "together", settings, inputs, make, progress.say)

    def model(self, folder: str) -> Any:
        """Return a model; the one before goes."""
        if self._model[0] != folder:
            self._model = ("", None)
            self._model = (folder, load_model(folder, "bfloat16"))
        return self._model[1]

    _model: tuple[str, Any] = ("", None)

    @cached_property
    def everything(self) -> list[dict[str, dict[str, Scored]]]:
        """What each memory and the base give to all texts, by name and kind."""
        names = (*self.domains, GENERAL, self.stream)
        return [{name: self.read(reader, name) for name in names} for reader in self.domains]

    @cached_property
    def trained(self) -> list[dict[str, Scored]]:
        """What gates are trained on, of each memory."""
        return [
            {m.kind(k): of[m.name][k] for m in self.members for k in ("domain", "corpus")}
            | {GENERAL: of[GENERAL][GENERAL], "in turn": of[self.stream]["in turn"]}
            for of in self.everything
        ]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each text that is scored."""
        olds = [domain.system(Gated).arrays for domain in self.domains.values()]
        gates = joint.fit_together(self.members, self.trained, olds)
        moved = with_offsets(olds, self.trained, joint.kinds_of(self.members, self.trained[0]))
        texts = [(n, name, "test") for n, name in enumerate(self.domains)]
        found = []
        for own, name, kind in [*texts, *((None, GENERAL, kind) for kind in domains.GENERAL)]:
            parts = [of[name][kind] for of in self.everything]
            base = oracle = alone = perplexity(parts[0].base_N)
            if own is not None:
                oracle, alone = (
                    perplexity(joint.alone(arrays[own], parts[own])) for arrays in (olds, gates)
                )
            three = {"as_they_are": olds, "offsets": moved, "together": gates}
            by_gates = {k: perplexity(joint.together(v, parts)) for k, v in three.items()}
            found.append(
                {
                    **columns(self.first.pair),
                    "memories": " ".join(self.domains),
                    "text": kind if own is None else name,
                    "tokens": len(parts[0].base_N),
                    "base": base,
                    "oracle": oracle,
                    **by_gates,
                    "gap": by_gates["together"] / oracle - 1,
                    "alone": alone,
                }
            )
        return found


def with_offsets(
    gates: Sequence[dict[str, np.ndarray]],
    scored: Sequence[dict[str, Scored]],
    kinds: dict[str, float],
) -> list[dict[str, np.ndarray]]:
    """Return gates with numbers added to their scores, those that are best together."""
    parts = [[of[kind] for kind in kinds] for of in scored]
    base_N, *memories = (
        torch.from_numpy(np.concatenate(column))
        for column in ([p.base_N for p in parts[0]], *([p.memory_N for p in of] for of in parts))
    )
    with torch.inference_mode():
        each = [
            torch.cat([joint.scores(arrays, part) for part in of])
            for arrays, of in zip(gates, parts, strict=True)
        ]
    each = [score_N.clone() for score_N in each]
    weight_N = torch.cat([w * even(scored[0][k].position_N) for k, w in kinds.items()]).double()
    offset_K = torch.zeros(len(gates), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([offset_K], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        moved = [score_N + offset for score_N, offset in zip(each, offset_K, strict=True)]
        value = -(weight_N * mixture(base_N, memories, moved, floor=1e-6)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return [
        arrays | {"b2": np.array(arrays["b2"] + float(offset))}
        for arrays, offset in zip(gates, offset_K.detach(), strict=True)
    ]


def accepted(rows: Sequence[dict[str, Any]]) -> bool:
    """Tell whether each text is as near to the oracle as it should be."""
    return all(
        row["gap"] <= WITHIN[GENERAL if row["text"] in domains.GENERAL else "domain"]
        for row in rows
    )


def main() -> None:
    parser = new_parser(__doc__, ("factbook", "law", "finance-60k", "biomedicine"))
    options = parsed(parser)
    if len(options.domains) < 2:
        parser.error("one memory decides alone: give two or more --domains.")
    origin = provenance("torch", "transformers")
    rows = [rounded(row) for row in Together(domains_of(options)).rows()]
    table = WORK / f"quick-{TABLE.name}" if options.quick else TABLE
    replace_rows(table, [row | origin for row in rows], keys=("pair", "budget"))
    for row in rows:
        print("  ".join(str(value) for value in row.values()))
    print(json.dumps({"benchmark": "together", "results": rows, "accepted": accepted(rows)}))
    sys.exit(0 if options.quick or accepted(rows) else 1)


if __name__ == "__main__":
    main()
