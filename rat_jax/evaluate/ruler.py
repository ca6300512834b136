"""RULER's task files, as they are: JSON lines in the older and the newer form."""

from __future__ import annotations

import dataclasses
import json
import os
import re

from rat_jax.paths import lacking, local_path, read_text


@dataclasses.dataclass(frozen=True)
class Example:
  """One example: what the model reads, the answers it should give, and RULER's own count of its tokens."""

  prompt: str
  answers: tuple[str, ...]
  length: int | None


def load_ruler(path: str | os.PathLike[str]) -> list[Example]:
  """The examples of a RULER .jsonl file; newer files keep the start of the answer apart, as `answer_prefix`.

  Raises FileNotFoundError, and ValueError that names the line for what is no example.
  """
  path = local_path(path, "path")
  if not path.is_file():
    raise FileNotFoundError(f"{path} {lacking(path, 'file')}; give a .jsonl file of RULER.")
  lines = re.split(r"\r\n?|\n", read_text(path))  # JSON has none of these inside a text
  examples = [_example(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
  if not examples:
    raise ValueError(f"{path} holds no example.")
  return examples


def _example(line: str, where: str) -> Example:
  try:
    fields = json.loads(line)
  except (ValueError, RecursionError) as error:  # also of a number's length and of depth
    raise ValueError(f"{where} is not JSON: {error}.") from error
  missing = [name for name in ("input", "outputs") if not isinstance(fields, dict) or name not in fields]
  if missing:
    raise ValueError(f"{where} lacks {missing}; an example of RULER has input, outputs and length.")
  outputs, prefix, length = fields["outputs"], fields.get("answer_prefix"), fields.get("length")
  prefix = "" if prefix is None else prefix
  if not isinstance(outputs, list) or not outputs or not all(
      x != "" and isinstance(x, str | int) and not isinstance(x, bool) for x in outputs):
    raise ValueError(f"{where}: outputs={outputs!r}; give a list of one or more answers.")
  for name, text in (("input", fields["input"]), ("answer_prefix", prefix)):
    if not isinstance(text, str):
      raise ValueError(f"{where}: {name}={text!r}; give a text.")
  if length is not None and (not isinstance(length, int) or isinstance(length, bool)):
    raise ValueError(f"{where}: length={length!r}; give a number of tokens, or none.")
  return Example(fields["input"] + prefix, tuple(map(str, outputs)), length)
