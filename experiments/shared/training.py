"""Training on text, for `pretrain`, `adapt` and `retrofit`: their flags, and the run from data to checkpoint."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import rat_jax
from experiments import pictures
from experiments.shared import command, device, inputs, output, over_mesh
from rat_jax import RATPlusConfig, RATPlusLM, parallel
from rat_jax.axes import Params
from rat_jax.data import TokenFile
from rat_jax.modes import Mode
from rat_jax.parallel import processes
from rat_jax.plan import check_modes
from rat_jax.train import Checkpoints, Optimizer, TrainState, train
from rat_jax.train.step import AccumulateBy, Combine
from rat_jax.transformer import Remat

Plant = Callable[[int, Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(over_mesh.Settings):
  """Of every command that trains on text."""

  mode: tuple[Mode, ...]
  data: pathlib.Path | None
  steps: int
  batch_size: int
  length: int
  accumulation: int
  learning_rate: float
  warmup: float
  weight_decay: float
  remat: Remat
  unroll: bool
  combine: Combine
  documents_apart: bool
  save_every: int
  resume: str
  log_every: int

  def optimizer(self, steps: int, rates: Sequence[tuple[str, float]] = ()) -> Optimizer:
    """The optimizer for a run of so many batches; `rates` as `rat_jax.make_optimizer` takes them."""
    return rat_jax.make_optimizer(self.learning_rate, total_steps=steps, warmup_steps=int(self.warmup * steps),
                                  weight_decay=self.weight_decay, rates=rates)


def define_flags(*, steps: int = 1000, batch_size: int = 16, length: int = 1024, learning_rate: float = 1e-3,
                 warmup: float = 0.05) -> None:
  """All of `Settings` but --mode, with a command's own defaults."""
  over_mesh.define_flags()
  command.define_path("data", "Prepared folder, text file or folder. Default: the standard library's text.")
  flags.DEFINE_integer("steps", steps, "Batches in all; a resumed run goes on to this number.", lower_bound=1)
  flags.DEFINE_integer("batch_size", batch_size, "Sequences in a batch.", lower_bound=1)
  flags.DEFINE_integer("length", length, "Tokens in a sequence.", lower_bound=1)
  flags.DEFINE_integer("accumulation", 1, "Micro-batches that a batch is cut into.", lower_bound=1)
  flags.DEFINE_float("learning_rate", learning_rate, "Peak learning rate.")
  flags.DEFINE_float("warmup", warmup, "Share of the steps with linear warm-up.", 0.0, 1.0)
  flags.DEFINE_float("weight_decay", 0.1, "AdamW's weight decay, on every parameter.")
  flags.DEFINE_enum("remat", "products", get_args(Remat), "What layers keep for gradients.")
  flags.DEFINE_bool("unroll", False, "Compile layers one by one: slower to compile, faster on a GPU.")
  flags.DEFINE_enum("combine", "sequential", get_args(Combine), "One update per mode, or one in all.")
  flags.DEFINE_bool("documents_apart", False, "Attention and memory stop at document boundaries.")
  flags.DEFINE_integer("save_every", 500, "Batches between checkpoints; the last state is saved too.", lower_bound=0)
  command.define_resume()
  flags.DEFINE_integer("log_every", 20, "Batches between lines on the terminal.", lower_bound=1)


def check(settings: Settings) -> None:
  """Raises ValueError for settings that train nothing, and for flags that would change nothing."""
  if settings.batch_size % settings.accumulation:
    raise ValueError(f"--accumulation={settings.accumulation} does not divide --batch_size={settings.batch_size}; cut a"
                     " batch into equal parts.")
  command.check_trained(settings.mode, settings.documents_apart)
  if len(settings.mode) == 1:
    settings.refuse(("combine",), f"--mode={settings.mode[0]} alone makes one update of a batch; leave it out.")


def train_data(settings: Settings) -> TokenFile:
  """The training part of the corpus that --data names. Raises ValueError as `check`, before anything is read."""
  check(settings)
  return inputs.corpus(settings.data, settings.workdir / "data")["train"]


def load(checkpoint: pathlib.Path, dtype: str | None, mesh: jax.sharding.Mesh | None
         ) -> tuple[RATPlusConfig, Params, dict[str, Any]]:
  """(config, parameters, notes) of a trained model to train on, in float32: bfloat16 rounds steps of 2e-5 away.

  Args:
    dtype: of matrix products and attention, instead of the model's own.
    mesh: on which they come to lie.

  Raises as `inputs.load_model`.
  """
  config, params, notes = inputs.load_model(checkpoint, mesh)
  config = dataclasses.replace(config, dtype=cast(Any, dtype or config.dtype), param_dtype="float32")
  return config, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params), notes


def first_state(model: RATPlusLM, optimizer: Optimizer, params: Params | None, seed: int,
                mesh: jax.sharding.Mesh | None) -> TrainState:
  """The state before the first batch, of `params` or fresh ones; on a mesh every device makes its own part."""
  def made(params: Params) -> TrainState:
    return rat_jax.init_train_state(model, params, optimizer)

  def drawn(key: jax.Array) -> Params:
    params: Params = model.init(key, np.zeros((1, 8), np.int32))["params"]
    return params

  if mesh is None:
    return made(jax.jit(drawn)(jax.random.key(seed)) if params is None else params)
  if params is None:
    params = parallel.sharded(drawn, mesh)(jax.random.key(seed))
  params = parallel.shard(params, mesh)  # what was added to them too

  def rest(params: Params) -> tuple[Any, Any]:
    state = made(params)
    return state.opt_state, state.step

  return TrainState(params, *parallel.sharded(rest, mesh)(params))  # the parameters are not copied


def rate_change(settings: Settings, step: int, before: int, after: int) -> str:
  """What another number of --steps does to the learning rate of batch `step`, in words: it bends the whole schedule."""
  old, new = (float(settings.optimizer(steps).schedule(jnp.int32(step))) for steps in (before, after))
  return (f"--steps={after} where the run had {before}: the learning rate of the next batch is {new:.3g}, it would have"
          f" been {old:.3g}")


def fit(settings: Settings, config: RATPlusConfig, params: Params | None, data: TokenFile, label: str,
        mesh: jax.sharding.Mesh | None = None, start: pathlib.Path | None = None,
        rates: Sequence[tuple[str, float]] = (), accumulate_by: AccumulateBy = "batch",
        plant: Plant | None = None, about: Mapping[str, Any] = MappingProxyType({})) -> None:
  """Trains to --steps and saves; goes on from the newest checkpoint of the folder, where there is one.

  Says so and trains nothing where the run has come that far already.

  Args:
    params: where to start; None is a fresh draw from --seed.
    label: what the bar of progress is called.
    mesh: on which `params` lie, and the training runs; None: one device.
    start: the checkpoint that `params` come from.
    rates: factors of the learning rate by parameter (`rat_jax.make_optimizer`).
    accumulate_by: how --accumulation weighs micro-batches (`rat_jax.train_step`).
    plant: makes of a step and its batch of text the batch that is trained on.
    about: what else tells this run from others, for the notes.

  Raises ValueError, before anything is written, for a model, modes and data that do not fit each other, and for a
  checkpoint in the folder that another run left: of other modes, data, batches, rates or start.
  """
  if data.sidecar.vocab_size > config.vocab_size:
    raise ValueError(f"the data's vocabulary has {data.sidecar.vocab_size} entries, the model vocab_size="
                     f"{config.vocab_size}; use a model whose vocabulary holds the data's.")
  folder, modes, steps = settings.workdir, settings.mode, settings.steps
  for mode in modes:
    check_modes(mode, None, config)
  model, checkpoints = RATPlusLM(config), Checkpoints(folder / "checkpoints")
  optimizer = settings.optimizer(steps, rates)

  rows = None if mesh is None else parallel.rows_of_process(mesh, settings.batch_size)

  def batch_at(step):
    batch = data.batch(step, batch_size=settings.batch_size, length=settings.length, seed=settings.seed,
                       documents_apart=settings.documents_apart, rows=None if plant else rows)
    if plant:
      batch = plant(step, batch)
      batch = batch if rows is None else {name: of_all[rows] for name, of_all in batch.items()}
    return batch if mesh is None else parallel.from_rows(batch, mesh, settings.batch_size)

  notes = {"modes": [str(mode) for mode in modes], "combine": settings.combine, "seed": settings.seed,
           "batch_size": settings.batch_size, "length": settings.length, "documents_apart": settings.documents_apart,
           "source": data.sidecar.source, "data_tokens": data.sidecar.tokens, "data_sha256": data.sidecar.sha256,
           "tokenizer": data.sidecar.tokenizer, "start": start and str(start.absolute()),
           "rates": [list(one) for one in rates],
           "learning_rate": settings.learning_rate, "warmup": settings.warmup, "weight_decay": settings.weight_decay,
           **about}
  parallel.check_agreement(notes | {f"config.{name}": value for name, value in dataclasses.asdict(config).items()})
  processes.together(lambda: batch_at(0))  # asked now: the data may be too short for it
  state = first_state(model, optimizer, params, settings.seed, mesh)
  if output.resumes(settings.resume, checkpoints):
    state, saved = checkpoints.restore(state, config)
    output.check_same_run(checkpoints.folder, saved, notes)
    if int(state.step) < steps:
      output.say(f"resuming from step {int(state.step)} in {checkpoints.folder}")
      if "steps" in saved and saved["steps"] != steps:
        output.say(rate_change(settings, int(state.step), saved["steps"], steps))
  if int(state.step) < steps:
    size = sum(x.size for x in jax.tree.leaves(state.params))
    output.say(f"{size:,} parameters, {steps} batches of {settings.batch_size} x {settings.length} tokens under"
               f" {', then '.join(map(str, modes))}, on {device.name()}{over_mesh.described(mesh)}")
    train(model, optimizer, state, batch_at, steps=steps, modes=modes,
          notes=notes | {"steps": steps},  # which a resumed run may move
          combine=settings.combine, accumulation=settings.accumulation, accumulate_by=accumulate_by,
          remat=settings.remat, unroll=settings.unroll, donate=True, log_every=settings.log_every,
          metrics_path=output.made(folder) / "metrics.jsonl", checkpoints=checkpoints, save_every=settings.save_every,
          label=label)
  else:
    output.say(f"nothing to train: the run in {folder} is at step {int(state.step)}")
  metrics = folder / "metrics.jsonl"
  if not processes.is_first():
    return
  if metrics.exists():
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    pictures.save(pictures.losses(lines, [str(mode) for mode in modes]), folder / "training.png")
    print(f"checkpoint: {checkpoints.folder}; losses: {folder}/training.png")
  else:
    print(f"checkpoint: {checkpoints.folder}; no picture of losses, for {metrics} is gone")
