"""The weight's way from extra_args into rows of bfloat16 and back, without an engine."""

import pytest
import torch

from vllm_memdec.state import Batch, Choices, check_extra_args, decode, encode, request_alpha


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_float32_weight_survives(dtype):
    alpha_B = torch.cat(
        [torch.tensor([0.0, 1.0, 0.3, 0.6, 0.37, 1e-3, 1 - 2**-24]), torch.rand(10000)]
    )
    assert torch.equal(decode(encode(alpha_B, dtype)), alpha_B)


@pytest.mark.parametrize("hidden", [64, 160, 100, 7])
def test_rows(hidden):
    """Each request's tokens get its weight, and rows stay a multiple of 8 elements long."""
    rows = AlphaRows(hidden, max_tokens=16, dtype=torch.bfloat16, device="cpu")
    assert (hidden + rows.columns_TA.shape[1]) % 8 == 0
    buffer = rows.columns_TA.data_ptr()
    rows.write(torch.tensor([0.3, 1.0, 0.0]), torch.tensor([2, 1, 3]))
    expected = torch.tensor([0.3, 0.3, 1, 0, 0, 0] + 10 * [0.0])
    assert torch.equal(decode(rows.columns_TA), expected)
    rows.write(torch.tensor([0.6]), torch.tensor([1]))
    assert decode(rows.columns_TA)[:2].tolist() == torch.tensor([0.6, 0.3]).tolist()
    assert rows.columns_TA.data_ptr() == buffer, "a captured graph would read the old one"


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), float("inf"), "0.3", True, None, [0.3]])
def test_bad_weights_are_refused(value):
    with pytest.raises(ValueError, match="memdec_alpha must be a number between 0 and 1"):
        check_extra_args({"memdec_alpha": value}, serving=True)


def test_other_arguments():
    check_extra_args(None, serving=True)
    check_extra_args({"other": "x", "memdec_alpha": 1}, serving=True)
    check_extra_args({"other": "x"}, serving=False)
    with pytest.raises(ValueError, match="'memdec_apha': did you mean 'memdec_alpha'"):
        check_extra_args({"memdec_apha": 0.3}, serving=True)
    with pytest.raises(ValueError, match="runs without a memory"):
        check_extra_args({"memdec_alpha": 0.3}, serving=False)
    assert request_alpha(None, 0.6) == request_alpha({"other": 1}, 0.6) == 0.6
    assert request_alpha({"memdec_alpha": 0}, 0.6) == 0.0
