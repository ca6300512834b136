"""Runs, resumes and lists what stands behind the tables: experiments/shared/table_of_runs.py.

Claim: every number of the pages has a run that makes it again.
Commands: python -m experiments.runs                        lists all, and which are done
          python -m experiments.runs --run=needles-three    runs one; repeat the flag for several
          python -m experiments.runs --run=ops --dry_run    prints its commands
Result and cost: those of the runs, which the list shows.
Stopped, a run goes on where it was: finished commands are not begun again, the others go on from what they saved.
What a run reads of others is looked for before anything runs: trained seeds, prepared text, the authors' code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.shared import command, output
from experiments.shared.table_of_runs import RUNS, Run

_REFERENCE = "{reference}"  # in commands: a checkout of the authors' code
# By the flags that name folders of other commands: what such a command leaves there when it ends.
_MARKS = {"checkpoint": "seed-*", "init": "seed-*", "data": "train.bin", "lm_data": "train.bin"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(command.Settings):
  run: tuple[str, ...]
  reference: pathlib.Path | None
  again: bool
  dry_run: bool


def define_flags() -> None:
  command.define_common_flags("record")
  flags.DEFINE_multi_enum("run", [], list(RUNS), "A run; repeat the flag for several. Default: list them.")
  command.define_path("reference", "A checkout of the RAT+ authors' code, which some runs are timed beside.")
  flags.DEFINE_bool("again", False, "Begin finished commands again.")
  flags.DEFINE_bool("dry_run", False, "Print the commands and run none.")


def main(settings: Settings) -> None:
  check(settings)
  done = finished(settings.workdir / "done.jsonl")
  if not settings.run:
    print(listed(done))
    return
  chosen = [(run, line, filled) for run in (RUNS[name] for name in settings.run)
            for line, filled in zip(run.commands, commands(run, settings.reference), strict=True)]
  if not settings.dry_run:
    check_folders([(run, line) for run, line, _ in chosen if settings.again or line not in done])
  for run, line, filled in chosen:
    if settings.dry_run:
      print(f"python -m {filled}")
    elif line in done and not settings.again:
      print(f"done before, in {done[line]:.0f} s: {filled}")
    else:
      begin_with_cells(run)
      seconds = execute(filled)
      record(settings.workdir, line, seconds)


def check(settings: Settings) -> None:
  """Raises ValueError for flags that would change nothing."""
  if not settings.run:
    settings.refuse(("reference", "again", "dry_run"), "without --run the runs are listed; give one, or leave it out.")
  elif not any(_REFERENCE in line for name in settings.run for line in RUNS[name].commands):
    settings.refuse(("reference",), f"--run={','.join(settings.run)} is not timed beside the authors' code; leave it"
                    " out.")
  if settings.dry_run:
    settings.refuse(("again",), "--dry_run prints every command, done or not; leave one of them out.")


def commands(run: Run, reference: pathlib.Path | None) -> list[str]:
  """The run's commands. Raises ValueError where they need the authors' code and it is not given."""
  if reference is None and any(_REFERENCE in line for line in run.commands):
    raise ValueError(f"--run={run.name} is timed beside the RAT+ authors' code; give a checkout of it as --reference.")
  return [line.replace(_REFERENCE, str(reference)) for line in run.commands]


def check_folders(lines: Sequence[tuple[Run, str]]) -> None:
  """Raises ValueError where a command reads a folder that is not filled, and that no command before it fills."""
  filled: set[str] = set()
  for run, line in lines:
    for folder, mark in read_by(line):
      if folder not in filled and not any(pathlib.Path(folder).glob(mark)):
        maker = next(one.name for one in RUNS.values() if any(folder in written_by(other) for other in one.commands))
        raise ValueError(f"--run={run.name} reads {folder}, which has no {mark}; --run={maker} makes it: give that"
                         " first, with --again where it is done.")
    filled |= written_by(line)


def read_by(line: str) -> list[tuple[str, str]]:
  """(folder, what has to be in it) of all that a command reads of other commands."""
  options = [word.lstrip("-").partition("=") for word in shlex.split(line)]
  return [(value.partition("/seed-")[0], _MARKS[name]) for name, _, value in options if name in _MARKS]


def written_by(line: str) -> set[str]:
  """The folder of a command."""
  return {word.partition("=")[2] for word in shlex.split(line) if word.startswith("--workdir=")}


def begin_with_cells(run: Run) -> None:
  """Copies the finished cells that a run's table begins with, once."""
  if run.cells_of is not None:
    theirs, own = (pathlib.Path(folder) / "results.json" for folder in run.cells_of)
    if theirs.exists() and not own.exists():
      output.made(own.parent)
      shutil.copy(theirs, own)


def execute(line: str) -> float:
  """Runs a command and gives its seconds. Raises ValueError where it fails."""
  print(f"python -m {line}", flush=True)
  start = time.perf_counter()
  memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94"} | os.environ  # the largest need what is usually left free
  code = subprocess.run([sys.executable, "-m", *shlex.split(line)], env=memory, check=False).returncode
  if code:
    raise ValueError(f"it ended with {code}: python -m {line}")
  return time.perf_counter() - start  # without the device's name: asking for it would take its memory


def record(folder: pathlib.Path, line: str, seconds: float) -> None:
  """Writes down that a command, as the table has it, came to its end, wherever the authors' code lies."""
  with (output.made(folder) / "done.jsonl").open("a", encoding="utf-8") as file:
    file.write(json.dumps({"command": line, "seconds": seconds}) + "\n")


def finished(path: pathlib.Path) -> dict[str, float]:
  """{command: seconds} of what has come to its end."""
  if not path.exists():
    return {}
  lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  return {line["command"]: line["seconds"] for line in lines}


def listed(done: dict[str, float]) -> str:
  """All runs as a table."""
  rows = []
  for run in RUNS.values():
    ready = sum(line in done for line in run.commands)
    took = f"{run.seconds:,} s on an {run.device}" if run.seconds else "not as a whole"
    rows.append([run.claim, run.name, f"{ready} of {len(run.commands)}", took])
  return output.markdown_table(["claim", "--run", "commands done", "measured"], rows)


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
