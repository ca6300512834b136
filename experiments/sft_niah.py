"""Trains small models on mini-NIAH from scratch: several seeds in one program, short sequences first.

Claim: attention and RAT+ both learn to find needles; what differs is what sparse inference leaves of it
(experiments.eval_niah).  Expected: every task above 95% under Dense on every seed, after about 10000 batches.
Cost: RAT+ 8 minutes, attention 4 minutes for three seeds on one H100.
Command: python -m experiments.sft_niah --arm=ratplus --workdir=runs/niah/ratplus      (and --arm=attention, ...)
Resumes from the newest checkpoints in --workdir; stops by batches, or by --stop_at.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

import rat_jax
from experiments import common
from rat_jax import Dense, Dilated, RATPlusConfig, RATPlusLM
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.mini_niah import TASKS, Rows
from rat_jax.evaluate.needles import answered
from rat_jax.modes import Mode
from rat_jax.train import Checkpoints, Optimizer, TrainState

ARMS = ("ratplus", "attention", "sparse_branch", "ratplus_dense", "ratplus_mixed")
MIXTURE = {"single_1": 3, "single_2": 3, "single_3": 5, "multikey_1": 4, "multikey_2": 10, "multikey_3": 16,
           "multivalue": 14, "multiquery": 9}  # rows of 64

_COUNT, _ACCURACY_SEED = 32, 1_000_003  # questions per task and evaluation, and their seed

ARM = flags.DEFINE_enum("arm", "ratplus", ARMS, "RAT+ with ARL; attention; attention with ARL's sparse branch; RAT+"
                        " trained dense only; RAT+ with ARL over several dilations.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Models that are trained side by side.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 10000, "Batches in all.", lower_bound=1)
STAGES = flags.DEFINE_list("stages", ["256x64", "512x48", "1024x32"], "Length x rows of every stage.")
SHARES = flags.DEFINE_list("shares", ["0.35", "0.55"], "The share of the steps by which each stage but the last ends.")
LEAVE_AT = flags.DEFINE_float("leave_at", 0.9, "A stage ends when every task but multivalue passes this on every seed.")
STOP_AT = flags.DEFINE_float("stop_at", None, "Training ends when every task passes this on every seed.")
LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-3, "Peak learning rate.", lower_bound=0.0)
WARMUP = flags.DEFINE_integer("warmup", 300, "Batches of warm-up.", lower_bound=0)
LM_WEIGHT = flags.DEFINE_float("lm_weight", 0.1, "Weight of the loss over all tokens beside that over answers.")
DILATION = flags.DEFINE_integer("dilation", 16, "ARL's dilation.", lower_bound=1)
LAYERS = flags.DEFINE_integer("layers", 4, "Layers.", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", 256, "Model width E.", lower_bound=2)
HEADS = flags.DEFINE_integer("heads", 4, "Attention heads.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Type of matrix products and attention.")
LOG_EVERY = flags.DEFINE_integer("log_every", 100, "Batches between evaluations.", lower_bound=1)
SAVE_EVERY = flags.DEFINE_integer("save_every", 2000, "Batches between checkpoints.", lower_bound=1)


def configuration(arm: str) -> RATPlusConfig:
  """Equal parameters in all arms: attention has no gate, so its MLP is half a width wider."""
  memory = arm.startswith("ratplus")
  width = 4 * WIDTH.value + (0 if memory else WIDTH.value // 2)
  choices: dict[str, Any] = {"dtype": DTYPE.value}
  return RATPlusConfig(mini_niah.VOCAB_SIZE, LAYERS.value, WIDTH.value, HEADS.value, mlp_dim=width, memory=memory,
                       init_std=None, **choices)


def modes_at(arm: str, step: int) -> tuple[Mode, ...]:
  """The modes of a batch, one update each."""
  if arm in ("attention", "ratplus_dense"):
    return (Dense(),)
  dilation = DILATION.value
  if arm == "ratplus_mixed":
    dilation = int(np.random.default_rng([common.SEED.value, step]).choice([8, 16, 32]))
  return (Dilated(dilation), Dense())


@dataclasses.dataclass(frozen=True)
class Stage:
  length: int
  rows: int
  until: int  # the batch by which it ends

  @property
  def mixture(self) -> tuple[mini_niah.Rows, ...]:
    """The mixture scaled to the stage's rows, by largest remainders."""
    exact = {name: n * self.rows / 64 for name, n in MIXTURE.items()}
    counts = {name: int(x) for name, x in exact.items()}
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[:self.rows - sum(counts.values())]:
      counts[name] += 1
    return mini_niah.training_rows({name: n for name, n in counts.items() if n})


def stages() -> list[Stage]:
  if len(SHARES.value) != len(STAGES.value) - 1:
    raise ValueError(f"--shares={SHARES.value} for --stages={STAGES.value}; give one share less than stages.")
  ends = [round(float(share) * STEPS.value) for share in SHARES.value] + [STEPS.value]
  sizes = [text.split("x") for text in STAGES.value]
  return [Stage(int(length), int(rows), end) for (length, rows), end in zip(sizes, ends, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def make_batches(stage: Stage, seeds: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
  """The batches of a step, one per seed: [seeds, B, T]; answers weigh as much as they are rare."""

  def one(seed):
    made = mini_niah.batch(stage.mixture, stage.length, seed, step)
    answers, counted = made["answers"], made["targets"] != -100
    weights = answers / jnp.maximum(jnp.sum(answers), 1) + LM_WEIGHT.value * counted / jnp.sum(counted)
    return {"tokens": made["tokens"], "targets": made["targets"], "weights": weights}

  return jax.vmap(one)(seeds)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def update(model: RATPlusLM, optimizer: Optimizer, modes: tuple[Mode, ...], state: TrainState, batches):
  return jax.vmap(lambda s, b: rat_jax.train_step(model, optimizer, s, b, modes=modes))(state, batches)


@functools.partial(jax.jit, static_argnums=(0, 1))
def dense_accuracy(model: RATPlusLM, length: int, params, step) -> jax.Array:
  """The share of single questions that are answered right: [seeds, tasks]."""
  rows = tuple(Rows(task, _COUNT) for task in TASKS.values())
  made = mini_niah.batch(rows, length, _ACCURACY_SEED, step)
  right = jax.vmap(lambda p: answered(model, p, made))(params)
  return jnp.mean(right.reshape(-1, len(TASKS), _COUNT), axis=2)


def main() -> None:
  folder = common.workdir(f"niah/{ARM.value}")
  config, seeds = configuration(ARM.value), jnp.arange(SEEDS.value) + common.SEED.value * 1000
  model = RATPlusLM(config)
  optimizer = rat_jax.make_optimizer(LEARNING_RATE.value, total_steps=STEPS.value, min_learning_rate=0.0,
                                     warmup_steps=min(WARMUP.value, STEPS.value))
  plan = stages()
  run = Checkpoints(folder / "run")
  notes: dict[str, Any] = {"arm": ARM.value, "stages": STAGES.value, "steps": STEPS.value, "seeds": SEEDS.value,
                           "stage": 0, "done": False}
  state, notes = start(model, optimizer, config, seeds, run, notes)
  step, at, done = int(state.step[0]), notes["stage"], notes["done"]
  size = sum(x.size for x in jax.tree.leaves(state.params)) // SEEDS.value
  print(f"{ARM.value}: {SEEDS.value} seeds of {size:,} parameters, {STEPS.value} batches, on {common.device()}")
  with tqdm(total=STEPS.value, initial=step, desc=ARM.value, unit="batch", disable=None) as bar:
    clock = time.perf_counter()
    while step < STEPS.value and not done:
      batches = make_batches(plan[at], seeds, step)
      state, metrics = update(model, optimizer, modes_at(ARM.value, step), state, batches)
      step += 1
      bar.update()
      if step % LOG_EVERY.value and step < STEPS.value:
        continue
      accuracy = np.asarray(dense_accuracy(model, plan[at].length, state.params, step))
      line = {"step": step, "length": plan[at].length, "loss": np.asarray(metrics["loss"]).tolist(),
              "accuracy": {name: accuracy[:, i].tolist() for i, name in enumerate(TASKS)},
              "seconds_per_batch": (time.perf_counter() - clock) / LOG_EVERY.value}
      with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
      worst = accuracy.min(axis=0)
      text = " ".join(f"{name}={100 * x:.0f}" for name, x in zip(TASKS, worst, strict=True))
      bar.set_postfix_str(f"T={plan[at].length}, worst seed: {text}")
      if bar.disable:
        print(f"{step}/{STEPS.value} T={plan[at].length} {line['seconds_per_batch']:.3f} s a batch, worst seed: {text}",
              flush=True)
      last = at == len(plan) - 1
      passed = min(x for name, x in zip(TASKS, worst, strict=True) if name != "multivalue") >= LEAVE_AT.value
      if not last and (passed or step >= plan[at].until):
        at += 1
      done = last and STOP_AT.value is not None and worst.min() >= STOP_AT.value
      if done or step == STEPS.value or step % SAVE_EVERY.value == 0:
        run.save(dataclasses.replace(state, step=state.step[0]), config, notes | {"stage": at, "done": bool(done)})
      clock = time.perf_counter()
  for i in range(SEEDS.value):  # each seed as a model of its own, for the other scripts
    shutil.rmtree(folder / f"seed-{i}", ignore_errors=True)
    one = jax.tree.map(lambda x, i=i: x[i], state)
    Checkpoints(folder / f"seed-{i}").save(one, config, {"arm": ARM.value, "seed": i})
  print(f"checkpoints: {folder}/seed-*")


def start(model: RATPlusLM, optimizer: Optimizer, config: RATPlusConfig, seeds: jax.Array, run: Checkpoints,
          notes: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
  """The states of all seeds, stacked: fresh ones, or those of the run's newest checkpoint."""
  tokens = np.zeros((1, 8), np.int32)
  fresh = jax.jit(jax.vmap(lambda seed: rat_jax.init_train_state(
      model, model.init(jax.random.key(seed), tokens)["params"], optimizer)))(seeds)
  if not run.steps():
    return fresh, notes
  state, found = run.restore(dataclasses.replace(fresh, step=fresh.step[0]), config)
  for name in ("arm", "stages", "steps", "seeds"):
    if found[name] != notes[name]:
      raise ValueError(f"the checkpoint in {run.folder} is of a run with {name}={found[name]!r}, this one has"
                       f" {notes[name]!r}; use another --workdir.")
  print(f"resuming from step {int(state.step)}")
  return dataclasses.replace(state, step=jnp.full_like(fresh.step, state.step)), found


if __name__ == "__main__":
  common.run(main)
