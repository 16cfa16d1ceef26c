"""Tile sizes of the row kernels as a pure function of shape and dtype: no tuning at run time."""

from dataclasses import dataclass, replace

TILE_COLUMNS = 128  # columns that share one maximum in tile-relative storage; every tile is a multiple of it

# Registers of a thread at most: with 128, 512 threads share a multiprocessor, with 80 another 256. Without a limit of its own
# ptxas sometimes takes a lower one and spills, or a higher one that it does not need.
TWO_SIDED_REGISTERS = 128
ONE_SIDED_REGISTERS = 80


@dataclass(frozen=True)
class TileConfig:
    """How one program walks its row: `block_vocab` columns at a time, with `num_warps` warps."""

    block_vocab: int
    num_warps: int
    max_registers: int = TWO_SIDED_REGISTERS

    def __post_init__(self) -> None:
        if self.block_vocab < TILE_COLUMNS or self.block_vocab & (self.block_vocab - 1):
            raise ValueError(f"TileConfig: block_vocab must be a power of 2 >= {TILE_COLUMNS}, got {self.block_vocab}")
        if self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"TileConfig: num_warps must be a power of 2 in [1, 32], got {self.num_warps}")

    def launch_options(self) -> dict:
        """Options of a kernel launch. Fused multiply-adds are asked for by name: Triton 3.10 will no longer imply them."""
        return {"num_warps": self.num_warps, "maxnreg": self.max_registers, "enable_fp_fusion": True}


def choose_tile_config(vocab_size: int) -> TileConfig:
    """Tile for pairs of rows of `vocab_size` logits.

    2048 columns on 8 warps: a thread holds 8 columns of both rows and five running sums of each in at most 128 registers, so
    that two programs share a multiprocessor and one reads while the other reduces. A short row takes one tile, and a warp for
    every 256 columns. Chosen from compiled resources; not yet measured on a GPU.
    """
    block_vocab = min(2048, max(TILE_COLUMNS, 1 << (vocab_size - 1).bit_length()))
    return TileConfig(block_vocab, num_warps=max(1, block_vocab // 256))


def choose_one_sided_tile_config(vocab_size: int, num_ids: int) -> TileConfig:
    """Tile for rows of one side, of which `num_ids` ids are held in registers beside it.

    The same tile; a thread holds 8 columns, their maxima and two running sums in at most 80 registers, so that three programs
    share a multiprocessor, or 128 where it holds several ids as well. Chosen from compiled resources; not yet measured on a GPU.
    """
    tile = choose_tile_config(vocab_size)
    return replace(tile, max_registers=ONE_SIDED_REGISTERS if num_ids <= 256 else TWO_SIDED_REGISTERS)
