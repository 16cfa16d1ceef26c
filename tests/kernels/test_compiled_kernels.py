"""Does every kernel compile for every architecture without spilling, and would the check notice one that does not?

python tests/kernels/compiled_kernels.py    prints the table alone
"""

import ast
import re
import sys
from pathlib import Path

import pytest
from compiled_kernels import ROOT, SHARED_LIMIT, KernelFigures, compile_table, format_table, ptxas_figures, widest_load

import esr_kernels

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux only")


@pytest.fixture(scope="module")
def library() -> list[KernelFigures]:
    return compile_table()


@pytest.fixture(scope="module")
def planted() -> dict[tuple[str, int], KernelFigures]:
    figures = compile_table(Path(__file__).with_name("planted_kernels.py"))
    return {(entry.variant, entry.capability): entry for entry in figures}


def launched_kernels(root: Path) -> set[str]:
    """Names of the jit functions that are launched, kernel[grid](...), anywhere in esr_kernels."""
    jit_functions, launched = set(), set()
    for path in root.glob("esr_kernels/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                jit_functions.add(node.name)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value).split(".")[-1])
    return launched & jit_functions


def test_every_kernel_compiles_without_spills(library, capsys):
    with capsys.disabled():
        print(f"\n{format_table(library)}")
    faults = [entry.fault() for entry in library if entry.fault()]
    assert not faults, "\n".join(faults)
    assert {entry.capability for entry in library} == {80, 90, 100}


def test_every_launched_kernel_is_in_the_table(library):
    assert launched_kernels(ROOT) == {entry.kernel for entry in library}


def test_every_divergence_is_in_the_table(library):
    variants = " ".join(entry.variant for entry in library)
    divergences = [name for name in esr_kernels.__all__ if name.endswith(("KL", "JSD", "Variation", "AlphaDivergence"))]
    assert len(divergences) == 7
    assert [name for name in divergences if name not in variants] == []


def test_a_kernel_in_order_has_no_fault(planted):
    for capability in SHARED_LIMIT:
        figures = planted["in order", capability]
        assert figures.fault() == ""
        assert figures.kernel == "softmax_kernel"
        # Eight elements per thread; a sum over four warps exchanges four float32.
        assert 12 <= figures.registers <= 64
        assert figures.shared_bytes == 16
        assert figures.spill_store_bytes == figures.spill_load_bytes == figures.stack_bytes == 0


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_a_spilling_kernel_is_found(planted, capability):
    figures = planted["spilling", capability]
    # 64 float32 of a tile per thread, in 32 registers at most.
    assert figures.registers <= 32
    assert figures.spill_store_bytes > 128 and figures.spill_load_bytes > 128 and figures.stack_bytes > 128
    expected = f"spilling on sm_{capability}: spills to local memory with {figures.registers} registers: "
    assert figures.fault().startswith(expected)
    assert f"{figures.spill_store_bytes} bytes stored, {figures.spill_load_bytes} loaded" in figures.fault()


def test_too_much_shared_memory_is_found(planted):
    # Eight or nine tiles of 128 x 128 float16 in flight are 256 KiB or more.
    for capability, limit in ((80, 166912), (90, 232448), (100, 232448)):
        figures = planted["large tiles", capability]
        assert figures.shared_bytes >= 8 * 128 * 128 * 2
        assert f"needs {figures.shared_bytes} bytes of shared memory, the architecture has {limit}" in figures.fault()


@pytest.mark.parametrize(
    "variant, message",
    [
        ("unfinished", "unfinished on sm_90: CompilationError: .*no_such_name is not defined"),
        ("misspelt", r"misspelt on sm_90: ValueError: arguments must be .*; missing \['BLOCK', .*unknown \['x'\]"),
        ("not jitted", "not jitted on sm_90: TypeError: kernel must be a jit function, made without TRITON_INTERPRET"),
        ("wrong value", r"wrong value on sm_90: TypeError: argument scale must be a number, .*, got \(1, 2\)"),
    ],
)
def test_a_kernel_that_does_not_compile_is_found(planted, variant, message):
    fault = planted[variant, 90].fault()
    assert re.match(message, fault, re.DOTALL), fault


def test_figures_are_those_of_the_launch(planted):
    """Alignment and strides of 1 decide whether a thread reads 8 bfloat16 at once or one."""
    bits = {variant: planted[variant, 90].load_bits for variant, _ in planted}
    assert bits["in order"] == bits["launched"] == 128
    assert bits["unaligned"] == bits["launched unaligned"] == 16
    assert bits["odd row"] == bits["strided columns"] == bits["alignment unknown"] == 16
    assert planted["launched", 90].registers == planted["in order", 90].registers


def test_kernels_that_a_launcher_starts_get_names_of_their_own(planted):
    assert planted["launched twice, scale_kernel", 80].kernel == "scale_kernel"
    assert planted["launched twice", 80].kernel == "softmax_kernel"


def test_a_broken_table_is_an_error(tmp_path):
    table = tmp_path / "broken.py"
    table.write_text("from compiled_kernels import launched\nlaunched('nothing', print)\n", encoding="utf-8")
    with pytest.raises(
        RuntimeError, match="(?s)compiler of broken.py ended with status 1.*nothing: no kernel was launched"
    ):
        compile_table(table)


def test_ptxas_figures_are_read():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'f' for 'sm_90a'
ptxas info    : Function properties for f
    104 bytes stack frame, 96 bytes spill stores, 124 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 104 bytes cumulative stack size
ptxas info    : Function properties for g
    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
"""
    assert ptxas_figures(log) == {
        "registers": 168, "stack_bytes": 104, "spill_store_bytes": 100, "spill_load_bytes": 124,
    }  # fmt: skip
    with pytest.raises(ValueError, match="ptxas reported no registers"):
        ptxas_figures("")


@pytest.mark.parametrize(
    "ptx, bits",
    [
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];\nld.global.b16 %rs1, [%rd2];", 128),
        ("ld.global.L1::evict_last.L2::cache_hint.v2.b64 {%rd1, %rd2}, [%rd3], %rd4;", 128),
        ("ld.global.v8.b32 {%r1}, [%rd3];", 256),
        ("ld.global.u16 %rs1, [%rd2];\nst.global.v4.b32 [%rd1], {%r1};\nld.shared.v4.b32 {%r1}, [%r2];", 16),
        ("ret;", 0),
    ],
)
def test_widest_load_is_read(ptx, bits):
    assert widest_load(ptx) == bits


def test_unlisted_kernel_is_found(tmp_path):
    package = tmp_path / "esr_kernels" / "op"
    package.mkdir(parents=True)
    (package / "forward_kernel.py").write_text(
        "@triton.jit\ndef a_kernel(x): inner(x)\n@triton.jit(do_not_specialize=['n'])\ndef b_kernel(x, n): pass\n"
        "@triton.jit\ndef inner(x): pass\ndef launch():\n    a_kernel[(1,)](x)\n    TABLE['inner'](x)\n",
        encoding="utf-8",
    )
    (package / "autograd.py").write_text("forward_kernel.b_kernel[(1,)](x, n)\n", encoding="utf-8")
    assert launched_kernels(tmp_path) == {"a_kernel", "b_kernel"}


def test_table_has_a_line_for_each_variant():
    figures = [
        KernelFigures("a kernel", "k", capability, registers=40 + capability, shared_bytes=16, load_bits=128)
        for capability in SHARED_LIMIT
    ]
    figures[1] = KernelFigures("a kernel", "k", 90, error="CompilationError: no")
    figures[2] = KernelFigures("a kernel", "k", 100, 140, 16, 8, 12, 8, 64)
    *_, line = format_table(figures).splitlines()
    assert line.split() == ["a", "kernel", "|", *"120 16 0 128".split(), "|", "error", "|", *"140 16 20 64".split()]
