"""What commands write, and read again: JSON, Markdown tables, and the notes by which a run knows its checkpoint."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from rat_jax.convert.tensors import read_json as read_object
from rat_jax.parallel import processes
from rat_jax.train import Checkpoints


def made(folder: pathlib.Path) -> pathlib.Path:
  """The folder, made if it is not there."""
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def say(text: str) -> None:
  """Prints it, in the first of several processes."""
  if processes.is_first():
    print(text, flush=True)


def write_json(path: pathlib.Path, result: Any, indent: int | None = 2) -> None:
  """Writes it whole or not at all."""
  beside = path.with_name(path.name + ".new")
  beside.write_text(json.dumps(result, indent=indent) + "\n", encoding="utf-8")
  os.replace(beside, path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object that `write_json` wrote; {} where there is nothing yet. Raises ValueError that names any other file."""
  return read_object(path, "move it away to start anew") if path.exists() else {}


def resumes(resume: str, checkpoints: Checkpoints) -> bool:
  """Whether a run goes on from its newest checkpoint, under --resume. Raises ValueError where that is not to be."""
  steps = checkpoints.steps()
  if resume == "must" and not steps:
    raise ValueError(f"--resume=must: {checkpoints.folder} holds no checkpoint; give the --workdir of the run that is"
                     " to go on, or --resume=auto.")
  if resume == "never" and steps:
    raise ValueError(f"--resume=never: {checkpoints.folder} holds a checkpoint of step {steps[-1]}; give another"
                     " --workdir, or --resume=auto to go on from it.")
  return bool(steps)


_DATA_PATHS = ("source", "lm_data")  # in notes: where the data of "data_sha256" lie


def check_same_run(folder: pathlib.Path, saved: dict[str, Any], notes: dict[str, Any]) -> None:
  """Raises ValueError where a checkpoint's notes differ from what this run would write of itself.

  Data are known by their "data_sha256", wherever they lie; by their path where one of the two has no digest.
  """
  known = bool(saved.get("data_sha256") and notes.get("data_sha256"))
  for name, value in notes.items():
    if name in (_DATA_PATHS if known else ("data_sha256",)):
      continue
    if saved.get(name) != value:
      raise ValueError(f"the checkpoint in {folder} is of a run with {name}={saved.get(name)!r}, this one has"
                       f" {value!r}; use another --workdir, or the setting of that run.")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
  """A Markdown table whose columns line up in plain text too."""
  widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
  align = [str.ljust] + [str.rjust] * (len(header) - 1)
  lines = [[a(cell, w) for a, cell, w in zip(align, row, widths, strict=True)] for row in [header, *rows]]
  rule = ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]]
  return "\n".join("| " + " | ".join(cells) + " |" for cells in [lines[0], rule, *lines[1:]])
