"""Text files, read in one way."""

from __future__ import annotations

import codecs
import os

from rat_jax.paths import local_path


def read_text(path: str | os.PathLike[str]) -> str:
  """The text of a UTF-8 file, whatever the locale: without a byte order mark, its line ends as they are.

  Raises OSError for a file that cannot be read, and ValueError that names a file that is no UTF-8 text.
  """
  try:
    return without_mark(local_path(path, "path").read_bytes()).decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is no UTF-8 text: {error}; convert it to UTF-8 first.") from error


def without_mark(data: bytes) -> bytes:
  """The same without the byte order mark that some editors write before UTF-8 text."""
  return data.removeprefix(codecs.BOM_UTF8)
