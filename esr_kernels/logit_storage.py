"""How the fused linear divergence keeps logits between its matrix product and its row kernel."""

from enum import Enum


class LogitStorage(str, Enum):
    """Format of the stored logits under `Impl.FUSED`. It changes bytes and rounding, never what is computed.

    `AUTO`: the op chooses by shape and device, always one of the two below; never 16-bit logits of full range.
    `FLOAT32`: 4 bytes per logit.
    `TILE_RELATIVE_FP16`: float16 of the difference to the maximum of a 128-column tile, for the teacher further of the
        difference to the student's; 2 bytes per logit.

    `Impl.REFERENCE` always keeps float32 (float64 for float64 inputs).
    """

    AUTO = "auto"
    FLOAT32 = "float32"
    TILE_RELATIVE_FP16 = "tile_relative_fp16"


def check_logit_storage(op: str, logits: "LogitStorage | str") -> LogitStorage:
    """Accept a member or its value.

    Raises:
        ValueError: `logits` is no member of `LogitStorage`.
    """
    try:
        return LogitStorage(logits)
    except ValueError:
        raise ValueError(f"{op}: logits must be one of {[s.value for s in LogitStorage]}, got {logits!r}") from None
