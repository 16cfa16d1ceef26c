"""Can a kernel be imported from a wheel whose other files want what is absent?  pytest tests/bench/test_stubs.py

The trees are laid out as those of the wheels, and each file that must not be run raises.
"""

import importlib.util
import sys

import pytest

MUST_NOT_RUN = "import a_package_that_is_not_there"
# Where the wheels import ray, tensordict, omegaconf, datasets and pandas
VERL = {
    "verl/__init__.py": MUST_NOT_RUN,
    "verl/utils/__init__.py": MUST_NOT_RUN,
    "verl/utils/device.py": "def get_device_name(): return 'of the wheel'",
    "verl/utils/kernel/__init__.py": "",
    "verl/utils/kernel/kernels.py": "from verl.utils.device import get_device_name\nname = get_device_name()",
    "verl/utils/kernel/linear_cross_entropy.py": "def linear_cross_entropy():\n"
    "    from . import kernels\n"
    "    return kernels.name",
    "verl/trainer/__init__.py": MUST_NOT_RUN,
    "verl/trainer/distillation/__init__.py": MUST_NOT_RUN,
    "verl/trainer/distillation/fsdp/__init__.py": MUST_NOT_RUN,
    "verl/trainer/distillation/fsdp/losses.py": "from verl.workers.config import DistillationConfig, DistillationLossConfig\n"
    "def compute_forward_kl_topk(config: DistillationConfig): return 'top-k'",
    "verl/workers/__init__.py": "",
    "verl/workers/config/__init__.py": MUST_NOT_RUN,
}
TRL = {
    "trl/__init__.py": "ran = True",
    "trl/kernels/__init__.py": "from .chunked_logprob import ChunkedLogProbFunction",
    "trl/kernels/chunked_logprob.py": "class ChunkedLogProbFunction: pass",
    "trl/kernels/chunked_divergence.py": "from ..trainer.utils import maybe_gather_lm_head_ctx as context\n"
    "class ChunkedDivergenceFunction: pass",
    "trl/trainer/__init__.py": "",
    "trl/trainer/utils.py": MUST_NOT_RUN,
}
WITH_EVERYTHING = {**TRL, "trl/trainer/utils.py": "def maybe_gather_lm_head_ctx(*parameters): return 'of the wheel'"}


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Lay out a tree; whatever of it is imported is forgotten afterwards."""

    def loaded():
        return {name for name in sys.modules if name.split(".")[0] in ("trl", "verl")}

    for name in loaded():
        monkeypatch.delitem(sys.modules, name)

    def install(tree):
        for name, text in tree.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    for name in loaded():
        del sys.modules[name]


def test_verls_kernels_run_without_its_packages(bench, installed, caplog):
    installed(VERL)
    peers = bench("baselines.peers")
    before = set(sys.modules)
    function = peers.imported("verl", "verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    assert function() == "of the wheel"
    assert caplog.records == []  # nothing stands in: only `__init__` files were left out
    topk = peers.imported("verl", "verl.trainer.distillation.fsdp.losses", "compute_forward_kl_topk")
    assert topk(None) == "top-k"
    (record,) = caplog.records
    assert record.getMessage() == (
        "verl.workers.config cannot be imported: a stand-in has DistillationConfig, DistillationLossConfig"
    )
    assert {name.split(".")[0] for name in set(sys.modules) - before} == {"verl"}


def test_trls_kernels_run_without_its_trainers(bench, installed, caplog):
    installed(TRL)
    peers = bench("baselines.peers")
    before = set(sys.modules)
    divergence = peers.imported("TRL", "trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    context = sys.modules[divergence.__module__].context
    with context(None, None) as nothing:
        assert nothing is None
    assert sys.modules["trl"].ran  # no package is hollow
    assert peers.imported("TRL", "trl.trainer.utils", "maybe_gather_lm_head_ctx") is context
    assert [record.getMessage() for record in caplog.records] == [
        "trl.trainer.utils cannot be imported: a stand-in has maybe_gather_lm_head_ctx"
    ]
    assert {name.split(".")[0] for name in set(sys.modules) - before} == {"trl"}


def test_what_can_be_imported_is_not_stood_in_for(bench, installed, caplog):
    installed(WITH_EVERYTHING)
    bench("baselines.peers").imported("TRL", "trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    assert sys.modules["trl.kernels.chunked_divergence"].context() == "of the wheel" and caplog.records == []


def test_packages_outside_of_the_project_are_never_stood_in_for(bench, installed):
    installed(VERL | TRL)
    stubs = bench("baselines.stubs")
    for module in stubs.BARE:
        stubs.import_bare(module)
    for bare in stubs.BARE.values():
        assert {name.split(".")[0] for name in (*bare.hollow, *bare.stand_ins)} <= {"trl", "verl"}
    assert importlib.util.find_spec("a_package_that_is_not_there") is None
    assert importlib.util.find_spec("trl.trainer.utils") is not None  # asked for, a stand-in answers


@pytest.mark.parametrize("module", ["verl.utils.kernel.kernels", "trl.kernels.chunked_divergence", "trl.trainer.utils"])
def test_a_project_that_is_not_there_is_not_installed(bench, installed, monkeypatch, module):
    project = module.split(".")[0]
    monkeypatch.setitem(sys.modules, project, None)
    with pytest.raises(bench("baselines.peers").NotInstalled, match=f"^peer: .*{project}"):
        bench("baselines.peers").imported("peer", module, "anything")
    assert not [name for name in sys.modules if name.startswith(f"{project}.")]


def test_a_name_that_the_module_lacks_is_not_installed(bench, installed):
    installed(TRL)
    with pytest.raises(bench("baselines.peers").NotInstalled, match="^TRL: "):
        bench("baselines.peers").imported("TRL", "trl.kernels.chunked_divergence", "Another")


def test_only_named_modules_come_from_a_bare_wheel(bench, installed):
    installed(VERL)
    with pytest.raises(ImportError, match="verl.protocol must be among .*verl.utils.kernel.kernels.* to be imported"):
        bench("baselines.stubs").import_bare("verl.protocol")
    with pytest.raises(bench("baselines.peers").NotInstalled, match="^verl: No module named 'a_package_that_is_not"):
        bench("baselines.peers").imported("verl", "verl.workers.config", "DistillationConfig")


SOURCE = f"""
{MUST_NOT_RUN}

def double(x): return factor * x

class Trainer(a_package_that_is_not_there.Trainer):
    @staticmethod
    @a_package_that_is_not_there.decorated
    def loss(x, beta=3): return beta * double(x)
"""


def test_a_function_is_taken_from_a_source_that_is_not_run(bench, installed):
    installed({"verl/__init__.py": MUST_NOT_RUN, "verl/inner/__init__.py": MUST_NOT_RUN, "verl/inner/file.py": SOURCE})
    function_in_source = bench("baselines.stubs").function_in_source
    double = function_in_source("verl.inner.file", "double", {"factor": 2})
    loss = function_in_source("verl.inner.file", "Trainer.loss", {"double": double})
    assert (double(5), loss(5), loss(5, beta=1)) == (10, 30, 10)
    assert not [name for name in sys.modules if name.split(".")[0] == "verl"]
    for name in ("Trainer", "Trainer.other", "loss", "double.x"):
        with pytest.raises(ImportError, match=f"cannot find function '{name}' in file.py of 'verl.inner.file'"):
            function_in_source("verl.inner.file", name, {})
    with pytest.raises(ImportError, match="No module named 'verl.inner.other'"):
        function_in_source("verl.inner.other", "double", {})
    with pytest.raises(ImportError, match="No module named 'a_package_that_is_not_there'"):
        function_in_source("a_package_that_is_not_there.inner", "double", {})
