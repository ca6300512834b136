"""Two processes of four devices each: the numbers of one process of eight, and checkpoints that any mesh reads."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from conftest import ROOT
from rat_jax.data import BYTES, prepare
from rat_jax.parallel import make_mesh
from rat_jax.parallel.processes import check_agreement, from_rows, rows_of_process, together
from rat_jax.train import Checkpoints

SIZES = ["--layers=2", "--width=16", "--heads=2", "--kv_heads=1", "--dtype=float32", "--length=24", "--batch_size=8",
         "--mode=dilated:4,window=2", "--mode=dense", "--documents_apart", "--log_every=1", "--learning_rate=1e-2",
         "--warmup=0.5"]


def python(*arguments, devices=8, **environment):
  """A process of its own."""
  flags_of_xla = f"--xla_force_host_platform_device_count={devices} --xla_cpu_parallel_codegen_split_count=1"
  return subprocess.Popen(
      [sys.executable, *arguments], cwd=ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags_of_xla,
                        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"
                        } | environment,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def training(folder, data, *flags):
  return "-m", "experiments.pretrain", f"--workdir={folder}", f"--data={data}", *SIZES, *flags


def start(folder, data, *flags, devices=8):
  """A training in a process of its own."""
  return python(*training(folder, data, *flags), devices=devices)


def two(*arguments, devices=4):
  """Two processes of some devices each, with the arguments of each."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1] - 1  # the one after it is taken
  return [python(*each, devices=devices, MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
          for rank, each in enumerate(arguments)]


def start_two(folder, data, *flags):
  """The same training as two processes of four devices, with the flags of each."""
  return two(*(training(folder, data, "--distributed", *each) for each in flags))


def ended(*processes, code=0):
  """What they printed, when all have ended with a code."""
  printed = [process.communicate(timeout=300)[0] for process in processes]
  for process, text in zip(processes, printed, strict=True):
    assert (process.returncode != 0) == bool(code), text[-3000:]
  return printed


def losses(folder):
  return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_parameters(one, other):
  """Asserts that the newest checkpoints of two folders hold the same parameters, but for rounding."""
  (_, ours, _), (_, theirs, _) = (Checkpoints(folder / "checkpoints").load_params() for folder in (one, other))
  for (path, x), y in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
    away = np.linalg.norm(np.asarray(x) - np.asarray(y)) / np.linalg.norm(np.asarray(y))
    assert away < 2e-4, (jax.tree_util.keystr(path), away)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  text = folder / "text.txt"
  text.write_text("\n".join(f"{i} squared is {i * i}." for i in range(400)), encoding="utf-8")
  prepare(text, folder / "prepared", tokenizer=BYTES)
  return folder / "prepared"


MESH = "--mesh=data:2,fsdp:2,context:2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
  """Folders of four batches in one process, "one", and in two, "two"; and what the two printed."""
  folder = tmp_path_factory.mktemp("trained")
  steps = [MESH, "--steps=4", "--save_every=2"]
  ended(start(folder / "one", data, *steps))
  return folder, ended(*start_two(folder / "two", data, steps, steps))


@pytest.mark.slow
def test_two_processes_are_one(trained):
  folder, (first, second) = trained
  np.testing.assert_allclose(losses(folder / "two"), losses(folder / "one"), rtol=1e-5)
  same_parameters(folder / "two", folder / "one")
  assert "parameters, 4 batches of 8 x 24 tokens" in first
  assert "parameters" not in second  # the first alone prints


@pytest.mark.slow
@pytest.mark.mesh
def test_what_two_processes_saved_goes_on_in_one_of_any_devices(trained, data, tmp_path):
  folder, _ = trained
  for name, source in (("one", "one"), ("of two", "two"), ("of eight", "two")):
    shutil.copytree(folder / source, tmp_path / name)
  ended(start(tmp_path / "one", data, MESH, "--steps=6"))
  ended(start(tmp_path / "of two", data, "--mesh=fsdp:2", "--steps=6", "--resume=must", devices=2))
  ended(start(tmp_path / "of eight", data, "--mesh=fsdp:8", "--steps=6"))
  for name in ("of two", "of eight"):
    np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "one"), rtol=1e-5)
    same_parameters(tmp_path / name, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.mesh
def test_processes_that_disagree_say_so_before_the_first_step(tmp_path, data):
  printed = ended(*start_two(tmp_path, data, ["--steps=2", "--seed=1"], ["--steps=2", "--seed=2"]), code=1)
  for rank, text in enumerate(printed):
    message = rf"error: process {rank} of 2 has --seed={rank + 1}, and another process has something else"
    assert re.search(message, text), text[-2000:]
  assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_what_fails_in_one_process_fails_in_both(tmp_path):
  """In `checkpoints.py`: disks that are full, files that are gone or may not be read now, in one process each time."""
  old = shutil.copytree(ROOT / "tests" / "fixtures" / "version_0_1" / "checkpoints", tmp_path / "old")
  printed = ended(*two(*[["-m", "parallel.checkpoints", str(tmp_path), str(old)]] * 2, devices=2))
  found = [json.loads(text.rpartition("FOUND")[2].splitlines()[0]) for text in printed]
  damaged = "CHECKPOINT 2 .* IS DAMAGED: 2/"
  full, other = "No space left on device", "process {} could not do its part"
  none = [damaged.replace("2", step) for step in "210"]
  for case, outcomes, warned, there in [
      ("intact", [2, 2], [], "0 1 2"),
      ("a full disk of the second", [other.format(1), full], [], "0 1 2"),
      ("a full disk of the first", [full, other.format(0)], [], "0 1 2"),
      ("a rename that fails", ["Stale file handle", other.format(0)], [], "0 1 2"),
      ("not now", [f"2/state cannot be read, and may be whole: {other.format(1)}",
                   "2/state cannot be read, and may be whole: PERMISSION_DENIED"], [], "0 1 2"),
      ("none that one can read", [r"none of the checkpoints \[0, 1, 2\] in .* is intact"] * 2, none, "0 1 2"),
      ("damaged", [damaged] * 2, [], "0 1 2"),
      ("walk back", [1, 1], [damaged], "0 1 damaged-2"),
      ("save again", [None, None], [], "0 1 2 damaged-2"),
  ]:
    for rank, expected in enumerate(outcomes):
      outcome, warnings, names = found[rank][case]
      same = re.search(expected, outcome[1]) if isinstance(expected, str) else outcome == expected
      assert same, (case, rank, outcome)
      assert all(re.search(*both) for both in zip(warned, warnings, strict=True)), (case, rank, warnings)
      assert names == there.split(), (case, rank)
  assert [each["version 0.1"] for each in found] == [[True, 2]] * 2
  for each, said in zip(found, ["model exists and is not empty", other.format(0)], strict=True):
    first, same, again = each["a folder of the model"]
    assert (first, same) == (None, True)
    assert said in again[1]


@pytest.mark.slow
@pytest.mark.mesh
def test_a_run_without_an_intact_checkpoint_ends_in_one_line(tmp_path, data):
  about = tmp_path / "checkpoints" / "1" / "about" / "metadata"
  about.parent.mkdir(parents=True)
  about.write_text("no JSON")
  for text in ended(*start_two(tmp_path, data, *[["--mesh=fsdp:8", "--steps=2"]] * 2), code=1):
    assert re.search(r"^error: none of the checkpoints \[1\] in .* is intact\.$", text, re.MULTILINE), text[-2000:]
    assert "Traceback" not in text
  assert about.read_text() == "no JSON"


def test_one_process_reads_all_rows_and_agrees_with_itself():
  mesh = make_mesh(devices=jax.devices()[:1])
  assert rows_of_process(mesh, 6).tolist() == list(range(6))
  rows = np.arange(12).reshape(6, 2)
  np.testing.assert_array_equal(from_rows({"tokens": rows}, mesh, 6)["tokens"], rows)
  check_agreement({"seed": 1})
  assert together(lambda: 3) == 3
  for is_damage in (lambda error: False, lambda error: True):
    with pytest.raises(ZeroDivisionError):
      together(lambda: 1 // 0, is_damage)
