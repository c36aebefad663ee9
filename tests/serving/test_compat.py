"""What compat.py reads and wraps in vLLM still looks as it did when it was checked."""

import dataclasses
import importlib
import inspect

import pytest

from vllm_memdec import compat


def find(path):
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", compat.SIGNATURES)
def test_signature(path):
    function = inspect.unwrap(find(path))
    names = list(inspect.signature(getattr(function, "memdec_original", function)).parameters)
    assert names == compat.SIGNATURES[path].split(), (
        f"{path} changed in this vLLM: read it, adapt compat.py, then record the new signature"
    )


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
