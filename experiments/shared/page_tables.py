"""Tables of pages: where they stand, and what they are made from. `python -m experiments.tables` rewrites them.

A table stands between a line `<!-- table: NAME -->` and a line `<!-- end -->`. A function of `read` makes it;
`read` gives a result of experiments/results by its name, such as "niah_main".
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

Read = Callable[[str], dict[str, Any]]
Table = Callable[[Read], str]

_BEGIN, _END = re.compile(r"<!-- table: (\w+) -->"), "<!-- end -->"
_LIKE_A_MARKER = re.compile(r"\s*<!--\s*(table|end)\b")


def reader(folder: pathlib.Path) -> Read:
  """Reads every result of a folder once."""
  @functools.cache
  def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return result
  return read


def parts(text: str, page: str) -> Iterator[tuple[str | None, str]]:
  """What a page consists of: (None, lines between tables), and (a table's name, the lines that stand for it).

  Raises ValueError that names the page, the line and the marker where a marker is misspelt or has no other half.
  """
  name, lines, began = None, [], ""
  for number, line in enumerate(text.splitlines(), start=1):
    begin, where = _BEGIN.fullmatch(line), f"{page}, line {number}: {line.strip()}"
    if _LIKE_A_MARKER.match(line) is None:
      lines.append(line)
    elif begin is None and line != _END:
      raise ValueError(f"{where}: a table begins with the line <!-- table: NAME --> and ends with {_END}")
    elif (begin is None) == (name is None):
      raise ValueError(f"{where}: no table begins before it" if begin is None else
                       f"{began}: no {_END} before the next table, of line {number}")
    else:
      yield name, "".join(f"{one}\n" for one in lines)
      name, lines, began = begin and begin[1], [], where
  if name is not None:
    raise ValueError(f"{began}: no {_END} after it")
  yield name, "".join(f"{one}\n" for one in lines)


def rewritten(text: str, page: str, made: Callable[[str], str]) -> tuple[str, list[str]]:
  """The page with its tables as they are made, and the names of those that were others.

  Raises ValueError for a broken marker, and for a name that no table has.
  """
  pieces, others = [], []
  for name, lines in parts(text, page):
    if name is not None:
      table = f"{made(name)}\n"
      others += [name] if table != lines else []
      lines = f"<!-- table: {name} -->\n{table}{_END}\n"
    pieces.append(lines)
  return "".join(pieces), others
