"""Does the emulated device run right kernels right, in every order of threads, and report what is wrong in wrong ones?

python -m pytest tests/csrc/test_emulator.py
"""

import pytest
from emulated import Build, EmulationFailed, Order, run_program, start_builds

ORDERS = [(Order.ASCENDING, 0), (Order.DESCENDING, 0), (Order.RANDOM, 1), (Order.RANDOM, 2)]
SYNCHRONISATION, RACE, SANITIZER = 3, 4, 1  # exit statuses


@pytest.fixture(scope="module", autouse=True)
def builds():
    start_builds("planted_kernels", "access_set_check")


def run(name: str, build: Build, order: Order = Order.ASCENDING, seed: int = 0) -> list[float]:
    return [float(line) for line in run_program("planted_kernels", build, name, str(order.value), str(seed)).split()]


def report(name: str, build: Build, status: int, order: Order = Order.ASCENDING, seed: int = 0) -> str:
    with pytest.raises(EmulationFailed) as caught:
        run(name, build, order, seed)
    assert caught.value.status == status, caught.value.report
    return caught.value.report


RIGHT = {
    "sum": [sum(i * i for i in range(256))],
    "positions": [x + 10 * y + 100 * z for z in range(6) for y in range(6) for x in range(8)],
    "global_end": [64],
    "vector": [16 + 49],
    "product": [2**30],
    "count_atomically": [192],
    "count_in_all_types": [384, float(2**64 - 768), 3 * 768, -2 * 768],
    "neighbours": [i % 64 % 3 == 0 for i in range(128)],
    "clear_by_one": [0] * 1000,
    "read_then_write": [5] * 64,
    "next_block": [100 * ((b // 64 + 1) % 4) + 63 - b % 64 for b in range(4 * 64)] * 2,
    "halves": [120] * 16 + [256 * sum(range(16, 32))] * 16,
    "exchange": [3 * (31 - i) for i in range(32)],
    "pass_on": [11],
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("build", Build)
def test_right_kernel_is_right_in_every_order(name, build):
    for order, seed in ORDERS:
        assert run(name, build, order, seed) == RIGHT[name], order


@pytest.mark.parametrize("name, expected", [("sum_without_barrier", "sum"), ("exchange_without_barrier", "exchange")])
def test_some_order_reveals_a_missing_barrier(name, expected):
    results = [run(name, Build.MEMORY, order, seed) == RIGHT[expected] for order, seed in ORDERS]
    assert not all(results)


def test_random_orders_depend_on_their_seed():
    results = {tuple(run("exchange_without_barrier", Build.MEMORY, Order.RANDOM, seed)) for seed in range(4)}
    again = run("exchange_without_barrier", Build.MEMORY, Order.RANDOM, 3)
    assert len(results) == 4 and tuple(again) in results


WRONG_SYNCHRONISATION = {
    "diverge": "divergent barrier: block 0 thread 1 waits at barrier planted_kernels.h:",
    "leave_early": "early exit: block 0 thread 5 has ended, but block 0 thread 0 waits at barrier planted_kernels.h:",
    "leave_cluster": "early exit: block 1 thread 0 has ended, but block 0 thread 0 waits at cluster barrier planted",
    "wait_in_a_circle": "deadlock\n  block 0 thread 0 waits at __syncwarp(0x00010001) planted_kernels.h:",
    "ended_lane": "block 0 thread 7 has ended, but block 0 thread 0 waits for it at __any_sync(0xffffffff) planted_",
    "absent_lane": "but block 0 thread 31, which the mask names, does not exist",
    "outside_mask": "block 0 thread 0 does __shfl_sync(0x000000ff) planted_kernels.h:",
    "mixed_operations": "block 0 thread 16 does __all_sync(0xffffffff) planted_kernels.h:",
    "mixed_with_barrier": "block 0 thread 3 waits at barrier planted_kernels.h:",
}


@pytest.mark.parametrize("name", WRONG_SYNCHRONISATION)
def test_wrong_synchronisation_is_reported(name):
    assert WRONG_SYNCHRONISATION[name] in report(name, Build.MEMORY, SYNCHRONISATION)
    for order, seed in ORDERS:
        report(name, Build.RACES, SYNCHRONISATION, order, seed)


def test_divergent_barrier_is_reported_with_both_lines():
    text = report("diverge", Build.MEMORY, SYNCHRONISATION)
    lines = [int(word.split(":")[1].rstrip(",")) for word in text.split() if word.startswith("planted_kernels.h:")]
    assert len(lines) == 2 and lines[0] == lines[1] + 2


WRONG_MEMORY = {
    "past_shared": "heap-buffer-overflow",
    "past_shared_of_next_rank": "heap-buffer-overflow",
    "past_global": "heap-buffer-overflow",
    "misaligned_vector": "misaligned address",
    "overflow": "signed integer overflow: 64 * 67108864",
    "next_block_too_late": "use-after-poison",
}


@pytest.mark.parametrize("name", WRONG_MEMORY)
def test_wrong_access_is_reported(name):
    text = report(name, Build.MEMORY, SANITIZER)
    assert WRONG_MEMORY[name] in text and "planted_kernels.h:" in text


@pytest.mark.parametrize("name, length", [("shared_end", 1), ("shared_of_next_rank", 2)])
def test_shared_memory_begins_with_a_pattern_and_reaches_to_its_end(name, length):
    assert run(name, Build.MEMORY) == [0xCDCDCDCD - 2**32] * length


RACES = {
    "sum_without_barrier": "shared memory of block 0 at offset",
    "count": "global memory",
    "count_in_blocks": "global memory",
    "read_while_counting": "atomic by",
    "clear_by_all": "write by block 0 thread 1 at planted_kernels.h:",
    "read_then_write_without_barrier": "shared memory of block 0 at offset 0",
    "next_block_too_early": "shared memory of block",
    "next_block_too_late": "end of block",
    "exchange_without_barrier": "read by block 0 thread 15 at planted_kernels.h:",
    "exchange_across_halves": "write by block 0 thread 16 at planted_kernels.h:",
    "exchange_after_shuffle": "shared memory of block 0 at offset",
    "pass_on_with_gap": "write by block 0 thread 0 at planted_kernels.h:",
}


@pytest.mark.parametrize("name", RACES)
def test_race_is_reported_in_every_order(name):
    assert RACES[name] in report(name, Build.RACES, RACE)
    for order, seed in ORDERS[1:]:
        report(name, Build.RACES, RACE, order, seed)


def test_race_detector_agrees_with_vector_clocks():
    run_program("access_set_check", Build.MEMORY, "1", "20000")


def shuffled_lane(operation: int, lane: int, argument: int, width: int) -> int:
    """The lane that is read, by the words of the CUDA C++ programming guide; operations: direct, up, down, xor."""
    group = [other for other in range(32) if other // width == lane // width]
    if operation == 0:
        return group[argument % width]
    if operation == 3:  # a lane of an earlier group may be read, not of a later one
        return lane ^ argument if lane ^ argument <= group[-1] else lane
    source = lane - argument if operation == 1 else lane + argument
    return source if source in group else lane


@pytest.mark.parametrize(
    "name, unit, width",
    [
        ("shuffle_int32", -3, 32),
        ("shuffle_uint32", 100_000_000, 8),
        ("shuffle_int64", -100_000_000_000, 16),
        ("shuffle_uint64", 200_000_000_000, 32),
        ("shuffle_float", 0.25, 4),
    ],
)
def test_shuffles_read_the_lane_that_they_name(name, unit, width):
    expected = [
        unit * shuffled_lane(operation, lane, argument, width)
        for argument in range(32)
        for operation in range(4)
        for lane in range(32)
    ]
    assert run(name, Build.MEMORY) == expected
    assert run(name, Build.RACES, Order.RANDOM, 3) == expected


def test_votes():
    third = sum(1 << lane for lane in range(0, 32, 3))
    first_bits = [lane + 1 for lane in range(32)]
    expected = [third] * 32 + [1] * 32 + [0] * 32 + [0] * 32 + [1] * 32 + first_bits
    for order, seed in ORDERS:
        assert run("votes", Build.MEMORY, order, seed) == expected


def test_launches_that_cuda_refuses():
    success, invalid_value, invalid_configuration, invalid_cluster, not_supported = 0, 1, 9, 912, 801
    assert run("launch_errors", Build.MEMORY) == [
        invalid_value,  # more than 48 KiB without asking
        invalid_value,  # asked for more than the device has
        success,
        success,
        invalid_value,  # more than asked for
        success,
        invalid_configuration,  # more than 1024 threads
        invalid_configuration,  # no blocks
        success,
        invalid_cluster,  # 4 does not divide 6
        invalid_cluster,  # more than 8 blocks
        not_supported,  # clusters before compute capability 9.0
    ]
