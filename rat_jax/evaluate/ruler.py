"""RULER's task files, as they are: JSON lines in the older and the newer form."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib


@dataclasses.dataclass(frozen=True)
class Example:
  """One example: what the model reads, the answers it should give, and RULER's own count of its tokens."""

  prompt: str
  answers: tuple[str, ...]
  length: int | None


def load_ruler(path: str | os.PathLike) -> list[Example]:
  """The examples of a RULER .jsonl file; newer files keep the start of the answer apart, as `answer_prefix`.

  Raises FileNotFoundError, and ValueError that names the line for what is no example.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; give a .jsonl file of RULER.")
  examples = [_example(line, f"{path}, line {i}") for i, line in enumerate(path.read_text().split("\n"), 1)
              if line.strip()]
  if not examples:
    raise ValueError(f"{path} holds no example.")
  return examples


def _example(line: str, where: str) -> Example:
  try:
    fields = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f"{where} is not JSON: {error}.") from error
  missing = [name for name in ("input", "outputs") if not isinstance(fields, dict) or name not in fields]
  if missing:
    raise ValueError(f"{where} lacks {missing}; an example of RULER has input, outputs and length.")
  outputs, prefix = fields["outputs"], fields.get("answer_prefix") or ""
  if not isinstance(outputs, list) or not outputs or any(not str(x) or not isinstance(x, str | int) for x in outputs):
    raise ValueError(f"{where}: outputs={outputs!r}; give a list of one or more answers.")
  for name, text in (("input", fields["input"]), ("answer_prefix", prefix)):
    if not isinstance(text, str):
      raise ValueError(f"{where}: {name}={text!r}; give a text.")
  return Example(fields["input"] + prefix, tuple(map(str, outputs)), fields.get("length"))
