"""The rows of vllm_memdec/bases.csv, which `memdec check` and a README read, and tests write."""

import csv

from support.bases import BASES, FAILING

from vllm_memdec.check import TESTED

# The last is one of support/multimodal.py.
NAMES = [*(name for name in BASES if name not in FAILING), "Qwen2.5-VL"]
COLUMNS = ("architecture", "name", "kind", "dtype", "error", "drafts", "note", "on_cpu")


def rows():
    """Return the rows by the name of the base."""
    with TESTED.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def kind_of(model):
    """Return what a ModelConfig of vLLM's is, in words."""
    kinds = {
        "multimodal": model.is_multimodal_model,
        "hybrid": model.is_hybrid,
        "mixture of experts": model.is_moe,
    }
    return ", ".join(kind for kind, is_so in kinds.items() if is_so) or "dense"


def drafts_of(answer):
    """Return what a row says of drafts, from what `memdec check` says of them."""
    if answer == "work":
        return "works"
    return "refused on a CPU" if "vLLM on a CPU" in answer else answer.partition(":")[0]


def compare(name, columns):
    """Fail unless the row of a base says this; how far it was off differs between machines."""
    row = rows().get(name, {})
    exact = {column: value for column, value in columns.items() if column != "error"}
    assert {column: row.get(column) for column in exact} == exact, f"{name}: run `make bases`"


def write(path, noted):
    """Write the rows, those of bases that no test noted anything of as they were."""
    before = rows()
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for name in NAMES:
            if row := before.get(name, {}) | noted.get(name, {}):
                writer.writerow({"drafts": "not run"} | row | {"name": name})
