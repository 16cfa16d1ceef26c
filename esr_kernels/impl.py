"""Which implementation of an op runs. Chosen by the caller, never silently."""

from enum import Enum


class Impl(str, Enum):
    """`FUSED`: the kernels. `REFERENCE`: plain PyTorch on any device and float dtype, the specification of the op."""

    FUSED = "fused"
    REFERENCE = "reference"


def require_reference(op: str, impl: Impl | str) -> None:
    """Raise unless `impl` is REFERENCE: for ops whose fused kernel is not built yet.

    Raises:
        ValueError: `impl` is no member of `Impl`.
        NotImplementedError: `impl` is FUSED.
    """
    try:
        impl = Impl(impl)
    except ValueError:
        raise ValueError(f"{op}: impl must be one of {[i.value for i in Impl]}, got {impl!r}") from None
    if impl is Impl.FUSED:
        raise NotImplementedError(
            f"{op}: the fused kernel is not built yet in this version; pass impl=Impl.REFERENCE for plain PyTorch"
        )
