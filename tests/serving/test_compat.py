"""What compat.py reads and wraps in vLLM still looks as it did when it was checked.

python tests/serving/test_compat.py      # prints the source of it all: see `make diff-next`
"""

import dataclasses
import importlib
import inspect

import pytest
from packaging.version import Version

from vllm_memdec import compat, plugin


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


@pytest.mark.parametrize("path", compat.SIGNATURES)
def test_signature(path, release):
    recorded = (compat.SIGNATURES | compat.CHANGED.get(release, {}))[path]
    assert list(inspect.signature(original(path)).parameters) == recorded.split(), (
        f"{path} changed in this vLLM: read it, adapt compat.py, then record the new signature"
    )


@pytest.mark.parametrize("later", compat.CHANGED)
def test_only_differences_are_recorded_as_changed(later):
    assert plugin.OLDEST < later < plugin.BELOW
    for path, signature in compat.CHANGED[later].items():
        assert signature != compat.SIGNATURES[path], f"{path} did not change in {later}"


@pytest.mark.parametrize("path", compat.ATTRIBUTES)
def test_attributes(path):
    """A name that vanishes from a class's source vanished from its instances."""
    owner = find(path)
    sources = "\n".join(inspect.getsource(c) for c in owner.__mro__ if c.__module__[:4] == "vllm")
    known = (
        {f.name for f in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else set()
    )
    known |= {*dir(owner), *getattr(owner, "__struct_fields__", ())}
    for name in compat.ATTRIBUTES[path].split():
        assert name in known or f"self.{name}" in sources, (
            f"{path} has no {name} in this vLLM: read it and adapt compat.py"
        )


def test_every_field_of_the_attention_metadata_is_known():
    """A field that vLLM adds may be one that a memory's part must narrow."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    fields = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    assert fields == {*compat.NARROWED, *compat.NOT_NARROWED}


if __name__ == "__main__":
    for path in compat.SIGNATURES:
        print(f"# {path}\n{inspect.getsource(original(path))}")
