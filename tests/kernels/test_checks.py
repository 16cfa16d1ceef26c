"""Do the shared argument checks accept what they should and name op, argument, need and value otherwise?

python -m pytest tests/kernels/test_checks.py
"""

import math

import pytest
import torch

from esr_kernels.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_no_teacher_grad,
    check_positive,
    check_same_device,
    check_tensor,
    check_token_set,
)
from esr_kernels.impl import Impl, check_impl
from esr_kernels.logit_storage import LogitStorage, check_logit_storage


def test_sizes_met_first_bind_the_tensors_that_follow():
    sizes = {}
    check_tensor("op", "hidden", torch.zeros(3, 5), "N D", sizes, FLOAT_DTYPES)
    assert sizes == {"N": 3, "D": 5}
    check_tensor("op", "weight", torch.zeros(7, 5), "V D", sizes, FLOAT_DTYPES)
    assert sizes == {"N": 3, "D": 5, "V": 7}
    with pytest.raises(ValueError, match=r"op: bias must have shape \(V\) = \(7\), got \(8,\)"):
        check_tensor("op", "bias", torch.zeros(8), "V", sizes, FLOAT_DTYPES)
    with pytest.raises(ValueError, match=r"op: ids must have shape \(N, K\) = \(3, K\), got \(3,\)"):
        check_tensor("op", "ids", torch.zeros(3, dtype=torch.int64), "N K", sizes, INTEGER_DTYPES)
    assert sizes == {"N": 3, "D": 5, "V": 7}


@pytest.mark.parametrize("size", [0, 1])
def test_sizes_of_zero_and_one_are_sizes_like_any_other(size):
    sizes = {"N": size}
    check_tensor("op", "rows", torch.zeros(size), "N", sizes, FLOAT_DTYPES)
    with pytest.raises(ValueError, match=rf"op: rows must have shape \(N\) = \({size}\), got \(2,\)"):
        check_tensor("op", "rows", torch.zeros(2), "N", sizes, FLOAT_DTYPES)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (None, r"op: ids must be a tensor \(N\), got NoneType"),
        ([1, 2], r"op: ids must be a tensor \(N\), got list"),
        (torch.zeros(2, dtype=torch.int16), r"op: ids must have dtype int32, int64, got int16"),
    ],
)
def test_wrong_types_and_dtypes_raise(tensor, message):
    with pytest.raises(TypeError, match=message):
        check_tensor("op", "ids", tensor, "N", {}, INTEGER_DTYPES)


def test_devices_must_agree_and_none_is_skipped():
    check_same_device("op", a=torch.zeros(1), b=None, c=torch.zeros(2))
    with pytest.raises(ValueError, match="op: all tensors must be on one device, got a: cpu, c: meta"):
        check_same_device("op", a=torch.zeros(1), b=None, c=torch.zeros(2, device="meta"))


@pytest.mark.parametrize(("value", "expected"), [(1, 1.0), (0.25, 0.25), (1e-300, 1e-300)])
def test_positive_numbers_become_floats(value, expected):
    checked = check_positive("op", "loss_temperature", value)
    assert isinstance(checked, float) and checked == expected


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_numbers_that_are_not_positive_and_finite_raise(value):
    with pytest.raises(ValueError, match=f"op: loss_temperature must be finite and > 0, got {value}"):
        check_positive("op", "loss_temperature", value)


@pytest.mark.parametrize(("value", "name"), [(True, "bool"), ("1", "str"), (None, "NoneType"), ([1.0], "list")])
def test_what_is_no_number_raises(value, name):
    with pytest.raises(TypeError, match=f"op: loss_temperature must be a number > 0, got {name}"):
        check_positive("op", "loss_temperature", value)


def test_teacher_tensors_must_not_require_grad():
    check_no_teacher_grad("op", teacher_hidden=torch.zeros(1), teacher_bias=None)
    with pytest.raises(
        ValueError, match=r"op: teacher_bias must not require grad .* got requires_grad=True; detach it"
    ):
        check_no_teacher_grad("op", teacher_hidden=torch.zeros(1), teacher_bias=torch.zeros(1, requires_grad=True))


@pytest.mark.parametrize(("ids", "expected"), [((), ()), ([3, 1, 3], (1, 3)), ({0, 9}, (0, 9)), (range(2), (0, 1))])
def test_token_sets_are_sorted_and_without_repetition(ids, expected):
    assert check_token_set("op", "stop_ids", ids, 10) == expected


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([10], ValueError, r"op: stop_ids must be in \[0, 10\), got 10"),
        ([2, -1], ValueError, r"op: stop_ids must be in \[0, 10\), got -1"),
        ([1.0], TypeError, r"op: stop_ids must hold ints, got float"),
        ([True], TypeError, r"op: stop_ids must hold ints, got bool"),
        ("12", TypeError, r"op: stop_ids must hold ints, got str"),
        (7, TypeError, r"op: stop_ids must be an iterable of ints, got int"),
        (None, TypeError, r"op: stop_ids must be an iterable of ints, got NoneType"),
    ],
)
def test_wrong_token_sets_raise(ids, error, message):
    with pytest.raises(error, match=message):
        check_token_set("op", "stop_ids", ids, 10)


def test_implementations_are_named_by_member_or_value():
    assert check_impl("op", Impl.REFERENCE) is check_impl("op", "reference") is Impl.REFERENCE
    with pytest.raises(ValueError, match=r"op: impl must be one of \['fused', 'reference'\], got 'torch'"):
        check_impl("op", "torch")


def test_logit_storages_are_named_by_member_or_value():
    assert check_logit_storage("op", "tile_relative_fp16") is LogitStorage.TILE_RELATIVE_FP16
    assert check_logit_storage("op", LogitStorage.AUTO) is LogitStorage.AUTO
    with pytest.raises(ValueError, match=r"op: logits must be one of \['auto', .*\], got 'float16'"):
        check_logit_storage("op", "float16")
