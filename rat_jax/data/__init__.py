"""Text to token files, token files to batches."""

from rat_jax.data.permutation import permute
from rat_jax.data.preparation import prepare, prepare_standard_library
from rat_jax.data.token_file import TokenFile
from rat_jax.data.tokenizer import BYTES, Tokenizer, load_tokenizer

__all__ = ["BYTES", "TokenFile", "Tokenizer", "load_tokenizer", "permute", "prepare", "prepare_standard_library"]
