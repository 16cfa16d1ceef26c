"""Does the native sampler on a CPU give the reference's tokens and log-probs bit for bit, whatever the rows are?

python -m pytest tests/kernels/test_sample_tokens_native.py
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from esr_kernels import Impl, SamplerState, sample_tokens
from esr_kernels.sample_tokens import native
from esr_kernels.testing.sampler_inputs import assert_same_states, mixed_rows, mixed_state

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="built with a C++ compiler")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(3000, 2), (2000, 33), (1200, 1000), (360, 4099), (18, 151_936)])
def test_same_bits_as_the_reference_on_mixed_rows(dtype, num_rows, vocab_size):
    states = [mixed_state(num_rows, vocab_size, 2, torch.Generator().manual_seed(vocab_size)) for _ in Impl]
    generator = torch.Generator().manual_seed(num_rows)
    for _ in range(2):
        logits = mixed_rows(num_rows, vocab_size, generator).to(DTYPES[dtype])
        for impl, state in zip(Impl, states, strict=True):
            sample_tokens(logits, state, impl=impl)
    assert_same_states(*states)
    if vocab_size > 2:
        assert len(states[0].token_ids_B_K.unique()) > min(vocab_size, num_rows) // 4
        assert 0 < int(states[0].invalid_B.sum()) < num_rows // 6


def test_rows_that_are_strided_or_unaligned():
    """Rows of a larger tensor, one that starts at an odd element, and columns that are not adjacent."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(40, 3, 131, generator=generator).bfloat16()
    for logits in (wide[:, 1, 3:130], wide[:, 2], wide[:, :, 5], wide[:1, 0].expand(40, -1)):
        states = [mixed_state(40, logits.shape[1], 1, torch.Generator().manual_seed(1)) for _ in Impl]
        for impl, state in zip(Impl, states, strict=True):
            sample_tokens(logits, state, impl=impl)
        assert_same_states(*states)


def test_operator_passes_opcheck_and_compiles():
    native.load_native_sampler("cpu")
    state = SamplerState.create(3, 2, eos_ids=[1])
    tensors = [getattr(state, name) for name in native._STATE_TENSORS]
    operator = torch.ops.esr_kernels.sample_tokens.default
    torch.library.opcheck(operator, (torch.randn(3, 50), *tensors, 0))

    states = [SamplerState.create(3, 2, eos_ids=[1], top_k=5) for _ in range(2)]
    logits = torch.randn(3, 50)
    torch.compile(lambda z: sample_tokens(z + 1, states[0]), fullgraph=True, backend="aot_eager")(logits)
    sample_tokens(logits + 1, states[1])
    assert_same_states(*states)


def test_wrong_tensors_are_refused_by_the_operator():
    native.load_native_sampler("cpu")
    state = SamplerState.create(3, 2, eos_ids=[1])
    state.lengths_B = state.lengths_B.int()
    with pytest.raises(RuntimeError, match="lengths_B must be contiguous"):
        sample_tokens(torch.zeros(3, 50), state)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_library_brings_all_of_torch():
    """libtorch.so, of which it uses no symbol, stands for libtorch_cuda.so, of which the CUDA half does."""
    library = Path(native.__file__).parent / "_sampler_cpu.so"
    report = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "[libtorch.so]" in report and "[libtorch_cpu.so]" in report


def test_missing_library_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(native, "_FOLDER", Path("nowhere"))
    monkeypatch.setattr(native, "_loaded", set())
    with pytest.raises(
        NotImplementedError, match="needs the native sampler for cpu, which is not built; .*pip install"
    ):
        sample_tokens(torch.zeros(1, 4), SamplerState.create(1, 1, eos_ids=()))
    with pytest.raises(NotImplementedError, match="needs tensors on the CPU or a CUDA device, got meta"):
        native.load_native_sampler("meta")
