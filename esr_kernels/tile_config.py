"""Tile sizes of the row kernels as a pure function of shape and dtype: no tuning at run time."""

from dataclasses import dataclass

TILE_COLUMNS = 128  # columns that share one maximum in tile-relative storage; every tile is a multiple of it

# Registers of a thread at most, so that 512 threads share a multiprocessor; without a limit of its own ptxas sometimes takes a
# lower one and spills.
MAX_REGISTERS = 128


@dataclass(frozen=True)
class TileConfig:
    """How one program walks its row: `block_vocab` columns at a time, with `num_warps` warps."""

    block_vocab: int
    num_warps: int

    def __post_init__(self) -> None:
        if self.block_vocab < TILE_COLUMNS or self.block_vocab & (self.block_vocab - 1):
            raise ValueError(f"TileConfig: block_vocab must be a power of 2 >= {TILE_COLUMNS}, got {self.block_vocab}")
        if self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"TileConfig: num_warps must be a power of 2 in [1, 32], got {self.num_warps}")

    def launch_options(self) -> dict:
        """Options of a kernel launch. Fused multiply-adds are asked for by name: Triton 3.10 will no longer imply them."""
        return {"num_warps": self.num_warps, "maxnreg": MAX_REGISTERS, "enable_fp_fusion": True}


def choose_tile_config(vocab_size: int) -> TileConfig:
    """Tile for rows of `vocab_size` logits.

    2048 columns on 8 warps: a thread holds 8 columns of both rows and five running sums of each in at most 128 registers, so
    that two programs share a multiprocessor and one reads while the other reduces. A short row takes one tile, and a warp for
    every 256 columns. Chosen from compiled resources; not yet measured on a GPU.
    """
    block_vocab = min(2048, max(TILE_COLUMNS, 1 << (vocab_size - 1).bit_length()))
    return TileConfig(block_vocab, num_warps=max(1, block_vocab // 256))
