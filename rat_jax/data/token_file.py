"""Token files: a flat array of token ids on disk, with a JSON sidecar that says what they are."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from rat_jax import checks
from rat_jax.data.permutation import permute
from rat_jax.paths import lacking, local_path, read_text
from rat_jax.train.loss import IGNORED

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Sidecar:
  """What a token file holds: NAME.bin has NAME.json beside it."""

  dtype: str        # little-endian numpy type: uint8, uint16 or uint32
  vocab_size: int
  eod_id: int       # closes every document
  tokens: int
  documents: int
  tokenizer: str
  source: str
  bytes: int | None = None   # of the text in UTF-8, ends of documents not counted; None where nobody said
  sha256: str | None = None  # of NAME.bin; None in the files of older versions


class TokenFile:
  """A memory-mapped token file. Batches are a pure function of (seed, step), so training resumes anywhere.

  Raises ValueError when file and sidecar do not fit each other, FileNotFoundError when one is missing.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = local_path(path, "path")
    self.sidecar = _read_sidecar(self.path)
    self.tokens = np.memmap(self.path, np.dtype(self.sidecar.dtype).newbyteorder("<"), "r")

  def windows(self, length: int) -> int:
    """How many windows of `length` tokens, each with its next tokens as targets, the file holds."""
    checks.check_count("length", length)
    return (self.sidecar.tokens - 1) // int(length)

  def batch(self, step: int, *, batch_size: int, length: int, seed: int = 0, documents_apart: bool = False,
            rows: np.ndarray | None = None) -> Batch:
    """The training batch of a step: every window once per epoch, in an order that `seed` and the epoch decide.

    `rows`, integers: only these rows of the batch are read, in this order (`rat_jax.parallel.rows_of_process`).

    Raises ValueError for counts out of range: `step` and `seed` from 0 on, `batch_size` and `length` from 1 on.
    """
    for name, value, least in (("step", step, 0), ("batch_size", batch_size, 1), ("seed", seed, 0)):
      checks.check_count(name, value, least)
    windows = self._check_length(length)
    step, batch_size, length, seed = map(int, (step, batch_size, length, seed))  # numpy's own integers overflow
    index = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, order = np.divmod(index, windows)
    chosen = np.empty_like(order)
    for epoch in np.unique(epochs):
      chosen[epochs == epoch] = permute(order[epochs == epoch], windows, seed * 1_000_003 + int(epoch))
    return self._read(chosen if rows is None else chosen[rows], length, documents_apart)

  def epoch(self, *, batch_size: int, length: int, limit: int | None = None) -> Iterator[Batch]:
    """All windows in order, or `limit` of them evenly spread over the file, for evaluation.

    The last batch is filled up with rows whose targets are all ignored. Raises ValueError, before the first batch is
    asked for, unless all three are counts from 1 on.
    """
    checks.check_count("batch_size", batch_size)
    windows = self._check_length(length)
    chosen = np.arange(windows)
    if limit is not None:
      checks.check_count("limit", limit)
      chosen = chosen if limit >= windows else np.arange(int(limit)) * windows // int(limit)
    return self._batches(chosen, int(batch_size), int(length))

  def _batches(self, chosen: np.ndarray, batch_size: int, length: int) -> Iterator[Batch]:
    for start in range(0, len(chosen), batch_size):
      rows = chosen[start:start + batch_size]
      batch = self._read(np.pad(rows, (0, batch_size - len(rows))), length)
      batch["targets"][len(rows):] = IGNORED
      yield batch

  def _check_length(self, length: int) -> int:
    if self.windows(length) < 1:
      raise ValueError(f"{self.path} holds {self.sidecar.tokens} tokens, too few for one window of length={length} and"
                       " its targets; give more text or a smaller length.")
    return self.windows(length)

  def _read(self, chosen: np.ndarray, length: int, documents_apart: bool = False) -> Batch:
    rows = np.stack([self.tokens[i * length:(i + 1) * length + 1] for i in chosen]).astype(np.int32)
    if rows.max() >= self.sidecar.vocab_size:
      raise ValueError(f"{self.path} holds token {rows.max()}, outside the vocabulary 0..{self.sidecar.vocab_size - 1}"
                       " of its sidecar; the file was not written by its tokenizer.")
    tokens, targets = rows[:, :-1], rows[:, 1:].copy()
    ends = tokens == self.sidecar.eod_id
    targets[ends] = IGNORED  # what follows the end of a document is another document
    batch = {"tokens": np.ascontiguousarray(tokens), "targets": targets}
    if documents_apart:
      batch["segment_ids"] = 1 + np.cumsum(ends, axis=1, dtype=np.int32) - ends
    return batch


def write_token_file(path: pathlib.Path, documents: Iterable[np.ndarray], *, vocab_size: int, eod_id: int,
                     tokenizer: str, source: str, text_bytes: int | None = None) -> Sidecar:
  """Writes documents (int arrays) with `eod_id` after each, and the sidecar; replaces nothing until both are whole.

  `text_bytes` is the size in UTF-8 of the text that all documents were made from, for bits per byte.
  """
  with replaced_together([path]):
    return write_parts(path, documents, vocab_size=vocab_size, eod_id=eod_id, tokenizer=tokenizer, source=source,
                       text_bytes=text_bytes)


@contextlib.contextmanager
def replaced_together(paths: Sequence[pathlib.Path]) -> Iterator[None]:
  """After a block that calls `write_parts` for each path, all take their names; where the block fails, none does."""
  parts = [(path.with_suffix(f"{suffix}.part"), path.with_suffix(suffix)) for path in paths
           for suffix in (".bin", ".json")]
  try:
    yield
    for part, place in parts:
      os.replace(part, place)
  finally:
    for part, _ in parts:
      part.unlink(missing_ok=True)


def write_parts(path: pathlib.Path, documents: Iterable[np.ndarray], *, vocab_size: int, eod_id: int,
                tokenizer: str, source: str, text_bytes: int | None = None) -> Sidecar:
  """As `write_token_file`, to NAME.bin.part and NAME.json.part, for `replaced_together`."""
  dtype = next(t for t in ("uint8", "uint16", "uint32") if vocab_size <= 2 ** (8 * np.dtype(t).itemsize))
  part, tokens, count, digest = path.with_suffix(".bin.part"), 0, 0, hashlib.sha256()
  with part.open("wb") as file:
    for document in documents:
      if document.size and not 0 <= document.min() <= document.max() < vocab_size:
        raise ValueError(f"document {count} holds tokens {document.min()}..{document.max()}, outside the vocabulary"
                         f" 0..{vocab_size - 1}.")
      written = np.append(document, eod_id).astype(np.dtype(dtype).newbyteorder("<")).tobytes()
      file.write(written)
      digest.update(written)
      tokens, count = tokens + document.size + 1, count + 1
  sidecar = Sidecar(dtype, vocab_size, eod_id, tokens, count, tokenizer, source, text_bytes, digest.hexdigest())
  sidecar_part = path.with_suffix(".json.part")
  sidecar_part.write_text(json.dumps(dataclasses.asdict(sidecar), indent=2) + "\n", "utf-8")
  return sidecar


def _read_sidecar(path: pathlib.Path) -> Sidecar:
  beside = path.with_suffix(".json")
  for needed in (path, beside):
    if not needed.is_file():
      raise FileNotFoundError(f"{needed} {lacking(needed, 'file')}; `python -m experiments.prepare_data` writes a token"
                              " file and its sidecar.")
  try:
    sidecar = Sidecar(**json.loads(read_text(beside)))
  except (ValueError, TypeError, RecursionError) as error:  # also of a number's length and of depth
    raise ValueError(f"{beside} is no sidecar of a token file: {error}.") from error
  for name in ("vocab_size", "eod_id", "tokens", "documents"):
    value = getattr(sidecar, name)
    if isinstance(value, bool) or not isinstance(value, int):
      raise ValueError(f"{beside}: {name}={value!r}; give an integer.")
  for name in ("tokenizer", "source"):
    value = getattr(sidecar, name)
    if not isinstance(value, str):
      raise ValueError(f"{beside}: {name}={value!r}; give a text.")
  if sidecar.dtype not in ("uint8", "uint16", "uint32"):
    raise ValueError(f"{beside}: dtype={sidecar.dtype!r}; use uint8, uint16 or uint32.")
  size, digest = sidecar.bytes, sidecar.sha256
  if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
    raise ValueError(f"{beside}: bytes={size!r}; give the number of bytes of the text, or none.")
  if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
    raise ValueError(f"{beside}: sha256={digest!r}; give 64 hexadecimal digits, or none.")
  expected = sidecar.tokens * np.dtype(sidecar.dtype).itemsize
  if path.stat().st_size != expected or not expected:
    raise ValueError(f"{path} has {path.stat().st_size} bytes, its sidecar says tokens={sidecar.tokens} of"
                     f" {sidecar.dtype}, {expected} bytes; prepare the data again.")
  if not 0 <= sidecar.eod_id < sidecar.vocab_size:
    raise ValueError(f"{beside}: eod_id={sidecar.eod_id} is outside the vocabulary 0..{sidecar.vocab_size - 1}.")
  return sidecar
