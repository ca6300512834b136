"""What `pretrain`, `adapt` and `retrofit` share: their flags, and the run from data to checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
from absl import flags

import rat_jax
from experiments import common, plots
from rat_jax import RATPlusConfig, RATPlusLM
from rat_jax.axes import Params
from rat_jax.data import TokenFile
from rat_jax.modes import Mode
from rat_jax.train import Checkpoints, Optimizer, train
from rat_jax.train.step import AccumulateBy, Combine
from rat_jax.transformer import Remat

DATA = common.define_path("data", "Prepared folder, text file or folder. Default: the standard library's text.")
STEPS = flags.DEFINE_integer("steps", 1000, "Batches in all; a resumed run goes on to this number.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Sequences in a batch.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens in a sequence.", lower_bound=1)
ACCUMULATION = flags.DEFINE_integer("accumulation", 1, "Micro-batches that a batch is cut into.", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Peak learning rate.")
WARMUP = flags.DEFINE_float("warmup", 0.05, "Share of the steps with linear warm-up.", 0.0, 1.0)
WEIGHT_DECAY = flags.DEFINE_float("weight_decay", 0.1, "AdamW's weight decay, on every parameter.")
REMAT = flags.DEFINE_enum("remat", "products", get_args(Remat), "What layers keep for gradients.")
UNROLL = flags.DEFINE_bool("unroll", False, "Compile layers one by one: slower to compile, faster on a GPU.")
COMBINE = flags.DEFINE_enum("combine", "sequential", ["sequential", "sum"], "One update per mode, or one in all.")
DOCUMENTS_APART = flags.DEFINE_bool("documents_apart", False, "Attention and memory stop at document boundaries.")
SAVE_EVERY = flags.DEFINE_integer("save_every", 500, "Batches between checkpoints; the last state is saved too.",
                                 lower_bound=0)
LOG_EVERY = flags.DEFINE_integer("log_every", 20, "Batches between lines on the terminal.", lower_bound=1)


def train_data(script: str) -> TokenFile:
  """The training part of the corpus that --data names."""
  return common.corpus(DATA.value, common.workdir(script) / "data")["train"]


def load(checkpoint: str, dtype: str | None) -> tuple[RATPlusConfig, Params, dict[str, Any]]:
  """(config, parameters, notes) of a trained model to train on, in float32: bfloat16 rounds steps of 2e-5 away.

  Args:
    dtype: of matrix products and attention, instead of the model's own.

  Raises as `common.load_model`.
  """
  config, params, notes = common.load_model(checkpoint)
  config = dataclasses.replace(config, dtype=cast(Any, dtype or config.dtype), param_dtype="float32")
  return config, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params), notes


def optimizer_of(steps: int, rates: Sequence[tuple[str, float]] = ()) -> Optimizer:
  """The optimizer of the flags for a run of so many batches; `rates` as `rat_jax.make_optimizer` takes them."""
  return rat_jax.make_optimizer(LEARNING_RATE.value, total_steps=steps, warmup_steps=int(WARMUP.value * steps),
                                weight_decay=WEIGHT_DECAY.value, rates=rates)


def rate_change(step: int, before: int, after: int) -> str:
  """What another number of --steps does to the learning rate of batch `step`, in words: it bends the whole schedule."""
  old, new = (float(optimizer_of(steps).schedule(jnp.int32(step))) for steps in (before, after))
  return (f"--steps={after} where the run had {before}: the learning rate of the next batch is {new:.3g}, it would have"
          f" been {old:.3g}")


def fit(config: RATPlusConfig, params: Params | None, modes: list[Mode], data: TokenFile, script: str,
        start: str | None = None, rates: Sequence[tuple[str, float]] = (),
        accumulate_by: AccumulateBy = "batch") -> None:
  """Trains to --steps and saves; goes on from the newest checkpoint of the folder, where there is one.

  Says so and trains nothing where the run has come that far already.

  Args:
    params: where to start; None is a fresh draw from --seed.
    modes: one loss for each.
    start: the checkpoint that `params` come from.
    rates: factors of the learning rate by parameter (`rat_jax.make_optimizer`).
    accumulate_by: how --accumulation weighs micro-batches (`rat_jax.train_step`).

  Raises ValueError for a checkpoint in the folder that another run left: of other modes, data, batches, rates or start.
  """
  if data.sidecar.vocab_size > config.vocab_size:
    raise ValueError(f"the data's vocabulary has {data.sidecar.vocab_size} entries, the model vocab_size="
                     f"{config.vocab_size}; use a model whose vocabulary holds the data's.")
  folder = common.workdir(script)
  model, checkpoints = RATPlusLM(config), Checkpoints(folder / "checkpoints")
  optimizer = optimizer_of(STEPS.value, rates)

  def batch_at(step):
    return data.batch(step, batch_size=BATCH_SIZE.value, length=LENGTH.value, seed=common.SEED.value,
                      documents_apart=DOCUMENTS_APART.value)

  if params is None:
    params = jax.jit(model.init)(jax.random.key(common.SEED.value), batch_at(0)["tokens"])["params"]
  state = rat_jax.init_train_state(model, params, optimizer)
  notes = {"modes": [str(mode) for mode in modes], "combine": COMBINE.value, "seed": common.SEED.value,
           "batch_size": BATCH_SIZE.value, "length": LENGTH.value, "documents_apart": DOCUMENTS_APART.value,
           "source": data.sidecar.source, "data_tokens": data.sidecar.tokens, "data_sha256": data.sidecar.sha256,
           "tokenizer": data.sidecar.tokenizer, "start": start, "rates": [list(one) for one in rates],
           "learning_rate": LEARNING_RATE.value, "warmup": WARMUP.value, "weight_decay": WEIGHT_DECAY.value}
  if checkpoints.steps():
    state, saved = checkpoints.restore(state, config)
    common.check_same_run(checkpoints.folder, saved, notes)
    if int(state.step) < STEPS.value:
      print(f"resuming from step {int(state.step)} in {checkpoints.folder}")
      if "steps" in saved and saved["steps"] != STEPS.value:
        print(rate_change(int(state.step), saved["steps"], STEPS.value))
  if int(state.step) < STEPS.value:
    size = sum(x.size for x in jax.tree.leaves(params))
    print(f"{size:,} parameters, {STEPS.value} batches of {BATCH_SIZE.value} x {LENGTH.value} tokens under"
          f" {', then '.join(map(str, modes))}, on {common.device()}")
    train(model, optimizer, state, batch_at, steps=STEPS.value, modes=modes,
          notes=notes | {"steps": STEPS.value},  # which a resumed run may move
          combine=cast(Combine, COMBINE.value), accumulation=ACCUMULATION.value, accumulate_by=accumulate_by,
          remat=cast(Remat, REMAT.value), unroll=UNROLL.value, donate=True, log_every=LOG_EVERY.value,
          metrics_path=folder / "metrics.jsonl", checkpoints=checkpoints, save_every=SAVE_EVERY.value, label=script)
  else:
    print(f"nothing to train: the run in {folder} is at step {int(state.step)}")
  plots.draw_training(folder / "metrics.jsonl", modes, folder / "training.png")
  print(f"checkpoint: {checkpoints.folder}; losses: {folder}/training.png")
