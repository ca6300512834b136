"""Checkpoints that are refused or interrupted, and what the loop refuses at its start: nothing good is lost."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rat_jax
from conftest import run_python
from rat_jax import RATPlusConfig, RATPlusLM
from rat_jax.convert import mapping
from rat_jax.leaves import shapes_of
from rat_jax.train import Checkpoints, TrainState, train

CONFIG = RATPlusConfig(8, 1, 8, 2)
MODEL, OPTIMIZER = RATPlusLM(CONFIG), rat_jax.make_optimizer(1e-2, total_steps=9)


def params_of(config=CONFIG, value=1, dtype="float32"):
  return mapping.tree(((name, np.full(shape, value, dtype)) for name, shape in shapes_of(config).items()),
                      lambda name, leaf: jnp.asarray(leaf))


def state_of(step=5, **fields):
  return dataclasses.replace(rat_jax.init_train_state(MODEL, params_of(**fields), OPTIMIZER), step=jnp.int32(step))


def kept(checkpoints):
  """(steps, the value of every parameter, notes), and that no folder is left of a checkpoint that was moved."""
  assert [path.name for path in checkpoints.folder.iterdir()] == [str(step) for step in checkpoints.steps()]
  _, params, notes = checkpoints.load_params()
  (value,) = {float(x) for leaf in jax.tree.leaves(params) for x in np.unique(leaf)}
  return checkpoints.steps(), value, notes


@pytest.mark.parametrize(("notes", "message"), [
    ({"a": np.float32(1)}, "notes['a']=np.float32(1.0) is no plain JSON: Object of type float32 is not JSON serial"),
    ({"ok": 1, "b": [{1}]}, "notes['b']=[{1}] is no plain JSON: "), ({(1, 2): 3}, "notes[(1, 2)]=3 is no plain JSON: "),
    ([1], "notes=[1]; give a dict."),
])
def test_notes_that_are_no_json_harm_nothing(notes, message, tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state_of(value=1), CONFIG, {"ok": 1})
  for call in (lambda: checkpoints.save(state_of(value=2), CONFIG, notes),
               lambda: train(MODEL, OPTIMIZER, state_of(), lambda step: 1 / 0, steps=9, checkpoints=checkpoints,
                             notes=notes)):
    with pytest.raises(ValueError, match=re.escape(message)):
      call()
  assert kept(checkpoints) == ([5], 1, {"ok": 1})


@pytest.mark.parametrize("fails", ["orbax.checkpoint.PyTreeCheckpointHandler.save",
                                   "orbax.checkpoint.PyTreeCheckpointHandler.finalize", "pathlib.Path.rename"])
def test_a_checkpoint_of_the_same_step_stays_until_the_new_one_is_whole(fails, tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(state_of(value=1), CONFIG, {"ok": 1})

  def full(where, *paths, rename=pathlib.Path.rename, **_):
    if paths and isinstance(where, pathlib.Path) and where.name != "unfinished":  # what makes room is moved, and back
      return rename(where, *paths)
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(fails, full)
    with pytest.raises(OSError, match="No space left"):
      checkpoints.save(state_of(value=2), CONFIG, {"ok": 2})
  assert kept(checkpoints) == ([5], 1, {"ok": 1})
  checkpoints.save(state_of(value=2), CONFIG, {"ok": 2})
  assert kept(checkpoints) == ([5], 2, {"ok": 2})


def test_a_checkpoint_that_a_killed_run_had_moved_goes_back(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(state_of(value=1), CONFIG, {"ok": 1})
  (tmp_path / "5").rename(tmp_path / "replaced-5")
  assert checkpoints.steps() == [5]
  assert checkpoints.load_params()[2] == {"ok": 1}
  assert (tmp_path / "replaced-5").is_dir()  # what only reads moves nothing
  checkpoints.restore(state_of(), CONFIG)
  assert kept(checkpoints) == ([5], 1, {"ok": 1})
  (tmp_path / "5").rename(tmp_path / "replaced-5")
  checkpoints.save(state_of(value=2), CONFIG, {"ok": 2})
  assert kept(checkpoints) == ([5], 2, {"ok": 2})


def test_what_verify_tells(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(FileNotFoundError, match="holds no checkpoint; "):
    checkpoints.verify()
  for step in (4, 5):
    checkpoints.save(state_of(step), CONFIG, {})
  assert (checkpoints.verify(), checkpoints.verify(4)) == (5, 4)
  with pytest.raises(FileNotFoundError, match=r"holds no checkpoint of step 3; it holds those of \[4, 5\]"):
    checkpoints.verify(3)
  about = tmp_path / "5" / "about" / "metadata"
  about.write_text(re.sub(r'"sums": \["[0-9a-f]{2}', '"sums": ["..', about.read_text(), count=1))
  with pytest.raises(ValueError, match=r"CHECKPOINT 5 .* IS DAMAGED: 5/state: .* is not what was written"):
    checkpoints.verify()
  shutil.rmtree(tmp_path / "4" / "state")
  with pytest.raises(ValueError, match=r"CHECKPOINT 4 .* IS DAMAGED: 4/state: "):
    checkpoints.verify(4)
  assert checkpoints.steps() == [4, 5]


@pytest.mark.slow
@pytest.mark.mesh
def test_a_file_that_is_gone_is_passed_over_on_a_mesh(tmp_path):
  run_python("-W", "ignore", "-c", """
import dataclasses, pathlib, sys
from parallel.checkpoints import CONFIG, fresh_state
from rat_jax.parallel import make_mesh
from rat_jax.train import Checkpoints
folder, mesh = pathlib.Path(sys.argv[1]), make_mesh("fsdp:4,data:2")
state, checkpoints = fresh_state(mesh), Checkpoints(folder)
for step in (0, 1):
  checkpoints.save(dataclasses.replace(state, step=state.step + step), CONFIG, {"step": step})
max((folder / "1" / "state").rglob("d/*"), key=lambda path: path.stat().st_size).unlink()
assert checkpoints.load_params(mesh)[2] == {"step": 0}
assert checkpoints.restore(state, CONFIG)[1] == {"step": 0}
""", str(tmp_path), devices=8)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "damaged-1"]


@pytest.mark.parametrize("keep", [0, -1, True, 2.5, None])
def test_a_number_of_checkpoints_that_is_none(keep, tmp_path):
  with pytest.raises(ValueError, match=re.escape(f"keep={keep!r}; use an integer of at least 1.")):
    Checkpoints(tmp_path, keep=keep)


def test_parameters_of_another_config_are_not_saved(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(ValueError, match=r"the parameters: embedding is \(8, 8\), the config wants \(9, 8\); "):
    checkpoints.save(state_of(), dataclasses.replace(CONFIG, vocab_size=9), {})
  assert checkpoints.steps() == []
  stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params_of())  # as of two seeds
  checkpoints.save(TrainState(stacked, (), jnp.int32(3)), CONFIG, {})
  chex.assert_trees_all_equal(checkpoints.load_params()[1], stacked)
  other = jax.tree.map(lambda x: jnp.stack([x, x, x]), params_of(RATPlusConfig(8, 1, 16, 2)))
  with pytest.raises(ValueError, match="leaves differ in all"):
    checkpoints.save(TrainState(other, (), jnp.int32(4)), CONFIG, {})
  assert checkpoints.steps() == [3]


def test_a_template_of_other_parameters_is_told_of_them(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state_of(), CONFIG, {})
  with pytest.raises(ValueError, match=r"holds embedding as float32 of shape \(8, 8\), the template as bfloat16 of"
                                       r" shape \(8, 8\); give a template with parameters"):
    checkpoints.restore(state_of(dtype="bfloat16"), CONFIG)
  stacked = TrainState(jax.tree.map(lambda x: x[None], params_of()), (), jnp.int32(0))
  with pytest.raises(ValueError, match=r"the template as float32 of shape \(1, 8, 8\)"):
    checkpoints.restore(stacked, CONFIG)
  with pytest.raises(ValueError, match="holds another optimizer's state"):
    checkpoints.restore(TrainState(params_of(), (), jnp.int32(0)), CONFIG)
  chex.assert_trees_all_equal(checkpoints.restore(state_of(0, value=7), CONFIG)[0], state_of())


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(save_every=1), "save_every=1, notes=None and no checkpoints; give checkpoints=Checkpoints(folder), or leave"),
    (dict(notes={"a": 1}), "save_every=0, notes={'a': 1} and no checkpoints; "),
    (dict(steps=3), "steps=3, and this state is at step 5; `steps` counts from the start of the training, so use at"
                    " least 5."),
    (dict(steps=9.5), "steps=9.5; use an integer of at least 1."),
    (dict(save_every=True), "save_every=True; use an integer of at least 0."),
])
def test_the_loop_refuses_before_its_first_batch(arguments, message, tmp_path):
  metrics = tmp_path / "metrics.jsonl"
  metrics.write_text('{"step": 7}\n')
  with pytest.raises(ValueError, match=re.escape(message)):
    train(MODEL, OPTIMIZER, state_of(), lambda step: 1 / 0, metrics_path=metrics, **dict(steps=9) | arguments)
  assert metrics.read_text() == '{"step": 7}\n'


def test_a_training_that_is_done_is_left_as_it_is():
  chex.assert_trees_all_equal(train(MODEL, OPTIMIZER, state_of(), lambda step: 1 / 0, steps=5), state_of())
