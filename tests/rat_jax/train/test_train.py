"""Training beyond parity: the summed form, accumulation, the loop, checkpoints, and stops that harm nothing."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rat_jax
from conftest import GRADIENT, assert_close, compilations, first_quick
from rat_jax import Dense, Dilated, RATPlusConfig, RATPlusLM
from rat_jax.costs import PEAK_FLOPS
from rat_jax.evaluate import loss_by_mode
from rat_jax.leaves import named_leaves
from rat_jax.train import Checkpoints, cross_entropy, drop_metrics, train

CONFIG = RATPlusConfig(31, 2, 16, 2, init_std=0.2)
MODEL = RATPlusLM(CONFIG)
MODES = (Dilated(4), Dense())
OPTIMIZER = rat_jax.make_optimizer(1e-2, total_steps=20, warmup_steps=2)


def batch_at(step, batch=4, length=12):
  rng = np.random.default_rng(step)
  tokens = rng.integers(0, 31, (batch, length + 1)).astype(np.int32)
  targets = np.where(rng.random((batch, length)) < 0.2, -100, tokens[:, 1:])
  return {"tokens": tokens[:, :-1], "targets": targets.astype(np.int32)}


def fresh_state(optimizer=OPTIMIZER):
  params = jax.jit(MODEL.init)(jax.random.key(0), batch_at(0)["tokens"])["params"]
  return rat_jax.init_train_state(MODEL, params, optimizer)


@functools.partial(jax.jit, static_argnums=2)
def mean_loss(params, batch, mode):
  total, count = cross_entropy(MODEL.apply({"params": params}, batch["tokens"], mode=mode,
                                           segment_ids=batch.get("segment_ids")), batch["targets"])
  return total / count


@pytest.mark.slow
def test_utilisation_is_operations_over_the_peak(tmp_path, monkeypatch):
  """As if a CPU did a million operations a second: the share follows from the rate of the same line."""
  monkeypatch.setitem(PEAK_FLOPS, jax.devices()[0].device_kind, 1e6)
  plain = lambda step: batch_at(step) | {"targets": batch_at(step)["tokens"]}  # every token counts
  train(MODEL, OPTIMIZER, fresh_state(), plain, steps=2, modes=MODES, log_every=2, metrics_path=tmp_path / "lines")
  line = json.loads((tmp_path / "lines").read_text().splitlines()[-1])
  flops = sum(rat_jax.training_flops(CONFIG, mode, 12) for mode in MODES)
  assert line["utilisation"] == pytest.approx(line["tokens_per_second"] * flops / 1e6)


@pytest.mark.slow
def test_the_summed_form_is_one_update_on_the_summed_loss():
  state, batch = fresh_state(), batch_at(0)
  after, metrics = rat_jax.train_step(MODEL, OPTIMIZER, state, batch, modes=MODES, combine="sum")
  losses, grads = jax.jit(jax.value_and_grad(
      lambda p: jnp.sum(jnp.stack([mean_loss(p, batch, mode) for mode in MODES]))))(state.params)
  norm = optax.tree.norm(grads)
  assert metrics["loss"].shape == (2,)
  assert metrics["grad_norm"].shape == (1,)
  np.testing.assert_allclose(metrics["loss"].sum(), losses, rtol=1e-6)
  np.testing.assert_allclose(metrics["grad_norm"][0], norm, rtol=1e-5)
  clipped = jax.tree.map(lambda g: g * min(1.0, 1.0 / (float(norm) + 1e-6)), grads)
  adamw = optax.adamw(float(metrics["learning_rate"]), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
  updates, _ = adamw.update(clipped, adamw.init(state.params), state.params)
  expected = optax.apply_updates(state.params, updates)
  # Adam divides by the gradient's size: compare where that is well above rounding.
  trees = (after.params, expected, state.params, clipped)
  for moved, wanted, start, g in zip(*map(jax.tree.leaves, trees), strict=True):
    clear = np.abs(g) > 1e-4 * np.abs(g).max()
    assert_close((moved - start)[clear], (wanted - start)[clear], 1e-2)
  assert int(metrics["tokens"]) == (batch["targets"] != -100).sum()


def test_accumulation_is_the_mean_of_the_micro_batches_means():
  state, batch = fresh_state(), batch_at(0)
  _, metrics = rat_jax.train_step(MODEL, OPTIMIZER, state, batch, modes=(Dense(),), accumulation=2)
  halves = [{name: x[i:i + 2] for name, x in batch.items()} for i in (0, 2)]
  gradient = jax.jit(jax.value_and_grad(mean_loss), static_argnums=2)
  losses, grads = zip(*(gradient(state.params, half, Dense()) for half in halves), strict=True)
  np.testing.assert_allclose(metrics["loss"][0], np.mean(losses), rtol=1e-6)
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
  np.testing.assert_allclose(metrics["grad_norm"][0], optax.tree.norm(mean), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("choice", [dict(remat="nothing"), dict(remat="everything"), dict(unroll=True)], ids=str)
def test_how_gradients_are_computed_changes_no_update(choice):
  batch = batch_at(0)
  expected, found = (rat_jax.train_step(MODEL, OPTIMIZER, fresh_state(), batch, modes=MODES, **one)
                     for one in ({}, choice))
  for one, other in zip(jax.tree.leaves(expected[1]), jax.tree.leaves(found[1]), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5)
  moments = [state.opt_state for state, _ in (expected, found)]  # after two updates: of both gradients
  jax.tree.map(lambda a, b: assert_close(a, b, GRADIENT), *moments)


@pytest.mark.parametrize("mode", [Dense(), Dilated(4, 2, 1)], ids=str)
@pytest.mark.slow
def test_a_packed_batch_trains_as_its_documents_do(mode):
  params, batch = fresh_state().params, batch_at(3, batch=1, length=12)
  packed = batch | {"segment_ids": np.array([[1] * 5 + [2] * 7])}
  packed["targets"] = batch_at(4, batch=1, length=12)["tokens"]
  parts = [{name: packed[name][:, at] for name in ("tokens", "targets")} for at in (slice(0, 5), slice(5, 12))]
  gradient = jax.jit(jax.grad(mean_loss), static_argnums=2)
  ours = gradient(params, packed, mode)
  theirs = jax.tree.map(lambda a, b: (5 * a + 7 * b) / 12, *(gradient(params, part, mode) for part in parts))
  jax.tree.map(lambda a, b: assert_close(a, b, GRADIENT), ours, theirs)


def test_one_program_serves_all_steps():
  state = fresh_state()
  counts = []
  for step in range(3):
    with compilations() as compiled:
      state, _ = rat_jax.train_step(MODEL, OPTIMIZER, state, batch_at(step), modes=(Dilated(3),))
    counts.append(len(compiled))
  assert counts[0] >= 1
  assert counts[1:] == [0, 0]


@pytest.mark.slow
def test_evaluation_weighs_targets_equally():
  params, batches = fresh_state().params, [batch_at(0), batch_at(1)]
  losses = loss_by_mode(MODEL, params, batches, MODES)
  for mode in MODES:
    sums = [cross_entropy(MODEL.apply({"params": params}, b["tokens"], mode=mode), b["targets"]) for b in batches]
    expected = sum(float(s) for s, _ in sums) / sum(int(n) for _, n in sums)
    assert losses[mode] == pytest.approx(expected, rel=1e-6)
  with pytest.raises(ValueError, match="no target that counts"):
    loss_by_mode(MODEL, params, [], MODES)
  with pytest.raises(ValueError, match=r"batches is one batch, with \['targets', 'tokens'\]"):
    loss_by_mode(MODEL, params, batches[0], MODES)
  assert loss_by_mode(MODEL, params, batches, [*MODES, *MODES]) == losses


@pytest.mark.slow
def test_stop_and_resume_is_bitwise_equal(tmp_path):
  straight = train(MODEL, OPTIMIZER, fresh_state(), batch_at, steps=6, modes=MODES, log_every=2)
  checkpoints = Checkpoints(tmp_path / "run")
  train(MODEL, OPTIMIZER, fresh_state(), batch_at, steps=3, modes=MODES, checkpoints=checkpoints,
        notes={"seed": 5}, metrics_path=tmp_path / "metrics.jsonl")
  resumed, notes = Checkpoints(tmp_path / "run").restore(fresh_state(), CONFIG)
  assert notes == {"seed": 5, "step": 3}
  resumed = train(MODEL, OPTIMIZER, resumed, batch_at, steps=6, modes=MODES, checkpoints=checkpoints,
                  metrics_path=tmp_path / "metrics.jsonl")
  chex.assert_trees_all_equal(resumed, straight)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(6))
  assert all(len(line["loss"]) == 2 and line["tokens_per_second"] > 0 for line in lines)
  assert all(line["utilisation"] is None for line in lines)  # a CPU's peak is not known
  config, params, _ = checkpoints.load_params()
  assert config == CONFIG
  chex.assert_trees_all_equal(params, straight.params)


@pytest.mark.slow
def test_the_loop_refuses_to_overwrite_later_steps(tmp_path, capsys):
  checkpoints = Checkpoints(tmp_path)
  state = train(MODEL, OPTIMIZER, fresh_state(), batch_at, steps=2, modes=MODES, checkpoints=checkpoints, label="two")
  assert "two: 2/2 batches, loss" in capsys.readouterr().out
  with pytest.raises(ValueError, match=r"checkpoints of steps \[2\], and this state is at step 0"):
    train(MODEL, OPTIMIZER, fresh_state(), batch_at, steps=1, modes=MODES, checkpoints=checkpoints)
  restored, _ = checkpoints.restore(fresh_state(), CONFIG)
  chex.assert_trees_all_equal(restored, state)
  for bad in (dict(log_every=0), dict(save_every=-1), dict(steps=0)):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))}"):
      train(MODEL, OPTIMIZER, state, batch_at, **(dict(steps=3) | bad))
  with pytest.raises(ValueError, match="lacks \\['targets'\\]"):
    train(MODEL, OPTIMIZER, state, lambda step: {"tokens": batch_at(step)["tokens"]}, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_bfloat16_parameters_train_with_float32_moments_and_gradients(accumulation):
  model = RATPlusLM(dataclasses.replace(CONFIG, param_dtype="bfloat16"))
  params = model.init(jax.random.key(0), batch_at(0)["tokens"])["params"]
  state = rat_jax.init_train_state(model, params, OPTIMIZER)
  after, metrics = rat_jax.train_step(model, OPTIMIZER, state, batch_at(0), modes=MODES, accumulation=accumulation)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(lambda a: (a.shape, a.dtype), after)
  assert {a.dtype.name for a in jax.tree.leaves(after.opt_state) if a.ndim} == {"float32"}
  wide = RATPlusLM(CONFIG)
  same = jax.tree.map(lambda p: p.astype(jnp.float32), params)
  _, expected = rat_jax.train_step(wide, OPTIMIZER, rat_jax.init_train_state(wide, same, OPTIMIZER), batch_at(0),
                                   modes=MODES, accumulation=accumulation)
  np.testing.assert_allclose(metrics["grad_norm"][0], expected["grad_norm"][0], rtol=5e-3)
  np.testing.assert_allclose(metrics["loss"][0], expected["loss"][0], rtol=1e-5)


def test_broken_lines_of_metrics_are_named_and_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  whole = [b'{"step": 0}\n', b'{"loss": 1}\n', b'{"step": 3}\n']
  broken = [b'{"step": 1, "lo\n', b"\x00\xff\n", b"[2]\n", b'{"step": "x"}\n', b'{"step": 2, "loss": [1.']
  path.write_bytes(b"".join([whole[0], *broken[:4], *whole[1:], broken[4]]))
  with pytest.warns(UserWarning, match=f"{path}, line . is no whole line of JSON") as warned:
    drop_metrics(path, 2)
  numbers = [str(one.message).removeprefix(f"{path}, line ").partition(" ")[0] for one in warned]
  assert numbers == ["2", "3", "4", "5", "8"]
  assert path.read_bytes() == b"".join(whole[:2])
  assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.slow
def test_the_callers_state_survives_the_loop():
  state = fresh_state()
  train(MODEL, OPTIMIZER, state, batch_at, steps=1, modes=MODES)
  assert np.isfinite(np.asarray(state.params["embedding"])).all()


@pytest.mark.slow
def test_a_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
  wild = rat_jax.make_optimizer(1e-2, total_steps=20)
  checkpoints = Checkpoints(tmp_path)
  train(MODEL, wild, fresh_state(wild), batch_at, steps=2, modes=MODES, checkpoints=checkpoints)
  state, _ = checkpoints.restore(fresh_state(wild), CONFIG)
  poisoned = dataclasses.replace(state, params=state.params | {"final_norm": jnp.full(16, jnp.nan)})
  with pytest.raises(FloatingPointError, match=r"loss under dilated:4 is nan at step 2; .* checkpoint is step 2 in"):
    train(MODEL, wild, poisoned, batch_at, steps=5, modes=MODES, checkpoints=checkpoints, save_every=1,
          metrics_path=tmp_path / "metrics.jsonl")
  assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == [None, None]
  with pytest.raises(FloatingPointError, match="not finite"):
    checkpoints.save(poisoned, CONFIG, {})
  assert checkpoints.steps() == [2]
  again, _ = checkpoints.restore(fresh_state(wild), CONFIG)
  chex.assert_trees_all_equal(again, state)


def test_a_checkpoint_of_another_config_or_optimizer_is_refused(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no checkpoint; give the folder that a training saved"):
    checkpoints.restore(fresh_state(), CONFIG)
  with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none does not exist; give the folder that a training saved"):
    Checkpoints(tmp_path / "none").load_params()
  checkpoints.save(fresh_state(), CONFIG, {})
  with pytest.raises(ValueError, match=r"another config .*: memory: False, True"):
    checkpoints.restore(fresh_state(), RATPlusConfig(31, 2, 16, 2, init_std=0.2, memory=False))
  other = rat_jax.train.TrainState({"embedding": jnp.zeros((31, 16))}, (), jnp.int32(0))
  with pytest.raises(ValueError, match="another optimizer's state"):
    checkpoints.restore(other, CONFIG)


def largest_file(folder):
  return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_damaged_checkpoint_is_passed_over_loudly(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  state = fresh_state()
  checkpoints.save(state, CONFIG, {"step": 0})
  later, _ = rat_jax.train_step(MODEL, OPTIMIZER, state, batch_at(0), modes=MODES)
  checkpoints.save(later, CONFIG, {"step": 1})
  largest = largest_file(tmp_path / "1" / "state")
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(data)
  with pytest.warns(UserWarning, match="CHECKPOINT 1 .* IS DAMAGED"):
    restored, notes = checkpoints.restore(fresh_state(), CONFIG)
  assert notes == {"step": 0}
  chex.assert_trees_all_equal(restored, state)
  assert checkpoints.steps() == [0]
  assert (tmp_path / "damaged-1").is_dir()
  checkpoints.save(later, CONFIG, {"step": 1})  # training goes on past the damaged step
  restored, _ = checkpoints.restore(fresh_state(), CONFIG)
  chex.assert_trees_all_equal(restored, later)


@pytest.mark.parametrize("damage", ["gone", "empty", "no object"])
def test_what_is_written_about_a_checkpoint_may_be_damaged(tmp_path, damage):
  checkpoints = Checkpoints(tmp_path)
  for step in (0, 1):
    checkpoints.save(dataclasses.replace(fresh_state(), step=jnp.int32(step)), CONFIG, {})
  about = tmp_path / "1" / "about" / "metadata"
  about.unlink() if damage == "gone" else about.write_text({"empty": "", "no object": "[1]"}[damage])
  with pytest.warns(UserWarning, match=r"CHECKPOINT 1 .* IS DAMAGED: 1/about: .* is passed over"):
    assert int(checkpoints.restore(fresh_state(), CONFIG)[0].step) == 0


@pytest.mark.parametrize("error", first_quick(1, [
    PermissionError(13, "Permission denied", "manifest.ocdbt"), ValueError("PERMISSION_DENIED: Error opening a file"),
    MemoryError("no room"), AttributeError("restore")]), ids=lambda error: type(error).__name__)
def test_a_checkpoint_that_cannot_be_read_now_is_no_damaged_one(tmp_path, monkeypatch, error):
  checkpoints = Checkpoints(tmp_path)
  for step in (0, 1):
    checkpoints.save(dataclasses.replace(fresh_state(), step=jnp.int32(step)), CONFIG, {})

  def restore(*_, **__):
    raise error

  part = "about" if isinstance(error, OSError) else "state"
  monkeypatch.setattr({"about": "pathlib.Path.read_text", "state": "tensorstore.open"}[part], restore)
  told = isinstance(error, (OSError, ValueError))
  with pytest.raises(OSError if told else type(error)) as raised:
    checkpoints.restore(fresh_state(), CONFIG)
  assert not told or str(raised.value).startswith(f"{tmp_path}/1/{part} cannot be read, and may be whole: ")
  monkeypatch.undo()
  assert int(checkpoints.restore(fresh_state(), CONFIG)[0].step) == 1  # it is where it was


def test_parameters_are_read_a_leaf_at_a_time(tmp_path):
  state = fresh_state()
  Checkpoints(tmp_path).save(state, CONFIG, {"step": 0})
  config, leaves, notes, digest = Checkpoints(tmp_path).read_params()
  assert (config, notes) == (CONFIG, {"step": 0})
  expected = {name: np.asarray(leaf) for name, leaf in sorted(named_leaves(state.params).items())}
  held, names = (lambda: None), []
  for name, leaf in leaves:
    assert held() is None, "an earlier leaf is still held"
    np.testing.assert_array_equal(leaf, expected[name])
    held = weakref.ref(leaf)
    names.append(name)
    del leaf
  assert names == list(expected)
  assert digest == hashlib.sha256(b"".join(leaf.tobytes() for leaf in expected.values())).hexdigest()


def test_damaged_parameters_are_passed_over_before_any_is_given(tmp_path):
  checkpoints, state = Checkpoints(tmp_path), fresh_state()
  for step in (0, 1):
    checkpoints.save(dataclasses.replace(state, step=jnp.int32(step)), CONFIG, {"step": step})
  data = largest_file(tmp_path / "1" / "state")
  data.write_bytes(bytes(data.stat().st_size))
  for read in (checkpoints.load_params, checkpoints.read_params):
    with pytest.warns(UserWarning, match="CHECKPOINT 1 .* IS DAMAGED"):
      assert read()[2] == {"step": 0}
  assert checkpoints.steps() == [0, 1]  # what only reads moves nothing


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(modes=()), "at least one mode"),
    (dict(combine="both"), "combine='both'"),
    (dict(remat="some"), "remat='some'"),
    (dict(remat=["some"]), r"remat=\['some'\]"),
    (dict(unroll=2), "unroll=2; use True or False"),
    (dict(accumulation=3), "accumulation=3 does not divide the batch of 4"),
    (dict(accumulation=True), "accumulation=True"),
    (dict(accumulate_by="row"), "accumulate_by='row'"),
    (dict(optimizer=optax.adam(1e-3)), "give one of rat_jax.make_optimizer"),
    (dict(modes=Dense()), "give a sequence of modes"),
    (dict(batch={"input_ids": [[1]], "labels": [[1]]}), "lacks"),
    (dict(model=RATPlusLM(dataclasses.replace(CONFIG, embed_dim=32, num_heads=2, mlp_dim=64))), "leaves differ in all"),
])
def test_bad_steps(arguments, message):
  with pytest.raises(ValueError, match=message):
    rat_jax.train_step(**{"model": MODEL, "optimizer": OPTIMIZER, "state": fresh_state(), "batch": batch_at(0),
                          **arguments})


def test_bad_batches():
  state, good = fresh_state(), batch_at(0)
  for change, message in ((dict(tokens=good["tokens"] + 31), r"vocabulary of this model is 0\.\.30"),
                          (dict(targets=good["tokens"] - 31), r"use tokens 0\.\.30, or -100"),
                          (dict(targets=good["targets"][:, 1:]), r"batch\['targets'\] has shape")):
    with pytest.raises(ValueError, match=message):
      rat_jax.train_step(MODEL, OPTIMIZER, state, good | change)
    with pytest.raises(ValueError, match=message):
      loss_by_mode(MODEL, state.params, [good | change], MODES)


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(learning_rate=0.0, total_steps=1), "learning_rate=0.0"),
    (dict(learning_rate=1.0, total_steps=0), "total_steps=0"),
    (dict(learning_rate=1.0, total_steps=5, warmup_steps=6), "warmup_steps=6"),
    (dict(learning_rate=1.0, total_steps=5, clip_norm=0.0), "clip_norm=0.0"),
    (dict(learning_rate=float("nan"), total_steps=5), "learning_rate=nan"),
    (dict(learning_rate=1.0, total_steps=5, b2=1.0), "b2=1.0"),
    (dict(learning_rate=1.0, total_steps=5, weight_decay=-1.0), "weight_decay=-1.0"),
    (dict(learning_rate=1.0, total_steps=5.5), "total_steps=5.5"),
    (dict(learning_rate="1", total_steps=5), "learning_rate='1'"),
    (dict(learning_rate=1.0, total_steps=5, rates={"layers/*": 0.0}), "give pairs of a pattern and a factor"),
])
def test_bad_optimizers(arguments, message):
  with pytest.raises(ValueError, match=message):
    rat_jax.make_optimizer(**arguments)
