"""What a device multiplies in: bfloat16 where it has such products, else float32."""

import pytest
import torch

from vllm_memdec.train.model.devices import product_dtype, tell_dtype
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.training.steps import autocast_to

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["without bfloat16", "with bfloat16"])
def has_products(request, monkeypatch):
    monkeypatch.setattr(
        torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: request.param, raising=False
    )
    return request.param


def test_products_are_of_what_the_device_has(has_products, capsys):
    chosen = torch.bfloat16 if has_products else torch.float32
    assert product_dtype("bfloat16", CPU) is chosen
    assert product_dtype("bfloat16", torch.device("cuda")) is torch.bfloat16
    assert product_dtype("float32", CPU) is torch.float32
    with autocast_to("bfloat16", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is chosen
    told: list[str] = []
    tell_dtype(["bfloat16", "float32", "bfloat16"], told.append)
    assert len(told) == (0 if has_products or torch.cuda.is_available() else 1)


def test_weights_are_those_of_the_dtype(has_products, tiny_model):
    """A float32 model of bfloat16's weights rounds nothing else."""
    exact, rounded = (load_model(tiny_model("llama"), d, CPU) for d in ("float32", "bfloat16"))
    assert rounded.dtype is (torch.bfloat16 if has_products else torch.float32)
    pairs = zip(exact.parameters(), rounded.parameters(), strict=True)
    assert all(torch.equal(a.to(torch.bfloat16).float(), b.float()) for a, b in pairs)
    # The angles of rotary positions, which bfloat16 would turn by a radian at position 2,000.
    buffers = [*zip(exact.buffers(), rounded.buffers(), strict=True)]
    assert buffers and all(torch.equal(a, b) and b.dtype == a.dtype for a, b in buffers)
