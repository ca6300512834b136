"""Text in, token files out, split by document into train and held-out."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
import sysconfig
import warnings
from collections.abc import Collection, Iterator

import numpy as np

from rat_jax.data.token_file import TokenFile, replaced_together, write_parts
from rat_jax.data.tokenizer import BYTES, Tokenizer
from rat_jax.paths import local_path, without_mark

_PIECE, _LEAST = 1 << 16, 1 << 10  # bytes of a piece of a large file, and of a small one
_LINE_END, _SPACE = re.compile(rb"\r?\n|\r"), re.compile(rb"\s+")
_ALIKE = "are empty, or equal to another, and were left out."
_AT_A_TIME = 64  # documents that a tokenizer, which uses all processors, gets at once


def prepare(source: str | os.PathLike[str], folder: str | os.PathLike[str], *, heldout: float = 0.05,
            pattern: str = "*", skip: Collection[str] = (), tokenizer: Tokenizer = BYTES) -> dict[str, TokenFile]:
  """Writes `folder`/train.bin and heldout.bin, with sidecars, from a text file or a folder of text files.

  A file is a document, without its byte order mark. A single file is cut into documents of about 64 KiB, a small one
  into as many as the share needs: at line ends, else at white space, else between characters. Documents are put in the
  order of a hash of their content, and the first share of them is held out. Equal files of a folder are one document;
  pieces of one file are all kept. What is in `folder` stays until both files are whole.

  Args:
    source: a file, or a folder that is searched through for files that match `pattern`; in a folder, files that
      are no UTF-8 text, empty, or equal to another are passed over, and warnings say how many.
    heldout: the share of documents that is held out, in (0, 1).
    skip: names of sub-folders that are passed over; as `pattern`, for a folder alone.
    tokenizer: text to tokens; its end-of-document token follows every document.

  Returns:
    {"train": TokenFile, "heldout": TokenFile}.

  Raises:
    FileNotFoundError: no such source.
    ValueError: an empty, binary or unreadable file, a folder without text, a share outside (0, 1), too few documents,
      `skip` that is a text, `pattern` or `skip` for a single file.
  """
  source, folder = local_path(source, "source"), local_path(folder, "folder")
  if not 0 < heldout < 1:
    raise ValueError(f"heldout={heldout}; use a share in (0, 1).")
  if not source.exists():
    raise FileNotFoundError(f"{source} does not exist; give a text file or a folder of text files.")
  if isinstance(skip, str):
    raise ValueError(f"skip={skip!r} is one text; give a collection of names, such as {[skip]}.")
  if not source.is_dir() and (pattern != "*" or skip):
    raise ValueError(f"pattern={pattern!r}, skip={skip!r} and {source}, a single file; give a folder, or leave both"
                     " out.")
  found, passed = _of_folder(source, pattern, skip) if source.is_dir() else (_of_file(source, heldout), [])
  documents = sorted(found, key=lambda d: hashlib.sha256(d).digest())
  if len(documents) < 2:
    size, one = sum(map(len, documents)), source.is_dir() and len(found) == 1
    raise ValueError(f"{source} holds {size:,} bytes of text in {len(documents)} different documents; a split into"
                     " train and held-out needs two or more. Give more text"
                     f"{', or the one file, to be cut' if one else ''}.{''.join(f' {told}' for told in passed)}")
  for told in passed:
    warnings.warn(told, stacklevel=2)
  cut = min(max(1, round(heldout * len(documents))), len(documents) - 1)
  parts = {"heldout": documents[:cut], "train": documents[cut:]}
  folder.mkdir(parents=True, exist_ok=True)
  paths = {name: folder / f"{name}.bin" for name in parts}
  with replaced_together(list(paths.values())):
    for name, part in parts.items():
      write_parts(paths[name], _tokens(part, tokenizer), vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id,
                  tokenizer=tokenizer.name, source=str(source), text_bytes=sum(map(len, part)))
  return {name: TokenFile(path) for name, path in paths.items()}


def prepare_standard_library(folder: str | os.PathLike[str], tokenizer: Tokenizer = BYTES) -> dict[str, TokenFile]:
  """`prepare` on the source text of the Python standard library: real text that every machine has.

  Left out are installed packages, tests, and the code pages of `encodings`, a hundred copies of one table.
  """
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", f".*{re.escape(_ALIKE)}")  # many of its packages begin with an empty file
    return prepare(sysconfig.get_paths()["stdlib"], folder, pattern="*.py", skip={
        "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}, tokenizer=tokenizer)


def _tokens(documents: list[bytes], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
  for first in range(0, len(documents), _AT_A_TIME):
    for ids in tokenizer.encode_batch([one.decode() for one in documents[first:first + _AT_A_TIME]]):
      yield np.array(ids, np.int64)


def _of_folder(source: pathlib.Path, pattern: str, skip: Collection[str]) -> tuple[list[bytes], list[str]]:
  """(the texts of the files, each once; what to say of files that are left out)."""
  paths = [path for path in sorted(source.rglob(pattern))
           if path.is_file() and not set(skip) & set(path.relative_to(source).parts[:-1])]
  texts = [(path, _read(path)) for path in paths]
  passed = [path for path, text in texts if text is None]
  kept = {text for _, text in texts if text and text.strip()}
  told = [f"{len(passed)} of {len(paths)} files in {source} are no UTF-8 text and were passed over, {passed[0]} first;"
          " convert them to UTF-8, or leave them out by a pattern."] if passed else []
  alike = len(paths) - len(passed) - len(kept)
  return list(kept), told + ([f"{alike} of {len(paths)} files in {source} {_ALIKE}"] if alike else [])


def _of_file(source: pathlib.Path, heldout: float) -> list[bytes]:
  """The file's text in pieces."""
  text = _read(source)
  if text is None:
    raise ValueError(f"{source} is not UTF-8 text (binary, or another encoding); convert it to UTF-8 first.")
  if not text.strip():
    raise ValueError(f"{source} is empty; give a file with text in it.")
  share = round(min(heldout, 1 - heldout) * len(text))
  return list(_pieces(text, min(_PIECE, max(share, min(_LEAST, len(text) // 2), 1))))


def _pieces(text: bytes, size: int) -> Iterator[bytes]:
  start = 0
  while start < len(text):
    end = _end(text, start + size, start + size + max(size, _LEAST))
    yield text[start:end]
    start = end


def _end(text: bytes, least: int, most: int) -> int:
  """Where a piece ends that should not end before `least`, nor after `most` but for the character that is there."""
  for wanted in (_LINE_END, _SPACE):
    found = wanted.search(text, least - 1, most)
    if found:
      end = found.end()
      return end + (text[end - 1:end + 1] == b"\r\n")
  while most < len(text) and text[most] & 0xC0 == 0x80:  # inside a character
    most += 1
  return min(most, len(text))


def _read(path: pathlib.Path) -> bytes | None:
  """The file's text in bytes, or None where it is no UTF-8 text. Raises ValueError for a file that cannot be read."""
  try:
    data = without_mark(path.read_bytes())
  except OSError as error:
    raise ValueError(f"{path} cannot be read ({error.strerror}); mend its permissions, or leave it out.") from error
  try:
    data.decode("utf-8")
  except UnicodeDecodeError:
    return None
  return None if b"\0" in data else data
