"""Is every position in one bin, and each mean that of its bin?  pytest tests/distill/test_position_bins.py"""

import math

import torch

from esr_distill.monitoring.position_bins import bin_names, count_by_position, means_by_position


def test_bins_by_hand():
    slots = [0, 4, 5, 9, 10, 24, 25, 49, 99, 100, 199, 2000, 5000]
    values = [1.0, 3.0, 2.0, 4.0, 10.0, 20.0, 7.0, 9.0, 6.0, 1.0, 2.0, 5.0, 7.0]
    assert means_by_position({"value": torch.tensor(values)}, torch.tensor(slots))["value"] == {
        "0-4": 2.0,
        "5-9": 3.0,
        "10-24": 15.0,
        "25-49": 8.0,
        "50-99": 6.0,
        "100-199": 1.5,
        "2000+": 6.0,
    }
    assert count_by_position(torch.tensor(slots)) == {
        "0-4": 2,
        "5-9": 2,
        "10-24": 2,
        "25-49": 2,
        "50-99": 1,
        "100-199": 2,
        "2000+": 2,
    }


def test_several_values_share_their_bins():
    slot_N = torch.tensor([3, 60, 2])
    values = {"a": torch.tensor([1.0, 5.0, 2.0], requires_grad=True), "b": torch.tensor([1.0, math.inf, 0.0])}
    assert means_by_position(values, slot_N) == {"a": {"0-4": 1.5, "50-99": 5.0}, "b": {"0-4": 0.5, "50-99": math.inf}}


def test_every_slot_is_in_one_bin():
    slots = torch.arange(2500)
    total = 0
    for name in means_by_position({"one": torch.ones(2500)}, slots)["one"]:
        first, _, last = name.rstrip("+").partition("-")
        total += (int(last) if last else 2499) - int(first) + 1
    assert total == sum(count_by_position(slots).values()) == 2500
    assert list(count_by_position(slots)) == bin_names()


def test_no_position():
    nothing = torch.zeros(0, dtype=torch.long)
    assert means_by_position({"a": torch.zeros(0)}, nothing) == {"a": {}}
    assert count_by_position(nothing) == {}
