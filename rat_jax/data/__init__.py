"""Text to token files, token files to batches."""

from rat_jax.data.permutation import permute
from rat_jax.data.prepare import BYTES, prepare, prepare_standard_library
from rat_jax.data.token_file import TokenFile

__all__ = ["BYTES", "TokenFile", "permute", "prepare", "prepare_standard_library"]
