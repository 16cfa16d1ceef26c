"""How far may the rollouts of each step run?  pytest tests/distill/test_horizon_schedule.py"""

import json

import pytest

from esr_distill.config import HorizonScheduleConfig
from esr_distill.horizon_schedule import HorizonSchedule
from esr_distill.input_error import InputError

# By hand: the horizons of steps 0, 1, 2, ... with rollout.horizon 200 and 10 steps.
TABLES = {
    "fixed": (HorizonScheduleConfig(), [200] * 10),
    # 1 + floor(199 s / 10)
    "linear": (HorizonScheduleConfig("linear", start=1), [1, 20, 40, 60, 80, 100, 120, 140, 160, 180]),
    # min(200, 50 + 60 floor(s / 3))
    "stairs": (
        HorizonScheduleConfig("stairs", start=50, increment=60, every=3),
        [50, 50, 50, 110, 110, 110, 170, 170, 170, 200],
    ),
    "fraction": (HorizonScheduleConfig("fraction", fraction=0.251), [51] * 10),
    # 0.55 of 200 is 110, whatever 0.55 is in binary
    "a fraction that is a whole number": (HorizonScheduleConfig("fraction", fraction=0.55), [110] * 10),
    "a start above the horizon": (HorizonScheduleConfig("stairs", start=500, increment=1, every=1), [200] * 10),
}


@pytest.mark.parametrize("table", TABLES)
def test_horizons_by_hand(table):
    config, expected = TABLES[table]
    schedule = HorizonSchedule(config, 200, 10)
    horizons = []
    for step in range(10):
        horizons.append(schedule.horizon(step))
        schedule.observe({"late_agreement": 0.0})  # moves none of these
    assert horizons == expected


def adaptive(agreements: list[float | None], start: int = 20, increment: int = 15, largest: int = 60) -> list[int]:
    schedule = HorizonSchedule(
        HorizonScheduleConfig("adaptive", start=start, increment=increment, agreement=0.8), largest, 100
    )
    horizons = []
    for step, agreement in enumerate(agreements):
        schedule.observe({"late_agreement": agreement})
        horizons.append(schedule.horizon(step + 1))
    return horizons


def test_an_adaptive_horizon_grows_while_the_models_agree_and_stops_at_the_largest():
    assert adaptive([0.9, 0.9, 0.9, 0.9]) == [35, 50, 60, 60]


def test_it_stays_within_the_margin_below_the_wanted_agreement_and_shrinks_under_that():
    # means 0.9, 0.81, 0.779, 0.7611, 0.68499: grows twice, stays above 0.75 twice, shrinks
    assert adaptive([0.9, 0.0, 0.5, 0.6, 0.0]) == [35, 50, 50, 50, 35]


def test_it_never_shrinks_under_its_start():
    assert adaptive([0.7, 0.7]) == [20, 20]
    # means 0.9, 0.81, 0.729, 0.6561: grows, grows, shrinks, shrinks
    assert adaptive([0.9, 0.0, 0.0, 0.0, 0.0]) == [35, 50, 35, 20, 20]


def test_steps_in_which_nothing_came_so_far_change_nothing():
    assert adaptive([0.9, None, None, 0.9]) == [35, 35, 35, 50]


def test_a_schedule_goes_on_from_its_state():
    """As at the end of the list above: without the mean, 0.5 alone would shrink it to 35."""
    config = HorizonScheduleConfig("adaptive", start=20, increment=15, agreement=0.8)
    first, second = (HorizonSchedule(config, 60, 100) for _ in range(2))
    for agreement in (0.9, 0.0):
        first.observe({"late_agreement": agreement})
    assert first.state == {"horizon": 50, "agreement": pytest.approx(0.81)}
    second.restore(json.loads(json.dumps(first.state)))
    second.observe({"late_agreement": 0.5})
    assert second.horizon(3) == 50 and second.state["agreement"] == pytest.approx(0.779)
    assert HorizonSchedule(HorizonScheduleConfig(), 60, 100).state is None


def test_records_are_observed_again_where_all_are_there():
    schedule = HorizonSchedule(HorizonScheduleConfig("adaptive", start=20, increment=15, agreement=0.8), 60, 100)
    records = [{"step": step + 1, "late_agreement": value} for step, value in enumerate([0.9, 0.9, 0.0])]
    for wrong in (records[1:], records[:2], []):
        with pytest.raises(InputError, match=rf"must hold the steps 1 to 3 .* got {len(wrong)} of them"):
            schedule.observe_again(wrong, 3)
    schedule.observe_again(records, 3)
    assert schedule.horizon(3) == 60 and schedule.state["agreement"] == pytest.approx(0.81)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "stairs", "start": 5}, r"horizon\.increment must be set for horizon\.kind stairs, got None"),
        ({"kind": "fixed", "start": 5}, r"horizon\.start must be unset for horizon\.kind fixed, got 5"),
        ({"kind": "fraction", "fraction": 1.5}, r"horizon\.fraction must be above 0 and at most 1, got 1\.5"),
        ({"kind": "linear", "start": 0}, r"horizon\.start must be >= 1, got 0"),
    ],
)
def test_wrong_schedules_are_errors(fields, message):
    with pytest.raises(InputError, match=message):
        HorizonScheduleConfig(**fields)
