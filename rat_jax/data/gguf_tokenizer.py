"""The byte-level BPE tokenizer inside a GGUF file, as the package `tokenizers` runs it.

A header says by a name how text is cut before merges; llama.cpp (src/llama-vocab.cpp) has what the names mean.
"""

from __future__ import annotations

import pathlib
from types import ModuleType
from typing import Any

from rat_jax.convert.gguf import opened

_OF_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_OF_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")
# By name: the expressions that cut text, one after another; whether text is composed (NFC) first.
_CUTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((_OF_GPT2,), False), "smollm": ((r"\p{N}", _OF_GPT2), False),
    "llama-bpe": ((_OF_LLAMA3.replace("DIGITS", "{1,3}"),), False),
    "qwen2": ((_OF_LLAMA3.replace("DIGITS", ""),), True)}
_WHOLE = ("llama-bpe",)  # where a piece that is a token is taken whole, whatever merges would make of it
_CONTROL = 3  # the type of tokens that no text has


def tokenizer_of(path: pathlib.Path, library: ModuleType) -> tuple[Any, str]:
  """(the tokenizer as an object of `library`, its token that ends a document).

  Raises ValueError for a file without a tokenizer, another kind than byte-level BPE, and unknown cuts, by their names.
  """
  file = opened(path)
  kind, name = file.needed("tokenizer.ggml.model"), file.said("tokenizer.ggml.pre", "default")
  if kind != "gpt2":
    raise ValueError(f"{path}: tokenizer.ggml.model={kind!r} is not supported; byte-level BPE, 'gpt2', is. Give the"
                     " tokenizer.json or tokenizer.model that belongs to the model.")
  if name not in _CUTS:
    raise ValueError(f"{path}: tokenizer.ggml.pre={name!r} is not supported; {', '.join(_CUTS)} are. Give the"
                     " tokenizer.json that belongs to the model.")
  tokens, merges = file.needed("tokenizer.ggml.tokens"), file.needed("tokenizer.ggml.merges")
  made = library.Tokenizer(library.models.BPE(
      vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(merge.split(" ")) for merge in merges],
      ignore_merges=name in _WHOLE))
  expressions, composed = _CUTS[name]
  cuts = [library.pre_tokenizers.Split(library.Regex(one), "isolated") for one in expressions]
  made.pre_tokenizer = library.pre_tokenizers.Sequence(
      [*cuts, library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  made.decoder = library.decoders.ByteLevel()
  if composed:
    made.normalizer = library.normalizers.NFC()
  types = file.said("tokenizer.ggml.token_type", [])
  made.add_special_tokens([library.AddedToken(token, normalized=False, special=True)
                           for token, of in zip(tokens, types, strict=False) if of == _CONTROL])
  return made, tokens[file.needed("tokenizer.ggml.eos_token_id")]
