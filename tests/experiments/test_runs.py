"""The table of runs: every command is one, and what is done is not done again."""

from __future__ import annotations

import importlib
import json
import shlex

import pytest

from experiments import runs
from experiments.shared.table_of_runs import RUNS, Run
from tests.experiments.command_line import settings


@pytest.mark.parametrize("name", RUNS)
def test_every_command_of_a_run_has_flags_that_its_script_takes(name, tmp_path):
  for line in runs.commands(RUNS[name], tmp_path):
    module, *arguments = shlex.split(line)
    if module != "pytest":
      found = settings(importlib.import_module(module), *arguments)
      assert found.given == {argument.lstrip("-").partition("=")[0].removeprefix("no") for argument in arguments}


def test_tables_are_of_folders_that_the_run_or_one_before_it_trains():
  made = {"runs/data"}
  for run in RUNS.values():
    for line in run.commands:
      words = shlex.split(line)
      given = {word.partition("=")[2] for word in words if word.startswith(("--checkpoint=", "--init=", "--data="))}
      assert {folder.partition("/seed-")[0] for folder in given} <= made | {"runs/gpu/data"}, line
      made |= {word.partition("=")[2] for word in words if word.startswith("--workdir=")}


def test_what_is_done_is_not_done_again_and_a_failure_ends_it(tmp_path, monkeypatch, capsys):
  toys = {"toy": Run("toy", "Nothing.", ("experiments.costs --preset=tiny --length=64 --mode=dense"
                                         f" --workdir={tmp_path}/costs",), cells_of=(f"{tmp_path}/a", f"{tmp_path}/b")),
          "wrong": Run("wrong", "Nothing.", (f"experiments.costs --preset=none --workdir={tmp_path}/none",)),
          "beside": Run("beside", "Nothing.", (
              'experiments.costs --preset=tiny --length=64 --mode=dense "--workdir={reference}"',))}
  monkeypatch.setattr(runs, "RUNS", toys)
  monkeypatch.setattr("experiments.shared.table_of_runs.RUNS", toys)
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "results.json").write_text("{}")
  ask = lambda *names, **changes: runs.main(runs.Settings(workdir=tmp_path / "record", run=names, **{
      "reference": None, "again": False, "dry_run": False, **changes}))
  ask("toy", dry_run=True)
  assert not (tmp_path / "record").exists()
  ask("toy")
  assert (tmp_path / "costs" / "table.md").exists()
  assert (tmp_path / "b" / "results.json").read_text() == "{}"
  line, = map(json.loads, (tmp_path / "record" / "done.jsonl").read_text().splitlines())
  assert line["command"] == toys["toy"].commands[0]
  (tmp_path / "costs" / "table.md").unlink()
  ask("toy")
  assert not (tmp_path / "costs" / "table.md").exists()
  ask("toy", again=True)
  assert (tmp_path / "costs" / "table.md").exists()
  with pytest.raises(ValueError, match=r"it ended with 1: python -m experiments\.costs --preset=none"):
    ask("wrong")
  with pytest.raises(ValueError, match="--run=beside is timed beside the RAT\\+ authors' code; give a checkout"):
    ask("beside")
  ask("beside", reference=tmp_path / "authors")  # a costs command, in the folder that is named
  assert (tmp_path / "authors" / "table.md").exists()
  assert json.loads((tmp_path / "record" / "done.jsonl").read_text().splitlines()[-1])["command"] == (
      toys["beside"].commands[0])
  capsys.readouterr()
  ask("beside", reference=tmp_path / "elsewhere")
  assert "done before" in capsys.readouterr().out
  capsys.readouterr()
  ask()
  assert "| Nothing. |    toy |        1 of 1 | not as a whole |" in capsys.readouterr().out
