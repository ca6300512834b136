"""Modes as text: `str(mode)` writes what `parse_mode` reads, as in "dilated:16,window=256,sinks=4".

The form is name[:argument,...]; arguments are positional, then field=value; fields at their default are left
out. A tuple is [item;item;...], and its items may be modes; a mode alone is (mode). A union, as `mode | mode` makes it,
may also be read as "streaming_llm:64|quest:1024"; it is written as the one mode that it is.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from rat_jax.modes.base import Mode


def write(mode: Mode) -> str:
  """The text form of a mode."""
  arguments = []
  for field in _fields(type(mode)):
    value = getattr(mode, field.name)
    if field.default is dataclasses.MISSING:
      arguments.append(_write_value(value))
    elif value != field.default or type(value) is not type(field.default):
      arguments.append(f"{field.name}={_write_value(value)}")
  return ":".join([mode.name, ",".join(arguments)]) if arguments else mode.name


def parse(text: str, table: Mapping[str, type[Mode]]) -> Mode:
  """The mode that a text describes; `table` maps names to classes. Raises ValueError that quotes the whole text."""
  try:
    return _parse_union(text, table)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"mode {text!r}: {'nested too deeply' if isinstance(error, RecursionError) else error}") from error


def _parse_union(text: str, table: Mapping[str, type[Mode]]) -> Mode:
  """The mode of a part of a text."""
  first, *others = _cut(text, "|")
  mode = _parse_one(first, table)
  for other in others:
    joined = _parse_one(other, table)
    try:
      mode = mode | joined  # type: ignore[operator]  # those that have unions say so
    except TypeError as error:
      raise ValueError(f"{mode} and {joined} have no union; write a position-only mode, then one that chooses blocks,"
                       " such as streaming_llm:64|quest:1024.") from error
  return mode


def _fields(cls: type[Mode]) -> list[dataclasses.Field[Any]]:
  """The fields of a mode in the order of its arguments: positional, then by name alone."""
  return sorted(dataclasses.fields(cls), key=lambda field: bool(field.kw_only))


def _parse_one(text: str, table: Mapping[str, type[Mode]]) -> Mode:
  """The mode of a text that is no union."""
  name, _, rest = text.strip().partition(":")
  if name not in table:
    raise ValueError(f"the name {name!r} is unknown; use one of {', '.join(table)}.")
  positional: list[Any] = []
  named: dict[str, Any] = {}
  for argument in _split(rest, ","):
    key, equals, value = argument.partition("=")
    if equals and key.strip().isidentifier():
      if key.strip() in named:
        raise ValueError(f"{key.strip()} is given twice; leave one of them out.")
      named[key.strip()] = _read_value(value, table)
    elif named:
      raise ValueError(f"{argument!r} comes after field=value; put it first.")
    else:
      positional.append(_read_value(argument, table))
  try:
    return table[name](*positional, **named)
  except TypeError as error:
    fields = ", ".join(f.name for f in _fields(table[name]))
    raise ValueError(f"{error}; the fields of {name} are: {fields or 'none'}.") from error


def _write_value(value: Any) -> str:
  if isinstance(value, tuple):
    return "[" + ";".join(str(item) for item in value) + "]"
  if dataclasses.is_dataclass(value):
    return f"({value})"
  return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _read_value(text: str, table: Mapping[str, type[Mode]]) -> Any:
  text = text.strip()
  if text.startswith("[") and text.endswith("]"):
    return tuple(_read_value(item, table) for item in _split(text[1:-1], ";"))
  if text.startswith("(") and text.endswith(")"):
    return _parse_union(text[1:-1], table)
  if text.partition(":")[0] in table:
    return _parse_union(text, table)
  constants = {"none": None, "true": True, "false": False}
  if text.lower() in constants:
    return constants[text.lower()]
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = None
  if isinstance(value, (int, float)):
    return value
  if text.isidentifier():
    return text
  raise ValueError(f"{text!r} is no number, name, mode or [list].")


def _split(text: str, separator: str) -> list[str]:
  """What `_cut` makes of a text, nothing of a blank one. Raises ValueError for a blank piece beside others."""
  pieces = _cut(text, separator) if text.strip() else []
  if not all(piece.strip() for piece in pieces):
    raise ValueError(f"{text!r} has nothing before or after a {separator!r}; write it, or leave that out.")
  return pieces


def _cut(text: str, separator: str) -> list[str]:
  """`text` cut at the separators that stand outside brackets."""
  depth, start, pieces = 0, 0, []
  for i, character in enumerate(text):
    depth += (character in "[(") - (character in "])")
    if character == separator and depth == 0:
      pieces.append(text[start:i])
      start = i + 1
  return [*pieces, text[start:]]
