"""What the seams of compat/ read and wrap in vLLM still looks as it did when it was checked.

python tests/serving/test_compat.py      # prints the source of it all: see `make diff-next`
"""

import ast
import contextlib
import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest
from packaging.version import Version

from vllm_memdec import compat, plugin

FOLDER = Path(compat.__file__).parent
# hooks.py knows nothing of vLLM.
SEAMS = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "hooks"))


def parsed(seam):
    return ast.parse((FOLDER / f"{seam}.py").read_text())


def constants(seam):
    """Return the constants of a seam, which is not imported: what it imports may be gone."""
    names = {}
    for node in parsed(seam).body:
        if isinstance(node, ast.Assign):
            with contextlib.suppress(NameError):
                exec(compile(ast.Module([node], []), seam, "exec"), names)
    return names


def collected(name):
    """Return the records of all seams in one; two may record attributes of one class."""
    merged = {}
    for seam in SEAMS:
        for symbol, recorded in constants(seam).get(name, {}).items():
            if name == "ATTRIBUTES":
                recorded = " ".join(dict.fromkeys(f"{merged.get(symbol, '')} {recorded}".split()))
            assert name == "ATTRIBUTES" or symbol not in merged, f"{seam} records {symbol} again"
            merged[symbol] = recorded
    return merged


SIGNATURES, CHANGED, ATTRIBUTES = map(collected, ("SIGNATURES", "CHANGED", "ATTRIBUTES"))


def find(path):
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def original(path):
    """Return a function or class of vLLM's as vLLM wrote it, without our wrapper."""
    function = inspect.unwrap(find(path))
    return getattr(function, "memdec_original", function)


@pytest.fixture(scope="module")
def release():
    import vllm

    return Version(vllm.__version__).release[:2]


@pytest.mark.parametrize("name", SEAMS)
def test_every_seam_has_its_record(name):
    """And a docstring that says when it may go and what it relies on."""
    record = constants(name)
    assert record.get("SIGNATURES"), f"{name}.py has no SIGNATURES"
    text = ast.get_docstring(parsed(name))
    for begin in ("May go ", "Relies on "):
        assert f"\n{begin}" in text, f"no line of {name}.py's docstring begins {begin!r}"
    known = [symbol.partition(":")[2] for symbol in record["SIGNATURES"]]
    for symbol, attributes in record.get("ATTRIBUTES", {}).items():
        known += [f"{symbol.partition(':')[2]}.{each}" for each in attributes.split()]
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "wrap":
            owner, wrapped = ast.unparse(node.args[0]), ast.literal_eval(node.args[1])
            assert {f"{owner}.{wrapped}", wrapped} & {*known}, f"{owner}.{wrapped} is not recorded"


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path, release):
    recorded = (SIGNATURES | CHANGED.get(release, {}))[path]
    assert list(inspect.signature(original(path)).parameters) == recorded.split(), (
        f"{path} changed in this vLLM: read it, adapt its seam, then record the new signature"
    )


@pytest.mark.parametrize("later", CHANGED)
def test_only_differences_are_recorded_as_changed(later):
    assert plugin.OLDEST < later < plugin.BELOW
    for path, signature in CHANGED[later].items():
        assert signature != SIGNATURES[path], f"{path} did not change in {later}"


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_attributes(path):
    """A name that vanishes from a class's source vanished from its instances."""
    owner = find(path)
    sources = "\n".join(inspect.getsource(c) for c in owner.__mro__ if c.__module__[:4] == "vllm")
    known = (
        {f.name for f in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else set()
    )
    known |= {*dir(owner), *getattr(owner, "__struct_fields__", ())}
    for name in ATTRIBUTES[path].split():
        assert name in known or f"self.{name}" in sources, (
            f"{path} has no {name} in this vLLM: read it and adapt its seam"
        )


def test_every_field_of_the_attention_metadata_is_known():
    """A field that vLLM adds may be one that a memory's share must narrow."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    fields = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    recorded = constants("attention")
    assert fields == {*recorded["NARROWED"], *recorded["NOT_NARROWED"]}


if __name__ == "__main__":
    for path in SIGNATURES:
        print(f"# {path}\n{inspect.getsource(original(path))}")
