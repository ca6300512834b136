"""A memory for a trained attention model: where it starts, at what rate it learns, what it costs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rat_jax
from conftest import FIXTURES, GRADIENT, ROOT, assert_close, run_python
from experiments import bench_model, convert, retrofit, sft_niah
from experiments.shared import inputs
from rat_jax import Dense, Dilated, RATPlusConfig, RATPlusLM
from rat_jax.convert import add_memory
from rat_jax.convert.added_memory import GATE_BIAS, memory_leaves
from rat_jax.train import Checkpoints, cross_entropy
from tests.experiments.command_line import settings

OLMO2 = FIXTURES / "olmo2_tiny"

CONFIG = RATPlusConfig(31, 2, 16, 2, memory=False, init_std=0.2)
TOKENS = np.random.default_rng(0).integers(0, 31, (4, 13)).astype(np.int32)
BATCH = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}
MEMORY = "layers/memory_gate*"


@pytest.fixture(scope="module")
def attention():
  return RATPlusLM(CONFIG).init(jax.random.key(0), BATCH["tokens"])["params"]


def named(params):
  return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def step(config, params, count=1, **options):
  model = RATPlusLM(config)
  optimizer = rat_jax.make_optimizer(1e-2, total_steps=10, **options)
  state, metrics = rat_jax.init_train_state(model, params, optimizer), {}
  for _ in range(count):
    state, metrics = rat_jax.train_step(model, optimizer, state, BATCH, modes=(Dense(),))
  return state, metrics


@pytest.mark.slow
def test_a_memory_starts_where_the_model_is_and_then_moves(attention):
  config, params = add_memory(CONFIG, attention)
  before = RATPlusLM(CONFIG).apply({"params": attention}, BATCH["tokens"])
  np.testing.assert_allclose(RATPlusLM(config).apply({"params": params}, BATCH["tokens"]), before, atol=1e-3)
  _, plain = step(CONFIG, attention)
  _, with_memory = step(config, params)
  np.testing.assert_allclose(with_memory["loss"], plain["loss"], atol=1e-4)
  after = step(config, params, 8, rates=[(MEMORY, 10.0)])[0].params["layers"]
  assert np.abs(np.asarray(after["memory_gate"])).max() > 0.1
  assert np.abs(np.asarray(after["memory_gate_bias"]) + 12).max() > 0.1
  with pytest.raises(ValueError, match="has a memory already"):
    add_memory(config, params)


def test_a_memory_that_was_trained_is_known():
  added = {"layers": dict(memory_leaves(dataclasses.replace(CONFIG, memory=True, gate_bias=-12.0)))}
  assert not retrofit.is_trained(added)
  gates = np.array(added["layers"]["memory_gate"])
  gates[1, -1] = 1e-9
  assert retrofit.is_trained({"layers": added["layers"] | {"memory_gate": gates}})


@pytest.mark.slow
def test_rates_multiply_updates_and_nothing_else(attention):
  """Updates of several rates are those of optax, parameter by parameter, with the norm of what is not frozen."""
  config, params = add_memory(CONFIG, attention, gate_bias=-1.0)
  rates = [("layers/mlp_*", 0.0), ("embedding", 0.0), (MEMORY, 10.0), ("layers/memory_gate_bias", 5.0)]
  factors = {name: 10.0 if "memory" in name else 0.0 if name.startswith(("layers/mlp_", "embedding")) else 1.0
             for name in named(params)}  # the first pattern that fits
  state, metrics = step(config, params, 1, rates=rates)

  def loss(p):
    total, count = cross_entropy(RATPlusLM(config).apply({"params": p}, BATCH["tokens"]), BATCH["targets"])
    return total / count

  before, after, grads = named(params), named(state.params), named(jax.grad(loss)(params))
  norm = np.sqrt(sum((grads[name]**2).sum() for name in before if factors[name]))
  assert_close(metrics["grad_norm"][0], norm, GRADIENT)
  for name, leaf in before.items():
    if not factors[name]:
      np.testing.assert_array_equal(after[name], leaf)
      continue
    adamw = optax.adamw(1e-2 * factors[name], b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    grad = jnp.asarray(grads[name] * min(1.0, 1.0 / (norm + 1e-6)))
    update, _ = adamw.update(grad, adamw.init(jnp.asarray(leaf)), jnp.asarray(leaf))
    assert_close(after[name], leaf + np.asarray(update), GRADIENT, name)
  moments = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
  assert before["embedding"].shape not in moments
  with pytest.raises(ValueError, match=r"rates: 'x' has the factor -1\.0"):
    rat_jax.make_optimizer(1e-2, total_steps=1, rates=[("x", -1.0)])


def test_an_added_memory_starts_alike_in_every_command():
  start = lambda module, *given: settings(module, "--seed=1", *given).gate_bias
  assert start(retrofit) == start(sft_niah) == GATE_BIAS
  assert start(convert, "--from=olmo2", "--source=s", "--output=o") == GATE_BIAS
  assert bench_model.configuration(settings(bench_model, "--preset=olmo2-1b")).gate_bias == GATE_BIAS


def test_flags_that_the_cost_does_not_read_are_refused(capsys):
  for given, named in (
      (["--cost=tiny", "--gate_bias=-3", "--learning_rate=1e-3", "--remat=nothing", "--accumulation=2", "--steps=9"],
       "--accumulation, --learning_rate, --remat, --gate_bias: --cost=tiny prints what the retrofit of a preset takes,"
       " and trains nothing; leave it out."),
      (["--utilisation=0.5"], "--utilisation: --cost alone reads it; give that too, or leave it out.")):
    with pytest.raises(ValueError, match=f"^{re.escape(named)}$"):
      retrofit.main(settings(retrofit, *given))
  retrofit.main(settings(retrofit, "--cost=tiny", "--steps=1000", "--batch_size=100", "--length=1000", "--mode=dense",
                         "--utilisation=0.5", "--seed=1"))
  said = capsys.readouterr().out
  assert said.startswith("at 50% of the peak\n")
  assert said.count("| dense ") == said.count(" 0.1B |") == 2


def test_operations_are_those_counted_by_hand():
  config = RATPlusConfig(50, 3, 8, 2, num_kv_heads=1, mlp_dim=20, mlp="swiglu")
  layer = 8 * 8 * 3 + 8 * 4 * 3 + 3 * 8 * 20  # queries, output gate, out; keys, values, memory's gate; the MLP
  for mode, keys in ((Dense(), np.arange(1, 33).mean()), (Dilated(4), (np.arange(1, 33) // 4 + (
      np.arange(1, 33) % 4 > 0)).mean())):
    assert rat_jax.training_flops(config, mode, 32) == pytest.approx(6 * (3 * layer + 50 * 8) + 12 * 3 * 8 * keys)
  for wrong in (0, -3, 2.5, True, "8"):
    with pytest.raises(ValueError, match=f"^length={wrong!r}; use an integer of at least 1\\.$"):
      rat_jax.training_flops(config, Dense(), wrong)


@pytest.fixture
def texts(tmp_path):
  """A folder of forty small texts."""
  (tmp_path / "texts").mkdir()
  for i in range(40):
    (tmp_path / "texts" / f"{i}.txt").write_text(f"Line {i} of a small text.\n" * 10)
  return tmp_path / "texts"


@pytest.mark.slow
def test_models_in_bfloat16_are_trained_in_float32_and_on_their_own_tokens_alone(tmp_path, texts):
  config = RATPlusConfig(256, 1, 16, 2, param_dtype="bfloat16")
  params = RATPlusLM(config).init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
  rat_jax.save_pretrained(tmp_path / "start", config, params)
  run = [f"--data={texts}", "--batch_size=2", "--length=32", f"--workdir={tmp_path}/run"]
  run_python("-m", "experiments.adapt", f"--checkpoint={tmp_path}/start", "--steps=3", "--learning_rate=2e-5",
             "--dtype=bfloat16", *run)
  found, after, _ = Checkpoints(tmp_path / "run" / "checkpoints").load_params()
  assert (found.dtype, found.param_dtype) == ("bfloat16", "float32")
  before = named(params)
  for name, leaf in named(after).items():
    assert (leaf != before[name]).mean() > 0.9, name
  larger = RATPlusConfig(2000, 1, 16, 2, memory=False)
  params = RATPlusLM(larger).init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
  rat_jax.save_pretrained(tmp_path / "larger", larger, params)
  for script in ("adapt", "retrofit", "eval_lm"):
    said = run_python("-m", f"experiments.{script}", f"--checkpoint={tmp_path}/larger", *run, check=False)
    assert "error: vocab_size=2000 of the model does not fit the tokenizer bytes" in said, script


@pytest.mark.slow
def test_the_script_from_a_checkpoint_to_a_folder(tmp_path, texts):
  """Retrofitted, and the control trained on; then written as a folder with a card."""
  config = RATPlusConfig(256, 1, 16, 2, memory=False)
  model, optimizer = RATPlusLM(config), rat_jax.make_optimizer(1e-3, total_steps=1)
  params = model.init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
  Checkpoints(tmp_path / "start").save(rat_jax.init_train_state(model, params, optimizer), config, {})
  run = ["-m", "experiments.retrofit", f"--checkpoint={tmp_path}/start", f"--data={texts}", "--steps=2",
         "--batch_size=2", "--length=32", "--freeze=embedding"]
  run_python(*run, "--nomemory", f"--workdir={tmp_path}/control")
  config, control, notes = Checkpoints(tmp_path / "control" / "checkpoints").load_params()
  assert (config.memory, notes["rates"]) == (False, [["embedding", 0.0]])
  assert np.abs(np.asarray(control["layers"]["query"] - params["layers"]["query"])).max() > 0
  run_python(*run, "--mode=dilated:4", "--mode=dense", f"--workdir={tmp_path}/memory")
  found, after, notes = Checkpoints(tmp_path / "memory" / "checkpoints").load_params()
  assert (found.memory, found.gate_bias, notes["modes"]) == (True, -12.0, ["dilated:4", "dense"])
  assert notes["rates"] == [["embedding", 0.0], [MEMORY, 10.0]]
  np.testing.assert_array_equal(after["embedding"], params["embedding"])
  assert [notes[name] for name in ("learning_rate", "warmup", "weight_decay", "steps")] == [6e-5, 0.02, 0.1, 2]
  assert np.abs(np.asarray(after["layers"]["memory_gate"])).max() > 0
  assert np.abs(np.asarray(after["layers"]["query"] - params["layers"]["query"])).max() > 0
  convert = ["-m", "experiments.convert", "--from=checkpoints", f"--source={tmp_path}/memory/checkpoints"]
  assert "parameters in float32" in run_python(*convert, f"--output={tmp_path}/folder")
  assert "is not empty" in run_python(*convert, f"--output={tmp_path}/folder", check=False)
  config, loaded = rat_jax.load_pretrained(tmp_path / "folder")
  assert config == found
  chex.assert_trees_all_equal(loaded, after)
  card = (tmp_path / "folder" / "README.md").read_text()
  assert f"* trained: {json.dumps(notes)}" in card
  assert inputs.load_model(tmp_path / "folder")[2] == notes
  digest = hashlib.sha256(b"".join(leaf.tobytes() for _, leaf in sorted(named(after).items())))
  assert f"* sha256 of the parameters by name: {digest.hexdigest()}" in card
  for more, message in (
      ([f"--checkpoint={tmp_path}/folder", "--nomemory"], "has a memory; give the attention model"),
      (["--freeze=nonsense"], "--freeze=nonsense fits no parameter; they are embedding"),
      (["--nomemory", "--memory_rate=3"], "error: --memory_rate: --nomemory trains no memory; leave it out."),
      (["--nomemory", "--gate_bias=-3"], "--gate_bias=-3 is where the gates of a memory that is added start"),
      (["--mode=dilated:4", "--mode=dense", "--learning_rate=1e-3", f"--workdir={tmp_path}/memory"],
       "of a run with learning_rate=6e-05, this one has 0.001")):
    assert message in run_python(*run, f"--workdir={tmp_path}/none", *more, check=False)


@pytest.mark.slow
def test_a_release_in_float32_becomes_a_folder_in_bfloat16(tmp_path):
  convert = ["-m", "experiments.convert", "--from=olmo2", f"--source={OLMO2}", f"--output={tmp_path}/folder"]
  run_python(*convert, "--dtype=bfloat16", "--param_dtype=bfloat16")
  config, params = rat_jax.load_pretrained(tmp_path / "folder")
  released, expected = rat_jax.convert.load_olmo2(OLMO2)
  assert config == dataclasses.replace(released, dtype="bfloat16", param_dtype="bfloat16")
  chex.assert_trees_all_equal(params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), expected))
  card = (tmp_path / "folder" / "README.md").read_text()
  digest = hashlib.sha256((OLMO2 / "model.safetensors").read_bytes()).hexdigest()
  for line in (f"* sha256 of model.safetensors: {digest}", "* parameters: float32 in the source, bfloat16 here",
               "* memory: added and not trained; its gates start at sigmoid(-12)"):
    assert line in card
  for more, message in (("--config=tiny", "error: --config: it changes nothing under --from=olmo2; leave it out."),
                        ("--nomemory", "error: --gate_bias: it changes nothing under --from=olmo2 --nomemory;")):
    assert message in run_python(*convert, "--gate_bias=-3", more, check=False)
  said = run_python("-m", "experiments.convert", "--from=ratplus", "--source=none.pth", "--config=nope",
                    f"--output={tmp_path}/none", check=False)
  assert "error: --config=nope: preset 'nope' is unknown" in said


@pytest.mark.slow
def test_a_text_that_ends_is_not_continued(tmp_path):
  """A model that says NUL, the end of a document, whatever it reads."""
  config = RATPlusConfig(256, 1, 16, 2, tie_embeddings=False)
  params = RATPlusLM(config).init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
  params |= {"layers": jax.tree.map(jnp.zeros_like, params["layers"]), "embedding": jnp.ones_like(params["embedding"]),
             "head": jnp.zeros_like(params["head"]).at[0].set(1.0)}
  rat_jax.save_pretrained(tmp_path / "model", config, params)
  said = run_python("-m", "experiments.generate", f"--checkpoint={tmp_path}/model", "--prompt=abc", "--temperature=0",
                    "--dtype=bfloat16")
  assert said.endswith("\nabc|\n\n")


@pytest.mark.slow
def test_a_script_that_is_ended_cleans_up(tmp_path):
  done = subprocess.run([sys.executable, "-m", "tests.experiments.programs.ended_script", str(tmp_path / "model")],
                        cwd=ROOT, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout) == (143, ""), done.stderr
  assert not list(tmp_path.iterdir())
