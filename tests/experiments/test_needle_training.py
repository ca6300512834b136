"""`sft_niah`: equal arms, resumed runs, stragglers, what a short training learns, text beside needles."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re

import jax
import numpy as np
import pytest

import rat_jax
from conftest import run_python
from experiments import sft_niah
from experiments.needles import curriculum, seeds, spares
from rat_jax import Dense, Dilated, RATPlusConfig, RATPlusLM
from rat_jax.data import BYTES
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.mini_niah import TASKS, evaluation_rows
from tests.experiments import command_line

TOY = ["--seeds=2", "--stages=96x8,128x8", "--shares=0.5", "--layers=1", "--width=16", "--heads=2", "--dtype=float32",
       "--tasks=single_1,multikey_1", "--warmup=2", "--log_every=2", "--save_every=2", "--steps=8"]


SETTINGS = sft_niah.Settings(
    workdir=pathlib.Path("none"), text=False, tokenizer=BYTES, ruler=None, essay=None, epochs=4.0, answer_room=128,
    arm="ratplus", seeds=3, steps=None, tasks=tuple(TASKS), stages=(), shares=None, leave_at=0.9, stragglers=0,
    stop_at=None, init=None, mode=(), learning_rate=None, warmup=300, lm_weight=0.1, lm_data=None, lm_rows=0,
    gate_bias=-12.0, memory_rate=1.0, dilation=16, layers=4, width=256, heads=4, dtype="bfloat16", log_every=100,
    examples=210, save_every=2000, resume="auto")


def settings(**changes):
  return dataclasses.replace(SETTINGS, **changes)


def test_all_arms_have_as_many_parameters_and_updates():
  found = []
  for arm in sft_niah.STEPS_OF:
    of_arm = settings(arm=arm)
    model, sets = RATPlusLM(sft_niah.configuration(of_arm)), sft_niah.mode_sets(of_arm)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8), np.int32))
    size = sum(x.size for x in jax.tree.leaves(shapes))
    found.append((size, of_arm.batches * len(sets[0]), model.config.memory, *("+".join(map(str, one)) for one in sets)))
  assert found == [
      (3737856, 16000, True, "dilated:16+dense"), (3737856, 16000, False, "dense"),
      (3737856, 16000, False, "dilated:16+dense"), (3737856, 16000, True, "dense"),
      (3737856, 16000, True, "dilated:8+dense", "dilated:16+dense", "dilated:32+dense")]


def test_the_default_curriculum_grows_and_a_stage_holds_every_task():
  plan = curriculum.stages((), None, tuple(TASKS), 8000)
  assert [(stage.length, stage.rows, stage.until) for stage in plan] == [
      (128, 128, 4800), (256, 64, 5600), (512, 48, 6000), (1024, 32, 8000)]
  two = ("single_1", "multikey_1")
  assert [sum(rows.count for rows in curriculum.Stage(64, n, 1, two).mixture) for n in (4, 5, 7)] == [4, 5, 7]
  with pytest.raises(ValueError, match="less than two rows for each of 2 tasks"):
    print(curriculum.Stage(64, 3, 1, two).mixture)
  for stages, shares, told in ((("64",), None, "--stages=64; write each as length x rows"),
                               (("64x8", "96x8"), None, "--shares= for 2 stages; give one share less"),
                               (("64x8", "96x8"), ("x",), "--shares=x; write each as a number"),
                               (("64x8", "96x8"), ("1",), "--shares=1; they must rise")):
    with pytest.raises(ValueError, match=told):
      curriculum.stages(stages, shares, two, 8)


def test_a_stage_without_room_is_said_before_anything_is_written(tmp_path):
  of_run = settings(workdir=tmp_path / "run", stages=("128x16", "30x16"), shares=("0.5",), given=frozenset({"workdir"}))
  for changes, message in (
      ({}, "--stages=30x16: length=30 leaves 14 tokens of context to multivalue with 1 questions, too few for 4"),
      ({"tasks": ("multikey_1",)},  # asked of four keys, and trained on one
       "--stages=30x16: length=30 leaves 23 tokens of context to multikey_1 with 1 questions, too few for 4 needles"),
      ({"stages": ("128x4", "256x4")}, "--stages=128x4 has less than two rows for each of 8 tasks")):
    with pytest.raises(ValueError, match=message):
      sft_niah.main(dataclasses.replace(of_run, **changes))
  assert not list(tmp_path.iterdir())


def test_a_run_does_not_write_over_what_it_starts_from(tmp_path):
  write_texts(tmp_path / "texts")
  there = sorted(tmp_path.iterdir())
  beside = dict(lm_data=tmp_path / "texts", lm_rows=2, given=frozenset({"workdir"}))
  for init, text in ((f"{tmp_path}/a,{tmp_path}/b", False), (f"{tmp_path}/x/../b", False), (f"{tmp_path}/b", True)):
    with pytest.raises(ValueError, match=f"--init={init} is the --workdir too, where the run would write over it"):
      sft_niah.main(settings(workdir=tmp_path / "b", init=init, text=text, **beside))
  assert sorted(tmp_path.iterdir()) == there
  with pytest.raises(ValueError, match="--init=runs/niah/ratplus is the --workdir too"):
    sft_niah.main(settings(init="runs/niah/ratplus"))


def test_models_of_words_have_a_folder_of_their_own(monkeypatch):
  found = []
  monkeypatch.setattr(sft_niah.words, "fine_tune", lambda of_run, *_, **__: found.append(of_run.workdir))
  sft_niah.main(settings(text=True, init="runs/pretrain/checkpoints"))
  assert found == [pathlib.Path("runs/niah/words")]


@pytest.mark.parametrize("given, message", [
    (["--gate_bias=-3"], "--gate_bias: it is where the gates start of a memory that is added to --init, and none is"),
    (["--gate_bias=-3", "--init=a"], "--gate_bias: it is where the gates start of a memory that is added to --init"),
    (["--init=a", "--seeds=5"], "--init=a holds 3 seeds; use --seeds=3 or less."),
    (["--memory_rate=10", "--arm=attention"], "--memory_rate: --arm=attention has no memory; leave it out."),
    (["--dilation=8", "--mode=dense"], "--dilation: it is of ARL with one dilation, which --arm=ratplus with --mode"),
    (["--dilation=8", "--arm=ratplus_mixed"], "--dilation: it is of ARL with one dilation, which --arm=ratplus_mixed"),
    (["--leave_at=0.8", "--stages=128x32"], "--leave_at: a single stage is left by no accuracy; give --stop_at, or"),
    (["--mode=snapkv:80"], "--mode=snapkv:80: SnapKV compresses when the prompt ends, and what is trained on has no"),
    (["--mode=per_layer:[dense;dense]"], "modes has 2 entries and the model num_layers=4")])
def test_flags_that_would_change_nothing_are_refused(given, message, tmp_path, monkeypatch):
  config = RATPlusConfig(mini_niah.VOCAB_SIZE, 4, 16, 2)
  monkeypatch.setattr(sft_niah, "load", lambda _: (config, {"embedding": np.zeros((3, 1))}))
  with pytest.raises(ValueError, match=re.escape(message)):
    sft_niah.main(command_line.settings(sft_niah, f"--workdir={tmp_path}/run", *given))
  assert not list(tmp_path.iterdir())


def test_seeds_that_pass_leave_a_stage_and_the_best_are_kept():
  accuracy = np.array([[0.9, 0.2, 0.95], [1, 1, 0.8], [0.89, 1, 1]])
  assert spares.passes(accuracy, ("single_1", "multivalue", "multiquery"), 0.9).tolist() == [True, False, False]
  kept = [spares.keep(np.array(worst), 2).tolist() for worst in ([95, 99, 96, 100], [40, 99, 60, 30], [0, 95, 1, 97])]
  assert kept == [[True, True, False, False], [False, True, True, False], [False, True, False, True]]


@pytest.mark.slow
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
@pytest.mark.faults
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
  (_, whole), (_, halved) = (seeds.load(f"{tmp_path}/{name}") for name in ("whole", "halved"))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), whole, halved)
  assert "finished before" in run(f"--workdir={tmp_path}/whole")
  for flag, message in (("--lm_weight=1", "of a run with lm_weight=0.1, this one has 1.0"),
                        ("--seeds=3", "do not divide over 2")):
    assert message in run(f"--workdir={tmp_path}/whole", flag, devices=2, check=False)


@pytest.mark.slow
@pytest.mark.scripts
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


def write_texts(folder):
  folder.mkdir()
  for i in range(26):
    (folder / f"{i}.txt").write_text("".join(chr(97 + (i + j) % 26) for j in range(400)))


@pytest.mark.slow
def test_rows_of_text_are_windows_of_the_file(tmp_path):
  write_texts(tmp_path / "texts")
  beside = settings(workdir=tmp_path / "run", stages=("96x8",), tasks=("single_1", "multikey_1"), lm_rows=2,
                    lm_data=tmp_path / "texts")
  text = np.asarray(sft_niah.text_of(beside).tokens)
  (stage,) = curriculum.stages(beside.stages, (), beside.tasks, 8)
  batch_of = functools.partial(curriculum.batch_of, stage, 3, 5, lm_weight=0.1, lm_rows=2)
  made, alone = ({name: np.asarray(x) for name, x in one.items()} for one in (batch_of(text), batch_of()))
  assert (made["tokens"].shape, alone["tokens"].shape) == ((10, 96), (8, 96))
  for name in made:
    np.testing.assert_array_equal(made[name][:8], alone[name])
  whole = bytes(text)
  for tokens, targets in zip(made["tokens"][8:], made["targets"][8:], strict=True):
    assert bytes(tokens.astype(np.uint8)) in whole
    assert ((targets == np.append(tokens[1:], targets[-1])) | (tokens == 0)).all()
    assert (targets[tokens == 0] == -100).all()
  np.testing.assert_allclose(made["weights"][8:].sum(), 1, rtol=1e-5)
  with pytest.raises(ValueError, match=r"has \d+ tokens; a row takes 100001, use more"):
    sft_niah.text_of(dataclasses.replace(beside, stages=("100000x8",)))
  with pytest.raises(ValueError, match="--lm_rows=2 without --lm_data; give a folder"):
    sft_niah.text_of(dataclasses.replace(beside, lm_data=None))
  with pytest.raises(ValueError, match="--lm_data: without --lm_rows none of it is read"):
    sft_niah.text_of(dataclasses.replace(beside, lm_rows=0, given=frozenset({"lm_data"})))


@pytest.mark.slow
@pytest.mark.scripts
def test_text_is_learned_beside_needles_and_a_memory_is_added(tmp_path):
  """Attention that is trained on needles and text is given a memory, which learns faster."""
  write_texts(tmp_path / "texts")
  options = [*TOY, "--stages=96x8", "--shares=", "--lm_rows=2", f"--lm_data={tmp_path}/texts"]
  run_python("-m", "experiments.sft_niah", *options, "--arm=attention", f"--workdir={tmp_path}/attention")
  run_python("-m", "experiments.sft_niah", *options, "--arm=ratplus", "--memory_rate=10",
             f"--init={tmp_path}/attention", f"--workdir={tmp_path}/memory")
  config, params = seeds.load(str(tmp_path / "memory"))
  _, before = seeds.load(str(tmp_path / "attention"))
  assert (config.memory, config.gate_bias, config.mlp_dim) == (True, -12.0, 4 * 16 + 8)
  assert (np.abs(np.asarray(params["layers"]["memory_gate"])).max(axis=(1, 2, 3, 4)) > 1e-4).all()
  moved = np.abs(np.asarray(params["layers"]["memory_gate_bias"]) + 12).max()
  assert moved > 2 * np.abs(np.asarray(params["layers"]["query"] - before["layers"]["query"])).max()
