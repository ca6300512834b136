"""`sft_niah`: equal arms, resumed runs, stragglers, what a short training learns, text beside needles."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

import rat_jax
from conftest import run_python
from experiments import niah
from rat_jax import Dense, Dilated, RATPlusConfig, RATPlusLM
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.mini_niah import TASKS, evaluation_rows

TOY = ["--seeds=2", "--stages=96x8,128x8", "--shares=0.5", "--layers=1", "--width=16", "--heads=2", "--dtype=float32",
       "--tasks=single_1,multikey_1", "--warmup=2", "--log_every=2", "--save_every=2", "--steps=8"]


def test_all_arms_have_as_many_parameters_and_updates():
  assert run_python("tests/experiments/programs/arms.py").splitlines() == [
      "3737856 16000 True dilated:16+dense", "3737856 16000 False dense", "3737856 16000 False dilated:16+dense",
      "3737856 16000 True dense", "3737856 16000 True dilated:8+dense dilated:16+dense dilated:32+dense"]


def test_a_tiny_model_learns_the_easiest_task_in_seconds():
  batches, rows, length = 100, 32, 16
  model = RATPlusLM(RATPlusConfig(mini_niah.VOCAB_SIZE, 1, 32, 2, init_std=None))
  optimizer = rat_jax.make_optimizer(1e-2, total_steps=batches, warmup_steps=10, min_learning_rate=1e-2)
  made = jax.jit(lambda: mini_niah.batch(evaluation_rows(TASKS["single_1"], batches * rows), length, 0, 0))()
  made = {"tokens": made["tokens"], "targets": np.where(made["answers"], made["targets"], -100)}
  made = {name: np.asarray(x).reshape(batches, rows, length) for name, x in made.items()}
  params = jax.jit(model.init)(jax.random.key(0), made["tokens"][0])["params"]
  state, losses = rat_jax.init_train_state(model, params, optimizer), []
  for i in range(batches):
    state, metrics = rat_jax.train_step(model, optimizer, state, {name: x[i] for name, x in made.items()},
                                        modes=(Dilated(4), Dense()))
    losses.append(metrics["loss"])
  assert np.min(losses[0]) > 5
  sparse, dense = np.mean(losses[-10:], axis=0)  # two symbols of 96 and EOS: chance is 3.0
  assert dense < 0.5, (sparse, dense)
  assert sparse < 1.8, (sparse, dense)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_table(tmp_path):
  """A run that was killed is gone on with on another number of devices."""
  run = functools.partial(run_python, "-m", "experiments.sft_niah", *TOY)
  run(f"--workdir={tmp_path}/whole")
  killed = run(f"--workdir={tmp_path}/halved", kill_at=tmp_path / "halved" / "run" / "4")
  assert "resuming from step" not in killed
  assert not list((tmp_path / "halved").glob("seed-*"))
  saved = max(int(path.name) for path in (tmp_path / "halved" / "run").iterdir() if path.name.isdecimal())
  assert 4 <= saved < 8
  assert f"resuming from step {saved}" in run(f"--workdir={tmp_path}/halved", devices=2)
  lines = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
           for name in ("whole", "halved")]
  assert [line["step"] for line in lines[1]] == [2, 4, 6, 8]
  for one, other in zip(lines[0][-1:], lines[1][-1:], strict=True):
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)
  (_, whole), (_, halved) = (niah.load(f"{tmp_path}/{name}") for name in ("whole", "halved"))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), whole, halved)
  assert "finished before" in run(f"--workdir={tmp_path}/whole")
  for flag, message in (("--lm_weight=1", "of a run with lm_weight=0.1, this one has 1.0"),
                        ("--seeds=3", "do not divide over 2")):
    assert message in run(f"--workdir={tmp_path}/whole", flag, devices=2, check=False)


@pytest.mark.slow
def test_stages_wait_for_no_spare_seed_and_the_best_are_kept(tmp_path):
  run = functools.partial(run_python, "-m", "experiments.sft_niah", *TOY, "--stragglers=1")
  folders = lambda name: sorted(path.name for path in (tmp_path / name).glob("s*-*"))
  assert "below 95% in a task under dense: [0, 1]" in run(f"--workdir={tmp_path}/none")
  assert folders("none") == ["seed-0", "spare-0"]
  every = json.loads((tmp_path / "none" / "seeds.json").read_text())
  assert sorted(one["seed"] for one in every) == [0, 1]
  assert min(every[0]["accuracy"].values()) >= min(every[1]["accuracy"].values())
  assert "finished before" in run(f"--workdir={tmp_path}/none")
  assert "seed-*: 1 seeds, [" in run("--leave_at=0", f"--workdir={tmp_path}/all")
  run("--leave_at=0", "--stop_at=0", f"--workdir={tmp_path}/stopped")
  assert "finished before" in run("--leave_at=0", "--stop_at=0", f"--workdir={tmp_path}/stopped")
  assert "--stragglers=2 of --seeds=2; leave one seed" in run("--stragglers=2", f"--workdir={tmp_path}/x", check=False)
  lengths = [[json.loads(line)["length"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
             for name in ("none", "all", "stopped")]
  assert lengths == [[96, 96, 128, 128], [96, 128, 128, 128], [96, 128]]
  run_python("tests/experiments/programs/seeds_kept.py", "--tasks=single_1,multivalue,multiquery", "--leave_at=0.9",
             "--stragglers=2")


@pytest.mark.slow
@pytest.mark.matrix
def test_a_short_training_learns_the_easiest_task(tmp_path):
  run_python("-m", "experiments.sft_niah", "--seeds=1", "--layers=2", "--width=64", "--heads=2", "--tasks=single_2",
             "--stages=64x32", "--steps=800", "--dilation=8", "--dtype=float32", "--learning_rate=2e-3",
             f"--workdir={tmp_path}", optimize=True)
  # 800 updates, and no stop at the first evaluation that passes: there the loss of a batch is 1.5 to 1.6, by rounding.
  first, *_, last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert last["step"] == 800
  assert min(first["loss"][0]) > 2.5
  assert last["loss"][0][1] < 1.5, last  # of the dense update; log(96) a symbol is chance
  assert last["accuracy"]["single_2"][0] >= 0.98 > first["accuracy"]["single_2"][0]


@pytest.mark.slow
def test_text_is_learned_beside_needles_and_a_memory_is_added(tmp_path):
  """A batch's rows of text are windows of the file; attention trained so is given a memory that learns faster."""
  (tmp_path / "texts").mkdir()
  for i in range(30):
    (tmp_path / "texts" / f"{i}.txt").write_text("".join(chr(97 + (i + j) % 26) for j in range(400)))
  options = [*TOY, "--stages=96x8", "--shares=", "--lm_rows=2", f"--lm_data={tmp_path}/texts"]
  run_python("tests/experiments/programs/text_rows.py", *options, f"--workdir={tmp_path}/none")
  run_python("-m", "experiments.sft_niah", *options, "--arm=attention", f"--workdir={tmp_path}/attention")
  run_python("-m", "experiments.sft_niah", *options, "--arm=ratplus", "--memory_rate=10",
             f"--init={tmp_path}/attention", f"--workdir={tmp_path}/memory")
  config, params = niah.load(str(tmp_path / "memory"))
  _, before = niah.load(str(tmp_path / "attention"))
  assert (config.memory, config.gate_bias, config.mlp_dim) == (True, -12.0, 4 * 16 + 8)
  assert (np.abs(np.asarray(params["layers"]["memory_gate"])).max(axis=(1, 2, 3, 4)) > 1e-4).all()
  moved = np.abs(np.asarray(params["layers"]["memory_gate_bias"]) + 12).max()
  assert moved > 2 * np.abs(np.asarray(params["layers"]["query"] - before["layers"]["query"])).max()
