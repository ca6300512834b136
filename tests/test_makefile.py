"""An environment of `make` keeps its Python: another one is refused, and `make clean` removes what `make` made."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from conftest import ROOT


def write_program(path, said):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/sh\necho {said}\n")
  path.chmod(0o755)


@pytest.fixture
def clone(tmp_path):
  """A folder with the Makefile and a made environment, whose programs say what they are."""
  for name in ("requirements.txt", "pyproject.toml", "Makefile"):
    shutil.copyfile(ROOT / name, tmp_path / name)
  for name in ("ruff", "mypy"):
    write_program(tmp_path / ".venv" / "bin" / name, name)
  write_program(tmp_path / ".venv" / "bin" / "python", "Python 3.12.1")
  write_program(tmp_path / "same", "Python 3.12.1")
  write_program(tmp_path / "other", "Python 3.13.0")
  for name in ("python", "core", "dev"):
    (tmp_path / ".venv" / name).touch()
  return tmp_path


def make(folder, *arguments):
  """Without what a `make test` around this one hands on, such as its PYTHON=."""
  return subprocess.run(["make", "--silent", *arguments], cwd=folder, env={"PATH": os.environ["PATH"]},
                        capture_output=True, text=True, check=False)


def test_an_environment_of_another_python_is_refused(clone):
  for arguments in ((), ("PYTHON=./same",)):
    done = make(clone, "lint", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ruff\nmypy\n", "")
  done = make(clone, "lint", "PYTHON=./other")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.splitlines()[0] == (
      ".venv has Python 3.12.1, and PYTHON=./other is Python 3.13.0; run make clean first, or take another folder:"
      " VENV=.venv-other")


def test_clean_removes_the_environments_that_make_made(clone):
  for name in (".venv-newest/python", ".venv-mine/pyvenv.cfg", "build/lib/x"):
    (clone / name).parent.mkdir(parents=True)
    (clone / name).touch()
  assert make(clone, "clean").returncode == 0
  assert sorted(path.name for path in clone.iterdir()) == [
      ".venv-mine", "Makefile", "other", "pyproject.toml", "requirements.txt", "same"]
