"""The table of runs: every command is one, and what is done is not done again."""

from __future__ import annotations

import importlib
import json
import re
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


def test_every_training_has_a_folder_of_its_own():
  folders = {}
  for run in RUNS.values():
    for line in run.commands:
      if line.startswith("experiments.sft_niah"):
        folders.setdefault(*runs.written_by(line), set()).add(line)
  assert len(folders) > 10
  assert all(len(lines) == 1 for lines in folders.values())
  assert "runs/niah/words" not in folders  # where `sft_niah --text` writes by itself


def test_what_a_run_reads_is_there_or_made_before_it(tmp_path, monkeypatch):
  toys = {"train": Run("train", "Nothing.", (f"experiments.sft_niah --workdir={tmp_path}/a",)),
          "table": Run("table", "Nothing.", (f"experiments.eval_niah --checkpoint={tmp_path}/a --workdir={tmp_path}/t",
                                             f"experiments.eval_lm --checkpoint={tmp_path}/a/seed-1"))}
  monkeypatch.setattr(runs, "RUNS", toys)
  lines = lambda *names: [(toys[name], line) for name in names for line in toys[name].commands]
  runs.check_folders(lines("train", "table"))
  for names in (("table",), ("table", "train")):
    with pytest.raises(ValueError, match=rf"--run=table reads {tmp_path}/a, which has no seed-\*; --run=train makes it:"
                                         r" give that first, with --again where it is done."):
      runs.check_folders(lines(*names))
  (tmp_path / "a" / "run").mkdir(parents=True)  # a training that was stopped
  with pytest.raises(ValueError, match="--run=train makes it"):
    runs.check_folders(lines("table"))
  (tmp_path / "a" / "seed-0").mkdir()
  runs.check_folders(lines("table"))


@pytest.mark.parametrize("name, message", [
    ("controls", r"--run=controls reads runs/niah/ratplus, which has no seed-\*; --run=needles makes it"),
    ("long", r"--run=long reads runs/niah/ratplus, which has no seed-\*; --run=needles makes it"),
    ("hypotheses", r"--run=hypotheses reads runs/niah/ratplus, which has no seed-\*; --run=needles makes it")])
def test_a_run_without_what_it_reads_begins_nothing(name, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=message):
    runs.main(settings(runs, f"--run={name}"))
  assert not list(tmp_path.iterdir())


def test_the_data_of_a_run_are_made_by_it(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("retrofit", "pretrain"):
    runs.check_folders([(RUNS[name], line) for line in RUNS[name].commands])
    with pytest.raises(ValueError, match=rf"which has no train\.bin; --run={name} makes it"):
      runs.check_folders([(RUNS[name], line) for line in RUNS[name].commands[1:]])


@pytest.mark.parametrize("given, message", [
    (["--again"], "--again: without --run the runs are listed; give one, or leave it out."),
    (["--reference=x", "--dry_run"], "--reference, --dry_run: without --run the runs are listed"),
    (["--run=ops", "--reference=x"], "--reference: --run=ops is not timed beside the authors' code; leave it out."),
    (["--run=ops", "--dry_run", "--again"], "--again: --dry_run prints every command, done or not; leave one of")])
def test_flags_that_would_change_nothing_are_refused(given, message, tmp_path):
  with pytest.raises(ValueError, match=re.escape(message)):
    runs.main(settings(runs, f"--workdir={tmp_path}/record", *given))


@pytest.mark.slow
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
