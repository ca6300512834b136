"""Paths that a caller gives: files and folders of this machine, "~" included, and nothing else."""

from __future__ import annotations

import os
import pathlib
import re

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
