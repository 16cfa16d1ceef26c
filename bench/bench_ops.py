"""Times of the fused ops on a GPU, each behind its correctness gate, against what torch offers and the peers.

python -m pytest bench/bench_ops.py                             # results to bench/results and the GPU's name
python -m pytest bench/bench_ops.py --cases K1,L1 --benchmark-json before.json
python -m pytest bench/bench_ops.py --cases tiles,slices
TRITON_INTERPRET=1 python -m pytest bench/bench_ops.py --smoke  # results to runs/bench-smoke

A test is one group of candidates that compute the same thing: gate, first call, memory, then time in turns. It fails where one of
our own rows was refused or failed. Cases, in bench/cases: K1 to K3 logit_cases.py, L1 to L5 and L7 linear_cases.py, L6
topk_cases.py, B1 to B4 prefix_cases.py, C1 to C3 sampler_cases.py, C4 head_cases.py, and sweeps.py. After each group the result
file is written whole: a run that is killed keeps what it has measured. What pytest-benchmark saves (`--benchmark-json`,
`--benchmark-autosave`) holds the same samples, for `pytest-benchmark compare`.

--smoke runs every case on a CPU, the kernels in Triton's interpreter and the sampler natively, on tiny shapes, to prove that
all run and all gates hold. Its times mean nothing and it writes nowhere under bench/results.
"""

import pytest

from bench.ops_run import our_failures
from bench.reports.ops_report import measured


def test_group(case, make_group, run, device_benchmark, say):
    rows = run.measure(case, make_group)
    for row in rows:
        say(summary_line(row))
        if row["status"] == "timed":
            device_benchmark(row)
    failures = our_failures(rows)
    if failures:
        pytest.fail("\n".join(summary_line(row) for row in failures), pytrace=False)


def summary_line(row: dict) -> str:
    size = f"B {row['B']}" if "B" in row else f"N {row['N']}"
    setting = f"{row['case']:>6} {measured(row):<29} {row['dtype']:<8} {row['pass']:<22} {size:<8}"
    line = f"{setting} {row['implementation']:<44}"
    if row["status"] != "timed":
        return f"{line} {row['status']}: {row['message'].splitlines()[0]}"
    line += f" {row['median_ms']:10.4f} ms"
    if "ratio_to_products" in row:
        return f"{line}  {row['ratio_to_products']:.3f} x bare products"
    return f"{line}  {row['gb_per_s']:.0f} GB/s, {row['share_of_copy']:.0%} of copy"
