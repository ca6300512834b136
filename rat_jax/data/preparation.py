"""Text in, token files out, split by document into train and held-out."""

from __future__ import annotations

import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Collection, Iterator

import numpy as np

from rat_jax.data.token_file import TokenFile, write_token_file
from rat_jax.data.tokenizer import BYTES, Tokenizer

_PIECE = 1 << 16
_AT_A_TIME = 64  # documents that a tokenizer, which uses all processors, gets at once


def prepare(source: str | os.PathLike[str], folder: str | os.PathLike[str], *, heldout: float = 0.05,
            pattern: str = "*", skip: Collection[str] = (), tokenizer: Tokenizer = BYTES) -> dict[str, TokenFile]:
  """Writes `folder`/train.bin and heldout.bin, with sidecars, from a text file or a folder of text files.

  A file is a document; a single file is cut into documents of about 64 KiB at line ends. Documents are
  put in the order of a hash of their content, equal ones once, and the first share of them is held out.

  Args:
    source: a file, or a folder that is searched through for files that match `pattern`; in a folder, files that
      are no UTF-8 text are passed over.
    heldout: the share of documents that is held out, in (0, 1).
    skip: names of sub-folders that are passed over.
    tokenizer: text to tokens; its end-of-document token follows every document.

  Returns:
    {"train": TokenFile, "heldout": TokenFile}.

  Raises:
    FileNotFoundError: no such source.
    ValueError: an empty, binary or unreadable file, a folder without text, a share outside (0, 1), too few documents.
  """
  source, folder = pathlib.Path(source), pathlib.Path(folder)
  if not 0 < heldout < 1:
    raise ValueError(f"heldout={heldout}; use a share in (0, 1).")
  if not source.exists():
    raise FileNotFoundError(f"{source} does not exist; give a text file or a folder of text files.")
  documents = sorted(set(_documents(source, pattern, skip)), key=lambda d: hashlib.sha256(d).digest())
  if len(documents) < 2:
    raise ValueError(f"{source} holds {len(documents)} documents; a split into train and held-out needs two or more."
                     " Give more text.")
  cut = min(max(1, round(heldout * len(documents))), len(documents) - 1)
  parts = {"heldout": documents[:cut], "train": documents[cut:]}
  folder.mkdir(parents=True, exist_ok=True)
  for name, part in parts.items():
    write_token_file(folder / f"{name}.bin", _tokens(part, tokenizer), vocab_size=tokenizer.vocab_size,
                     eod_id=tokenizer.eod_id, tokenizer=tokenizer.name, source=str(source))
  return {name: TokenFile(folder / f"{name}.bin") for name in parts}


def prepare_standard_library(folder: str | os.PathLike[str], tokenizer: Tokenizer = BYTES) -> dict[str, TokenFile]:
  """`prepare` on the source text of the Python standard library: real text that every machine has.

  Left out are installed packages, tests, and the code pages of `encodings`, a hundred copies of one table.
  """
  return prepare(sysconfig.get_paths()["stdlib"], folder, pattern="*.py", skip={
      "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}, tokenizer=tokenizer)


def _tokens(documents: list[bytes], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
  for first in range(0, len(documents), _AT_A_TIME):
    for ids in tokenizer.encode_batch([one.decode() for one in documents[first:first + _AT_A_TIME]]):
      yield np.array(ids, np.int64)


def _documents(source: pathlib.Path, pattern: str, skip: Collection[str]) -> Iterator[bytes]:
  if source.is_file():
    text = _read(source)
    if text is None:
      raise ValueError(f"{source} is not UTF-8 text (binary, or another encoding); convert it to UTF-8 first.")
    if not text.strip():
      raise ValueError(f"{source} is empty; give a file with text in it.")
    yield from _pieces(text)
    return
  for path in sorted(source.rglob(pattern)):
    if path.is_file() and not set(skip) & set(path.relative_to(source).parts[:-1]):
      text = _read(path)
      if text and text.strip():
        yield text


def _pieces(text: bytes) -> Iterator[bytes]:
  start = 0
  while start < len(text):
    end = text.find(b"\n", start + _PIECE) + 1 or len(text)
    yield text[start:end]
    start = end


def _read(path: pathlib.Path) -> bytes | None:
  """The file's bytes, or None where they are no UTF-8 text. Raises ValueError for a file that cannot be read."""
  try:
    data = path.read_bytes()
  except OSError as error:
    raise ValueError(f"{path} cannot be read ({error.strerror}); mend its permissions, or leave it out.") from error
  try:
    data.decode("utf-8")
  except UnicodeDecodeError:
    return None
  return None if b"\0" in data else data
