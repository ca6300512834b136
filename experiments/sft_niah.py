"""Trains small models on mini-NIAH: several seeds in one program, short sequences first.

Claim: attention and RAT+ both learn to find needles; what differs is what sparse inference leaves of it
(experiments.eval_niah).
Command: python -m experiments.sft_niah --arm=ratplus --workdir=runs/niah/ratplus      (and --arm=attention, ...)
Result: every task above 95% under Dense on every seed that is kept.
Cost: on one H200, compilation included, RAT+'s five seeds take 453 seconds, attention's twelve 824.
With another --workdir, such as runs/niah/more:
Another length, or another mode:  --init=runs/niah/ratplus --mode=dilated:16,window=32 --stages=1024x32
Text beside the needles:  --lm_data=runs/data --lm_rows=16
A memory for attention that was trained so:  --init=runs/niah/attention --arm=ratplus --memory_rate=10
Words:  --text --init=runs/pretrain/checkpoints   fine-tunes one model by the RAT+ authors' protocol (needles/words.py),
in runs/niah/words.
Resumes from the newest checkpoint in --workdir; stops by batches, or by --stop_at. Seeds are spread over the devices.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

import rat_jax
from experiments.needles import curriculum, spares, words
from experiments.needles.curriculum import Stage
from experiments.needles.programs import Programs
from experiments.needles.seeds import ACCURACY_SEED, MATCHED, check_seeds, check_tasks, fingerprint, load, over_seeds
from experiments.shared import command, device, output
from rat_jax import Dense, Dilated, RATPlusConfig, RATPlusLM
from rat_jax.convert.added_memory import GATE_BIAS, add_memory
from rat_jax.data import TokenFile
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.mini_niah import TASKS
from rat_jax.evaluate.needles import answered
from rat_jax.modes import Mode
from rat_jax.paths import local_path
from rat_jax.plan import check_modes
from rat_jax.train import Checkpoints, Optimizer, TrainState, drop_metrics

# Batches by arm: 16000 updates for all, one of a batch for attention and RAT+ without ARL, two for the others.
STEPS_OF = {"ratplus": 8000, "attention": 16000, "sparse_branch": 8000, "ratplus_dense": 16000, "ratplus_mixed": 8000}
# Fresh embeddings are this much larger than 1/sqrt(E). At that size the tokens drown in what the first layers write at
# random, and most seeds stop at answering with a random needle.
_EMBEDDING_SCALE = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(words.Settings):
  arm: str
  seeds: int
  steps: int | None
  tasks: tuple[str, ...]
  stages: tuple[str, ...]
  shares: tuple[str, ...] | None
  leave_at: float
  stragglers: int
  stop_at: float | None
  init: str | None
  mode: tuple[Mode, ...]
  learning_rate: float | None
  warmup: int
  lm_weight: float
  lm_data: pathlib.Path | None
  lm_rows: int
  gate_bias: float
  memory_rate: float
  dilation: int
  layers: int
  width: int
  heads: int
  dtype: str
  log_every: int
  examples: int
  save_every: int
  resume: str

  @property
  def batches(self) -> int:
    """--steps, or the arm's own number."""
    return self.steps or STEPS_OF[self.arm]


def define_flags() -> None:
  command.define_common_flags("niah/<arm>")
  words.define_flags()
  flags.DEFINE_enum("arm", "ratplus", list(STEPS_OF), "RAT+ with ARL; attention; attention with ARL's sparse branch;"
                    " RAT+ trained dense only; RAT+ with ARL over several dilations.")
  flags.DEFINE_integer("seeds", 3, "Models that are trained side by side.", lower_bound=1)
  flags.DEFINE_integer("steps", None, "Batches in all. Default: 8000; 16000 where a batch is one update.",
                       lower_bound=1)
  flags.DEFINE_list("tasks", list(TASKS), "Tasks of the mixture.")
  flags.DEFINE_list("stages", [], f"Length x rows of every stage. Default: {curriculum.DEFAULT_STAGES}; one of"
                    " 4096x32 for --text.")
  flags.DEFINE_list("shares", None, "The share of the steps by which each stage but the last ends. Default:"
                    " 0.6,0.7,0.75 for the default stages.")
  flags.DEFINE_float("leave_at", 0.9, "A stage ends when every task but multivalue passes this on every seed, or on all"
                     " but --stragglers.", 0.0, 1.0)
  flags.DEFINE_integer("stragglers", 0, "How many of the seeds are spare: no stage waits for them, and in the end the"
                       " first that have 95% in every task become seed-0, seed-1, ..., then the best of the others; the"
                       " rest are spare-*. seeds.json has the accuracies of all.", lower_bound=0)
  flags.DEFINE_float("stop_at", None, "The last stage ends when every task passes this on every seed, or on all but"
                     " --stragglers.", 0.0, 1.0)
  flags.DEFINE_string("init", None, "Folder of seed-* to start from, its first --seeds, instead of fresh parameters.")
  command.define_modes([], "One update of every batch, repeat it for several. Default: the arm's own.")
  flags.DEFINE_float("learning_rate", None, "Peak learning rate. Default: 5e-4; 1e-5 for --text.", lower_bound=1e-9)
  flags.DEFINE_integer("warmup", 300, "Batches of warm-up.", lower_bound=0)
  flags.DEFINE_float("lm_weight", 0.1, "Weight of the loss over all tokens beside that over answers.", lower_bound=0.0)
  command.define_path("lm_data", "Folder of prepare_data, as bytes: text that is learned too.")
  flags.DEFINE_integer("lm_rows", 0, "Rows of text in every batch, beside those of the stage.", lower_bound=0)
  flags.DEFINE_float("gate_bias", GATE_BIAS, "Where the gates start of a memory that is added to --init.")
  flags.DEFINE_float("memory_rate", 1.0, "The memory's learning rate over that of the rest.", lower_bound=0.0)
  flags.DEFINE_integer("dilation", 16, "ARL's dilation.", lower_bound=1)
  flags.DEFINE_integer("layers", 4, "Layers.", lower_bound=1)
  flags.DEFINE_integer("width", 256, "Model width E.", lower_bound=2)
  flags.DEFINE_integer("heads", 4, "Attention heads.", lower_bound=1)
  flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Type of matrix products and attention.")
  flags.DEFINE_integer("log_every", 100, "Batches between evaluations.", lower_bound=1)
  flags.DEFINE_integer("examples", 210, "Examples of every task, for --text.", lower_bound=1)
  command.define_resume()
  flags.DEFINE_integer("save_every", 2000, "Batches between checkpoints.", lower_bound=1)


def main(settings: Settings) -> None:
  if "workdir" not in settings.given:
    folder = pathlib.Path("runs/niah", "words" if settings.text else settings.arm)
    settings = dataclasses.replace(settings, workdir=folder)
  check_start(settings)
  if not settings.text:
    check_tasks(settings.tasks)
    settings.refuse(("mesh", "distributed"), "without --text the seeds are spread over all devices of this process;"
                    " leave it out.")
    train(settings)
    return
  words.check(settings, settings.tasks)
  settings.refuse(("arm", "seeds", "steps", "shares", "leave_at", "stragglers", "stop_at", "warmup", "lm_weight",
                   "lm_data", "lm_rows", "gate_bias", "memory_rate", "dilation", "layers", "width", "heads", "dtype",
                   "log_every", "save_every"), "--text fine-tunes one model as it is; leave it out.")
  if len(settings.stages) > 1:
    raise ValueError(f"--stages={','.join(settings.stages)}; --text has a single one.")
  words.fine_tune(settings, settings.init, settings.tasks, settings.examples,
                  *curriculum.sizes(settings.stages, "4096x32")[0], modes=settings.mode or (Dense(),),
                  learning_rate=settings.learning_rate or 1e-5, resume=settings.resume)


def check_start(settings: Settings) -> None:
  """Raises ValueError where a run would write over the models that it starts from."""
  start = settings.init or ""
  folders = [start] if settings.text else start.split(",")
  if any(local_path(one, "--init").resolve() == settings.workdir.resolve() for one in folders if one):
    raise ValueError(f"--init={start} is the --workdir too, where the run would write over it; give another"
                     " --workdir.")


def configuration(settings: Settings) -> RATPlusConfig:
  """Equal parameters in all arms: attention has no gate, so its MLP is half a width wider."""
  memory = settings.arm.startswith("ratplus")
  width = 4 * settings.width + (0 if memory else settings.width // 2)
  choices: dict[str, Any] = {"dtype": settings.dtype}
  return RATPlusConfig(mini_niah.VOCAB_SIZE, settings.layers, settings.width, settings.heads, mlp_dim=width,
                       memory=memory, init_std=None, **choices)


def mode_sets(settings: Settings) -> list[tuple[Mode, ...]]:
  """What a batch may be trained under, one update each; a batch draws one of these sets."""
  if settings.mode:
    return [settings.mode]
  if settings.arm in ("attention", "ratplus_dense"):
    return [(Dense(),)]
  return [(Dilated(d), Dense()) for d in ((8, 16, 32) if settings.arm == "ratplus_mixed" else (settings.dilation,))]


def text_of(settings: Settings) -> TokenFile | None:
  """The text of --lm_data; None without. Raises ValueError as `curriculum.text_beside`."""
  if not settings.lm_rows:
    settings.refuse(("lm_data",), "without --lm_rows none of it is read; give some.")
    return None
  if settings.lm_data is None:
    raise ValueError(f"--lm_rows={settings.lm_rows} without --lm_data; give a folder of prepare_data.")
  longest = max(length for length, _ in curriculum.sizes(settings.stages))
  return curriculum.text_beside(settings.lm_data, longest, settings.workdir / "data")


def _accuracy(model: RATPlusLM, mode: Mode, stage: Stage, params: Any, step: jax.Array) -> jax.Array:
  made = mini_niah.batch(stage.questions, stage.length, ACCURACY_SEED, step)
  return jnp.mean(answered(model, params, made, mode=mode).reshape(len(stage.tasks), -1), axis=1)


class Run(NamedTuple):
  """What `train` goes through: static parts, and where it starts."""

  config: RATPlusConfig
  optimizer: Optimizer
  plan: list[Stage]
  sets: list[tuple[Mode, ...]]
  seeds: jax.Array
  checkpoints: Checkpoints
  state: Any
  notes: dict[str, Any]
  text: tuple[np.ndarray, ...]  # the tokens of --lm_data, for `curriculum.batch_of`


def train(settings: Settings) -> None:
  """From scratch, or from --init, through the stages."""
  run, steps, folder = begin(settings), settings.batches, settings.workdir
  step = int(run.state.step[0])
  size = sum(x.size for x in jax.tree.leaves(run.state.params)) // settings.seeds
  print(f"{settings.arm}: {settings.seeds} seeds of {size:,} parameters, {steps} batches of {max(map(len, run.sets))}"
        f" updates, on {device.name()}", flush=True)
  if (run.notes["done"] or step == steps) and spares.ended(folder) == settings.seeds:
    print(f"finished before: {folder}/seed-*")
    return
  drop_metrics(folder / "metrics.jsonl", step + 1)
  model = RATPlusLM(run.config)
  batch = functools.partial(curriculum.batch_of, lm_weight=settings.lm_weight, lm_rows=settings.lm_rows)
  programs = Programs(model, run.optimizer, run.plan[run.notes["stage"]:], run.sets, run.state, run.seeds,
                      batch=batch, accuracy=functools.partial(_accuracy, model, run.sets[0][-1]), text=run.text)
  state, step, at = through_stages(settings, run, programs, step)
  finish(settings, run, state, step, 100 * programs.final_accuracy(run.plan[at], state.params, step))


def begin(settings: Settings) -> Run:
  """The run of the settings, at its newest checkpoint if it has one."""
  settings.refuse(("examples", "epochs", "answer_room", "ruler", "essay", "tokenizer"),
                  "without --text there are no words; give that too, or leave it out.")
  devices = jax.device_count()
  if settings.seeds % devices:
    raise ValueError(f"--seeds={settings.seeds} do not divide over {devices} devices; use a multiple, or fewer devices"
                     " (CUDA_VISIBLE_DEVICES).")
  first, steps = 1000 * settings.seed, settings.batches
  check_seeds(settings.seed, range(first, first + settings.seeds))
  if settings.stragglers >= settings.seeds:
    raise ValueError(f"--stragglers={settings.stragglers} of --seeds={settings.seeds}; leave one seed at least.")
  plan = curriculum.stages(settings.stages, settings.shares, settings.tasks, steps)
  sets, rate = mode_sets(settings), settings.learning_rate or 5e-4
  check_flags(settings, plan)
  config, params = where_to_start(settings)
  for mode in itertools.chain(*sets):
    check_modes(mode, None, config)
  read = text_of(settings)
  seeds = jax.device_put(first + jnp.arange(settings.seeds), over_seeds())
  rates = [("layers/memory_gate*", settings.memory_rate)] if settings.memory_rate != 1 else []
  optimizer = rat_jax.make_optimizer(rate, total_steps=steps, min_learning_rate=0.0,
                                     warmup_steps=min(settings.warmup, steps), rates=rates)
  checkpoints = Checkpoints(output.made(settings.workdir) / "run")
  notes: dict[str, Any] = {"arm": settings.arm, "tasks": list(settings.tasks), "steps": steps,
                           "stages": [[stage.length, stage.rows, stage.until] for stage in plan],
                           "seeds": settings.seeds, "seed": settings.seed,
                           "modes": [[str(mode) for mode in modes] for modes in sets],
                           "init": settings.init and f"{settings.init} {fingerprint(params)}",
                           "learning_rate": rate, "warmup": settings.warmup,
                           "lm_weight": settings.lm_weight, "leave_at": settings.leave_at,
                           "stragglers": settings.stragglers, "memory_rate": settings.memory_rate,
                           "gate_bias": config.gate_bias, "lm_rows": settings.lm_rows,
                           "lm_data": settings.lm_data and str(settings.lm_data),
                           "data_sha256": read and read.sidecar.sha256, "log_every": settings.log_every,
                           "stop_at": settings.stop_at, "stage": 0, "done": False}
  state, notes = start(settings, RATPlusLM(config), optimizer, params, seeds, checkpoints, notes)
  tokens = (np.asarray(read.tokens),) if read else ()
  return Run(config, optimizer, plan, sets, seeds, checkpoints, state, notes, tokens)


def check_flags(settings: Settings, plan: Sequence[Stage]) -> None:
  """Raises ValueError for modes that nothing is trained under, and for flags that would change nothing."""
  command.check_trained(settings.mode)
  if len(plan) == 1:
    settings.refuse(("leave_at",), "a single stage is left by no accuracy; give --stop_at, or leave it out.")
  if settings.mode or settings.arm not in ("ratplus", "sparse_branch"):
    settings.refuse(("dilation",), f"it is of ARL with one dilation, which --arm={settings.arm}"
                    f"{' with --mode' if settings.mode else ''} has not; leave it out.")
  if not settings.arm.startswith("ratplus"):
    settings.refuse(("memory_rate",), f"--arm={settings.arm} has no memory; leave it out.")


def where_to_start(settings: Settings) -> tuple[RATPlusConfig, Any]:
  """(config, the parameters of --init, to which a memory is added if the arm has one); None for fresh ones."""
  arm, init = settings.arm, settings.init
  no_memory = "it is where the gates start of a memory that is added to --init, and none is added; leave it out."
  if init is None:
    settings.refuse(("gate_bias",), no_memory)
    return configuration(settings), None
  config, params = load(init)
  for name, has in (("layers", config.num_layers), ("width", config.embed_dim), ("heads", config.num_heads),
                    ("dtype", config.dtype)):
    value = getattr(settings, name)
    if name in settings.given and value != has:
      raise ValueError(f"--{name}={value} and --init={init}, which has {has}; leave the flag out.")
  found = len(jax.tree.leaves(params)[0])
  if found < settings.seeds:
    raise ValueError(f"--init={init} holds {found} seeds; use --seeds={found} or less.")
  if arm.startswith("ratplus") and not config.memory:
    params = jax.vmap(lambda p: add_memory(config, p, settings.gate_bias)[1])(params)
    config = dataclasses.replace(config, memory=True, gate_bias=settings.gate_bias)
  else:
    settings.refuse(("gate_bias",), no_memory)
  if config.memory != arm.startswith("ratplus"):
    raise ValueError(f"--arm={arm} and --init={init}, which has memory={config.memory}; give the arm of --init.")
  return config, params


def start(settings: Settings, model: RATPlusLM, optimizer: Optimizer, params: Any, seeds: jax.Array, run: Checkpoints,
          notes: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
  """The states of all seeds, stacked: those of the run's newest checkpoint, else of `params`, else fresh ones."""
  tokens = np.zeros((1, 8), np.int32)
  if params is None:
    params = jax.jit(jax.vmap(lambda seed: model.init(jax.random.key(seed), tokens)["params"]))(seeds)
    params["embedding"] *= _EMBEDDING_SCALE
  params = jax.tree.map(lambda x: x[:len(seeds)], params)
  fresh = jax.jit(jax.vmap(lambda p: rat_jax.init_train_state(model, p, optimizer)))(params)
  if output.resumes(settings.resume, run):
    state, saved = run.restore(dataclasses.replace(fresh, step=fresh.step[0]), model.config)
    output.check_same_run(run.folder, saved, {k: v for k, v in notes.items() if k not in ("stage", "done")})
    print(f"resuming from step {int(state.step)}")
    fresh, notes = dataclasses.replace(state, step=jnp.full_like(fresh.step, state.step)), saved
  return jax.device_put(fresh, over_seeds()), notes


def through_stages(settings: Settings, run: Run, programs: Programs, step: int) -> tuple[Any, int, int]:
  """(state, batches done, stage) at the end: where enough seeds pass, or after all batches."""
  state, at, done, steps = run.state, run.notes["stage"], run.notes["done"], settings.batches
  with tqdm(total=steps, initial=step, desc=settings.arm, unit="batch", disable=None) as bar:
    clock, since = time.perf_counter(), step
    while step < steps and not done:
      modes = run.sets[np.random.default_rng([settings.seed, step]).integers(len(run.sets))]
      state, metrics = programs.train(run.plan[at], modes, state, run.seeds, step)
      step += 1
      bar.update()
      if step % settings.log_every == 0 or step == steps:
        loss = np.asarray(metrics["loss"])  # waits for the device
        spent, accuracy = time.perf_counter() - clock, programs.accuracy(run.plan[at], state.params, step)
        if not np.isfinite(loss).all():
          saved = run.checkpoints
          raise FloatingPointError(f"the loss is {loss.tolist()} at step {step}; {saved.folder} has checkpoints of"
                                   f" steps {saved.steps()}. Use a lower --learning_rate.")
        report(settings.workdir, bar, step, run.plan[at], loss, accuracy, spent / (step - since))
        last, enough = at == len(run.plan) - 1, settings.seeds - settings.stragglers
        done = last and settings.stop_at is not None and (accuracy.min(axis=1) >= settings.stop_at).sum() >= enough
        passed = spares.passes(accuracy, settings.tasks, settings.leave_at).sum()
        if not last and (passed >= enough or step >= run.plan[at].until):
          at += 1
      if done or step == steps or step % settings.save_every == 0:
        notes = run.notes | {"stage": at, "done": bool(done)}
        run.checkpoints.save(dataclasses.replace(state, step=state.step[0]), run.config, notes)
      if step % settings.log_every == 0:
        clock, since = time.perf_counter(), step
  return state, step, at


def report(folder, bar, step: int, stage: Stage, loss: np.ndarray, accuracy: np.ndarray, seconds: float) -> None:
  """A JSON line of every seed, and the worst seed to the terminal."""
  line = {"step": step, "length": stage.length, "loss": loss.tolist(), "seconds_per_batch": seconds,
          "accuracy": {name: accuracy[:, i].tolist() for i, name in enumerate(stage.tasks)}}
  with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
    file.write(json.dumps(line) + "\n")
  text = " ".join(f"{name}={100 * x:.0f}" for name, x in zip(stage.tasks, accuracy.min(axis=0), strict=True))
  bar.set_postfix_str(f"T={stage.length}, worst seed: {text}")
  if bar.disable:
    print(f"{step} T={stage.length} {seconds:.3f} s a batch, worst seed: {text}", flush=True)


def finish(settings: Settings, run: Run, state: Any, step: int, accuracy: np.ndarray) -> None:
  """Writes every seed as a model of its own, for the other commands; `accuracy` [seeds, tasks] is in percent."""
  folder, kept = settings.workdir, spares.keep(accuracy.min(axis=1), settings.stragglers)
  notes = [{"arm": settings.arm, "seed": int(seed), "seeds": int(kept.sum()), "updates": step * len(run.sets[0])}
           for seed in np.asarray(run.seeds)]
  of_tasks = [dict(zip(settings.tasks, one.round(1).tolist(), strict=True)) for one in accuracy]
  spares.write(folder, run.config, state, kept, notes, of_tasks)
  print(f"checkpoints: {folder}/seed-*: {int(kept.sum())} seeds, {np.flatnonzero(kept).tolist()} of those trained")
  low = np.flatnonzero(accuracy.min(axis=1) < MATCHED).tolist()
  if low:
    print(f"below {MATCHED:g}% in a task under {run.sets[0][-1]}: {low}; {folder}/seeds.json has the tasks")


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
