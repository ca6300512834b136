"""Paths that a caller gives: files and folders of this machine, "~" included, and nothing else; text files there."""

from __future__ import annotations

import codecs
import os
import pathlib
import re
from typing import Literal

# Of a Path too, which holds one slash. One letter before the colon is a drive of Windows.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")


def local_path(value: str | os.PathLike[str], name: str) -> pathlib.Path:
  """The path that a caller means, with "~" expanded.

  Args:
    name: what the caller knows the value by, such as "folder" or "--workdir", for errors.

  Raises ValueError for an empty text, for a URL such as gs://bucket/run, and for the home of an unknown user.
  """
  text = os.fspath(value)
  if not text:
    raise ValueError(f"{name}={text!r} is empty; give a path, or . for the current folder.")
  if found := _SCHEME.match(text):
    rest = text[found.end():]
    fix = f"give the path alone, /{rest}" if found.group(1).lower() == "file" else (
        "give a path of this machine: mount the storage or copy from and to it")
    raise ValueError(f"{name}={text!r} is a URL, and only files of this machine are read and written; {fix}.")
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as error:  # what pathlib raises
    raise ValueError(f"{name}={text!r} starts at the home of a user whom this machine does not know; write the path"
                     " out.") from error


def lacking(path: pathlib.Path, kind: Literal["file", "folder"]) -> str:
  """What is to say of a path that is no file, or no folder: that it does not exist, or is something else."""
  return f"is no {kind}" if path.exists() else "does not exist"


def read_text(path: str | os.PathLike[str]) -> str:
  """The text of a UTF-8 file, whatever the locale: without a byte order mark, its line ends as they are.

  Raises OSError for a file that cannot be read, and ValueError that names a file that is no UTF-8 text.
  """
  try:
    return without_mark(local_path(path, "path").read_bytes()).decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is no UTF-8 text: {error}; convert it to UTF-8 first.") from error


def without_mark(data: bytes) -> bytes:
  """The data without the byte order mark that some editors write before UTF-8 text."""
  return data.removeprefix(codecs.BOM_UTF8)
