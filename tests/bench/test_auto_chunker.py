"""Is a graph that inductor's auto-chunker leaves whole said to be so?  pytest tests/bench/test_auto_chunker.py

torch.compile is stood in for: compiling a graph that is large enough to be cut takes longer than all tests here.
"""

import pytest
import torch
from torch._inductor import metrics

from esr_kernels.testing.cases import Shape
from esr_kernels.testing.inputs import make_linear_inputs, make_upstream

SHAPE = Shape(5, 67, 9, 11)


@pytest.fixture
def compiled_calls(monkeypatch):
    """The options of each torch.compile, which cuts, or does not, at the first call."""

    def install(*, cuts):
        calls = []

        def compile(function, *, backend, dynamic, fullgraph, options):
            calls.append({"backend": backend, "dynamic": dynamic, "fullgraph": fullgraph, **options})
            is_new = [True]

            def call(*tensors):
                metrics.num_auto_chunking += cuts and is_new.pop() if is_new else 0
                return function(*tensors)

            return call

        monkeypatch.setattr(torch, "compile", compile)
        return calls

    before = metrics.num_auto_chunking
    yield install
    metrics.num_auto_chunking = before


def chunked(bench, backend="inductor"):
    function = bench("baselines.pytorch").from_hidden("forward_kl", has_float32_logits=False)
    return bench("baselines.auto_chunker").AutoChunked(function, backend)


@pytest.mark.parametrize("trains_head", [True, False])
def test_the_gradient_of_the_sum_becomes_that_of_each_row(bench, compiled_calls, trains_head):
    calls = compiled_calls(cuts=True)
    inputs, upstream_N = make_linear_inputs(SHAPE), make_upstream(5, seed=3)
    function = chunked(bench)
    baselines = bench("baselines.pytorch")
    eager = baselines.from_hidden("forward_kl", has_float32_logits=False)
    expected = baselines.run_on_hidden(eager, inputs, upstream_N, trains_head=trains_head)
    for _ in range(2):
        results = bench("baselines.auto_chunker").run_auto_chunked(
            function, inputs, upstream_N, trains_head=trains_head
        )
        assert set(results) == {"grad_student_hidden"}
        torch.testing.assert_close(results["grad_student_hidden"], expected["grad_student_hidden"])
    (options,) = calls  # compiled once
    assert options["auto_chunker.enable"] is True and options["fx_graph_cache"] is False
    assert options["auto_chunker.amplify_ratio_threshold"] == 1 and options["fullgraph"] and not options["dynamic"]


def test_the_options_are_those_of_this_torch(bench):
    from torch._inductor import config

    known = config.get_config_copy()
    assert set(bench("baselines.auto_chunker").OPTIONS) <= set(known) and known["auto_chunker.enable"] is False


def test_a_graph_that_is_left_whole_is_not_timed(bench, compiled_calls):
    compiled_calls(cuts=False)
    inputs, function = make_linear_inputs(SHAPE), chunked(bench)
    for _ in range(2):  # and not at the second call either
        with pytest.raises(
            bench("baselines.peers").NotInstalled, match="auto-chunker: torch .* leaves this graph whole"
        ):
            bench("baselines.auto_chunker").run_auto_chunked(function, inputs, make_upstream(5), trains_head=True)


def test_another_backend_or_a_torch_without_it_says_so(bench, monkeypatch):
    inputs, auto_chunker = make_linear_inputs(SHAPE), bench("baselines.auto_chunker")
    not_installed = bench("baselines.peers").NotInstalled
    with pytest.raises(not_installed, match="auto-chunker: the backend must be inductor, got aot_eager"):
        auto_chunker.run_auto_chunked(chunked(bench, "aot_eager"), inputs, make_upstream(5), trains_head=True)
    monkeypatch.delattr(metrics, "num_auto_chunking")
    with pytest.raises(not_installed, match=f"auto-chunker: torch {torch.__version__.split('+')[0]}.* has none"):
        auto_chunker.run_auto_chunked(chunked(bench), inputs, make_upstream(5), trains_head=True)


@pytest.mark.parametrize("makers, index", [("l1_groups", 0), ("l1_groups", 1), ("l2_groups", 0)])
def test_it_is_a_candidate_where_student_and_teacher_are_projected(bench, makers, index):
    ceilings = bench("ceilings").Ceilings(bench("timing").Stopwatch(torch.device("cpu")), is_smoke=True)
    group = getattr(bench("cases.linear_cases"), makers)(bench("cases.settings").smoke_settings(), ceilings)[index]()
    (candidate,) = [one for one in group.candidates if one.name.startswith("auto-chunker")]
    assert candidate.facts["scalar_loss"] is True and not candidate.is_ours
