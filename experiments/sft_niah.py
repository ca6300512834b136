"""Trains small models on mini-NIAH: several seeds in one program, short sequences first.

Claim: attention and RAT+ both learn to find needles; what differs is what sparse inference leaves of it
(experiments.eval_niah).  Expected: every task above 95% under Dense on every seed.
Cost on one H200, compilation included: RAT+'s five seeds 453 seconds, attention's twelve 824.
Command: python -m experiments.sft_niah --arm=ratplus --workdir=runs/niah/ratplus      (and --arm=attention, ...)
Another length, or another mode:  --init=runs/niah/ratplus --mode=dilated:16,window=32 --stages=1024x32
Text beside the needles:  --lm_data=runs/data --lm_rows=16
A memory for attention that was trained so:  --init=runs/niah/attention --arm=ratplus --memory_rate=10
Words:  --text --init=runs/pretrain/checkpoints   fine-tunes one model by the RAT+ authors' protocol (text_needles.py).
Resumes from the newest checkpoint in --workdir; stops by batches, or by --stop_at. Seeds are spread over the devices.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

import rat_jax
from experiments import common, niah, text_needles
from experiments.seed_programs import Programs
from rat_jax import Dense, Dilated, RATPlusConfig, RATPlusLM
from rat_jax.convert import add_memory
from rat_jax.data import BYTES, TokenFile
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.mini_niah import TASKS, Rows
from rat_jax.evaluate.needles import answered
from rat_jax.modes import Mode
from rat_jax.train import IGNORED, Checkpoints, Optimizer, TrainState, drop_metrics

# Batches by arm: 16000 updates for all, one of a batch for attention and RAT+ without ARL, two for the others.
STEPS_OF = {"ratplus": 8000, "attention": 16000, "sparse_branch": 8000, "ratplus_dense": 16000, "ratplus_mixed": 8000}
MIXTURE = {"single_1": 3, "single_2": 3, "single_3": 5, "multikey_1": 4, "multikey_2": 10, "multikey_3": 16,
           "multivalue": 14, "multiquery": 9}  # rows of 64
# Fresh embeddings are this much larger than 1/sqrt(E). At that size the tokens drown in what the first layers write at
# random, and most seeds stop at answering with a random needle.
_EMBEDDING_SCALE = 4.0
_STAGES = "128x128,256x64,512x48,1024x32"
_COUNT = 32  # questions per task and evaluation

ARM = flags.DEFINE_enum("arm", "ratplus", list(STEPS_OF), "RAT+ with ARL; attention; attention with ARL's sparse"
                        " branch; RAT+ trained dense only; RAT+ with ARL over several dilations.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Models that are trained side by side.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", None, "Batches in all. Default: 8000; 16000 where a batch is one update.",
                             lower_bound=1)
TASK_NAMES = flags.DEFINE_list("tasks", list(TASKS), "Tasks of the mixture.")
STAGES = flags.DEFINE_list("stages", [], "Length x rows of every stage. Default: 128x128,256x64,512x48,1024x32; one"
                           " of 4096x32 for --text.")
SHARES = flags.DEFINE_list("shares", None, "The share of the steps by which each stage but the last ends. Default:"
                           " 0.6,0.7,0.75 for the default stages.")
LEAVE_AT = flags.DEFINE_float("leave_at", 0.9, "A stage ends when every task but multivalue passes this on every seed,"
                              " or on all but --stragglers.", 0.0, 1.0)
STRAGGLERS = flags.DEFINE_integer("stragglers", 0, "How many of the seeds are spare: no stage waits for them, and in"
                                  " the end the first that have 95% in every task become seed-0, seed-1, ..., then the"
                                  " best of the others; the rest are spare-*. seeds.json has the accuracies of all.",
                                  lower_bound=0)
STOP_AT = flags.DEFINE_float("stop_at", None, "The last stage ends when every task passes this on every seed, or on all"
                             " but --stragglers.", 0.0, 1.0)
INIT = flags.DEFINE_string("init", None, "Folder of seed-* to start from, its first --seeds, instead of fresh"
                           " parameters.")
MODES = common.define_modes([], "One update of every batch, repeat it for several. Default: the arm's own.")
LEARNING_RATE = flags.DEFINE_float("learning_rate", None, "Peak learning rate. Default: 5e-4; 1e-5 for --text.",
                                   lower_bound=1e-9)
WARMUP = flags.DEFINE_integer("warmup", 300, "Batches of warm-up.", lower_bound=0)
LM_WEIGHT = flags.DEFINE_float("lm_weight", 0.1, "Weight of the loss over all tokens beside that over answers.",
                               lower_bound=0.0)
LM_DATA = common.define_path("lm_data", "Folder of prepare_data, as bytes: text that is learned too.")
LM_ROWS = flags.DEFINE_integer("lm_rows", 0, "Rows of text in every batch, beside those of the stage.", lower_bound=0)
GATE_BIAS = flags.DEFINE_float("gate_bias", -12.0, "Where the gates start of a memory that is added to --init.")
MEMORY_RATE = flags.DEFINE_float("memory_rate", 1.0, "The memory's learning rate over that of the rest.",
                                 lower_bound=0.0)
DILATION = flags.DEFINE_integer("dilation", 16, "ARL's dilation.", lower_bound=1)
LAYERS = flags.DEFINE_integer("layers", 4, "Layers.", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", 256, "Model width E.", lower_bound=2)
HEADS = flags.DEFINE_integer("heads", 4, "Attention heads.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Type of matrix products and attention.")
LOG_EVERY = flags.DEFINE_integer("log_every", 100, "Batches between evaluations.", lower_bound=1)
EXAMPLES = flags.DEFINE_integer("examples", 210, "Examples of every task, for --text.", lower_bound=1)
SAVE_EVERY = flags.DEFINE_integer("save_every", 2000, "Batches between checkpoints.", lower_bound=1)


def configuration(arm: str) -> RATPlusConfig:
  """Equal parameters in all arms: attention has no gate, so its MLP is half a width wider."""
  memory = arm.startswith("ratplus")
  width = 4 * WIDTH.value + (0 if memory else WIDTH.value // 2)
  choices: dict[str, Any] = {"dtype": DTYPE.value}
  return RATPlusConfig(mini_niah.VOCAB_SIZE, LAYERS.value, WIDTH.value, HEADS.value, mlp_dim=width, memory=memory,
                       init_std=None, **choices)


def mode_sets(arm: str) -> list[tuple[Mode, ...]]:
  """What a batch may be trained under, one update each; a batch draws one of these sets."""
  if MODES.value:
    return [tuple(MODES.value)]
  if arm in ("attention", "ratplus_dense"):
    return [(Dense(),)]
  return [(Dilated(d), Dense()) for d in ((8, 16, 32) if arm == "ratplus_mixed" else (DILATION.value,))]


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of the curriculum, at `length` tokens and `rows` sequences a batch."""
  length: int
  rows: int
  until: int  # the batch by which it ends

  @property
  def mixture(self) -> tuple[Rows, ...]:
    """The mixture scaled to the stage's rows, two of every task at least: some questions packed, and a single one."""
    chosen = {name: MIXTURE[name] for name in TASK_NAMES.value}
    if self.rows < 2 * len(chosen):
      raise ValueError(f"--stages={self.length}x{self.rows} has less than two rows for each of {len(chosen)} tasks; use"
                       " more rows, or fewer --tasks.")
    exact = {name: n * self.rows / sum(chosen.values()) for name, n in chosen.items()}
    counts = {name: max(2, int(x)) for name, x in exact.items()}
    while sum(counts.values()) > self.rows:
      counts[max((name for name, n in counts.items() if n > 2), key=lambda name: counts[name] - exact[name])] -= 1
    while sum(counts.values()) < self.rows:
      counts[max(exact, key=lambda name: exact[name] - counts[name])] += 1
    return mini_niah.training_rows(counts, self.length)


def sizes(default: str) -> list[tuple[int, int]]:
  """(length, rows) of every stage."""
  try:
    found = [(int(length), int(rows)) for length, rows in (x.split("x") for x in STAGES.value or default.split(","))]
    if min(map(min, found)) < 1:
      raise ValueError("a stage of nothing")
  except ValueError as error:
    raise ValueError(f"--stages={','.join(STAGES.value)}; write each as length x rows, such as 256x64.") from error
  return found


def stages(steps: int) -> list[Stage]:
  """The curriculum of --stages and --shares over `steps` batches. Raises ValueError where these do not fit."""
  of_stage = sizes(_STAGES)
  shares = SHARES.value if SHARES.value is not None else [] if STAGES.value else ["0.6", "0.7", "0.75"]
  if len(shares) != len(of_stage) - 1:
    raise ValueError(f"--shares={','.join(shares)} for {len(of_stage)} stages; give one share less than stages.")
  try:
    parts = [float(share) for share in shares]
  except ValueError as error:
    raise ValueError(f"--shares={','.join(shares)}; write each as a number, such as 0.6.") from error
  if parts != sorted(parts) or not all(0 < part < 1 for part in parts):
    raise ValueError(f"--shares={','.join(shares)}; they must rise from above 0 to below 1.")
  ends = [round(part * steps) for part in parts] + [steps]
  return [Stage(length, rows, end) for (length, rows), end in zip(of_stage, ends, strict=True)]


def text() -> TokenFile | None:
  """The text of --lm_data; None without. Raises ValueError for text that is not bytes, or too short."""
  if not LM_ROWS.value:
    common.refuse(("lm_data",), "without --lm_rows none of it is read; give some.")
    return None
  if LM_DATA.value is None:
    raise ValueError(f"--lm_rows={LM_ROWS.value} without --lm_data; give a folder of prepare_data.")
  file = common.corpus(LM_DATA.value, common.workdir(f"niah/{ARM.value}") / "data")["train"]
  if file.sidecar.tokenizer != BYTES.name:
    raise ValueError(f"--lm_data={LM_DATA.value} has the tokenizer {file.sidecar.tokenizer}; use {BYTES.name}.")
  longest = max(length for length, _ in sizes(_STAGES))
  if len(file.tokens) <= longest + 1:
    raise ValueError(f"--lm_data={LM_DATA.value} has {len(file.tokens)} tokens; a row takes {longest + 1}, use more.")
  return file


def batch_of(stage: Stage, seed: jax.Array, step: jax.Array | int, *text: jax.Array) -> dict[str, jax.Array]:
  """The batch [B, T] of a step and a seed; answers weigh as much as they are rare, rows of `text` as much again."""
  made = mini_niah.batch(stage.mixture, stage.length, seed, step)
  answers, counted = made["answers"], made["targets"] != IGNORED
  weights = answers / jnp.maximum(jnp.sum(answers), 1) + LM_WEIGHT.value * counted / jnp.sum(counted)
  batch = {"tokens": made["tokens"], "targets": made["targets"], "weights": weights}
  if text:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)  # `mini_niah.batch` folds `step` alone
    starts = jax.random.randint(key, (LM_ROWS.value,), 0, len(text[0]) - stage.length - 1)
    rows = jax.vmap(lambda at: jax.lax.dynamic_slice(text[0], (at,), (stage.length + 1,)))(starts).astype(jnp.int32)
    targets = jnp.where(rows[:, :-1] == BYTES.eod_id, IGNORED, rows[:, 1:])
    counted = targets != IGNORED
    read = {"tokens": rows[:, :-1], "targets": targets, "weights": counted / jnp.sum(counted)}
    batch = {name: jnp.concatenate([batch[name], read[name]]) for name in batch}
  return batch


def _accuracy(model: RATPlusLM, mode: Mode, stage: Stage, params: Any, step: jax.Array) -> jax.Array:
  rows = tuple(Rows(TASKS[name], _COUNT) for name in TASK_NAMES.value)
  made = mini_niah.batch(rows, stage.length, niah.ACCURACY_SEED, step)
  return jnp.mean(answered(model, params, made, mode=mode).reshape(-1, _COUNT), axis=1)


def main() -> None:
  (text_needles if text_needles.TEXT.value else niah).check_tasks(TASK_NAMES.value)
  if text_needles.TEXT.value:
    common.refuse(("arm", "seeds", "steps", "shares", "leave_at", "stragglers", "stop_at", "warmup", "lm_weight",
                   "lm_data", "lm_rows", "gate_bias", "memory_rate", "dilation", "layers", "width", "heads", "dtype",
                   "log_every", "save_every"), "--text fine-tunes one model as it is; leave it out.")
    if len(STAGES.value) > 1:
      raise ValueError(f"--stages={','.join(STAGES.value)}; --text has a single one.")
    text_needles.fine_tune(INIT.value, TASK_NAMES.value, EXAMPLES.value, *sizes("4096x32")[0],
                           modes=MODES.value or [Dense()], learning_rate=LEARNING_RATE.value or 1e-5)
  else:
    train()


class Run(NamedTuple):
  """What `train` goes through: static parts, and where it starts."""

  folder: Path
  config: RATPlusConfig
  optimizer: Optimizer
  plan: list[Any]
  sets: list[tuple[Mode, ...]]
  seeds: jax.Array
  checkpoints: Checkpoints
  state: Any
  notes: dict[str, Any]
  text: tuple[np.ndarray, ...]  # the tokens of --lm_data, for `batch_of`


def train() -> None:
  """From scratch, or from --init, through the stages."""
  run, steps = begin(), STEPS.value or STEPS_OF[ARM.value]
  step = int(run.state.step[0])
  size = sum(x.size for x in jax.tree.leaves(run.state.params)) // SEEDS.value
  print(f"{ARM.value}: {SEEDS.value} seeds of {size:,} parameters, {steps} batches of {max(map(len, run.sets))}"
        f" updates, on {common.device()}", flush=True)
  ended = [path for kind in ("seed", "spare") for path in run.folder.glob(f"{kind}-*") if Checkpoints(path).steps()]
  if (run.notes["done"] or step == steps) and len(ended) == SEEDS.value:
    print(f"finished before: {run.folder}/seed-*")
    return
  drop_metrics(run.folder / "metrics.jsonl", step + 1)
  model = RATPlusLM(run.config)
  programs = Programs(model, run.optimizer, run.plan[run.notes["stage"]:], run.sets, run.state, run.seeds,
                      batch=batch_of, accuracy=functools.partial(_accuracy, model, run.sets[0][-1]), text=run.text)
  state, step, at = through_stages(run, programs, step, steps)
  finish(run, state, step, 100 * programs.final_accuracy(run.plan[at], state.params, step))


def begin() -> Run:
  """The run of the flags, at its newest checkpoint if it has one."""
  common.refuse(("examples", "epochs", "answer_room", "ruler", "essay", "tokenizer"),
                "without --text there are no words; give that too, or leave it out.")
  arm, steps = ARM.value, STEPS.value or STEPS_OF[ARM.value]
  if SEEDS.value % jax.device_count():
    raise ValueError(f"--seeds={SEEDS.value} do not divide over {jax.device_count()} devices; use a multiple, or fewer"
                     " devices (CUDA_VISIBLE_DEVICES).")
  first = 1000 * common.SEED.value
  niah.check_seeds(range(first, first + SEEDS.value))
  if STRAGGLERS.value >= SEEDS.value:
    raise ValueError(f"--stragglers={STRAGGLERS.value} of --seeds={SEEDS.value}; leave one seed at least.")
  read = text()
  config, params = (configuration(arm), None) if INIT.value is None else niah.load(INIT.value)
  for flag, has in ((LAYERS, config.num_layers), (WIDTH, config.embed_dim), (HEADS, config.num_heads),
                    (DTYPE, config.dtype)):
    if flag.present and flag.value != has:
      raise ValueError(f"--{flag.name}={flag.value} and --init={INIT.value}, which has {has}; leave the flag out.")
  if INIT.value and arm.startswith("ratplus") and not config.memory:
    params = jax.vmap(lambda p: add_memory(config, p, GATE_BIAS.value)[1])(params)
    config = dataclasses.replace(config, memory=True, gate_bias=GATE_BIAS.value)
  if config.memory != arm.startswith("ratplus"):
    raise ValueError(f"--arm={arm} and --init={INIT.value}, which has memory={config.memory}; give the arm of --init.")
  seeds = jax.device_put(first + jnp.arange(SEEDS.value), niah.over_seeds())
  model, plan, sets = RATPlusLM(config), stages(steps), mode_sets(arm)
  rate = LEARNING_RATE.value or 5e-4
  rates = [("layers/memory_gate*", MEMORY_RATE.value)] if MEMORY_RATE.value != 1 else []
  optimizer = rat_jax.make_optimizer(rate, total_steps=steps, min_learning_rate=0.0,
                                     warmup_steps=min(WARMUP.value, steps), rates=rates)
  folder = common.workdir(f"niah/{arm}")
  checkpoints = Checkpoints(folder / "run")
  notes: dict[str, Any] = {"arm": arm, "tasks": TASK_NAMES.value, "steps": steps,
                           "stages": [[stage.length, stage.rows, stage.until] for stage in plan],
                           "seeds": SEEDS.value, "seed": common.SEED.value,
                           "modes": [[str(mode) for mode in modes] for modes in sets],
                           "init": INIT.value and f"{INIT.value} {niah.fingerprint(params)}",
                           "learning_rate": rate, "warmup": WARMUP.value,
                           "lm_weight": LM_WEIGHT.value, "leave_at": LEAVE_AT.value, "stragglers": STRAGGLERS.value,
                           "memory_rate": MEMORY_RATE.value, "gate_bias": config.gate_bias,
                           "lm_rows": LM_ROWS.value, "lm_data": LM_DATA.value,
                           "data_sha256": read and read.sidecar.sha256, "log_every": LOG_EVERY.value,
                           "stop_at": STOP_AT.value, "stage": 0, "done": False}
  state, notes = start(model, optimizer, params, seeds, checkpoints, notes)
  tokens = (np.asarray(read.tokens),) if read else ()
  return Run(folder, config, optimizer, plan, sets, seeds, checkpoints, state, notes, tokens)


def through_stages(run: Run, programs: Programs, step: int, steps: int) -> tuple[Any, int, int]:
  """(state, batches done, stage) at the end: where enough seeds pass, or after `steps`."""
  state, at, done = run.state, run.notes["stage"], run.notes["done"]
  with tqdm(total=steps, initial=step, desc=ARM.value, unit="batch", disable=None) as bar:
    clock, since = time.perf_counter(), step
    while step < steps and not done:
      modes = run.sets[np.random.default_rng([common.SEED.value, step]).integers(len(run.sets))]
      state, metrics = programs.train(run.plan[at], modes, state, run.seeds, step)
      step += 1
      bar.update()
      if step % LOG_EVERY.value == 0 or step == steps:
        loss = np.asarray(metrics["loss"])  # waits for the device
        spent, accuracy = time.perf_counter() - clock, programs.accuracy(run.plan[at], state.params, step)
        if not np.isfinite(loss).all():
          saved = run.checkpoints
          raise FloatingPointError(f"the loss is {loss.tolist()} at step {step}; {saved.folder} has checkpoints of"
                                   f" steps {saved.steps()}. Use a lower --learning_rate.")
        report(run.folder, bar, step, run.plan[at], loss, accuracy, spent / (step - since))
        last, enough = at == len(run.plan) - 1, SEEDS.value - STRAGGLERS.value
        done = last and STOP_AT.value is not None and (accuracy.min(axis=1) >= STOP_AT.value).sum() >= enough
        if not last and (passes(accuracy).sum() >= enough or step >= run.plan[at].until):
          at += 1
      if done or step == steps or step % SAVE_EVERY.value == 0:
        notes = run.notes | {"stage": at, "done": bool(done)}
        run.checkpoints.save(dataclasses.replace(state, step=state.step[0]), run.config, notes)
      if step % LOG_EVERY.value == 0:
        clock, since = time.perf_counter(), step
  return state, step, at


def finish(run: Run, state: Any, step: int, accuracy: np.ndarray) -> None:
  """Writes every seed as a model of its own, for the other scripts; `accuracy` [seeds, tasks] is in percent."""
  kept = keep(accuracy.min(axis=1))
  for path in (*run.folder.glob("seed-*"), *run.folder.glob("spare-*")):
    shutil.rmtree(path)
  every = []
  for kind, chosen in (("seed", kept), ("spare", ~kept)):
    for number, i in enumerate(np.flatnonzero(chosen)):
      one = jax.tree.map(lambda x, i=i: x[i], state)
      about = {"arm": ARM.value, "seed": int(run.seeds[i]), "seeds": int(kept.sum()),
               "updates": step * len(run.sets[0])}
      Checkpoints(run.folder / f"{kind}-{number}").save(one, run.config, about)
      of_tasks = dict(zip(TASK_NAMES.value, accuracy[i].round(1).tolist(), strict=True))
      every.append({"seed": int(run.seeds[i]), "folder": f"{kind}-{number}", "accuracy": of_tasks})
  common.write_json(run.folder / "seeds.json", every)
  print(f"checkpoints: {run.folder}/seed-*: {int(kept.sum())} seeds, {np.flatnonzero(kept).tolist()} of those trained")
  low = np.flatnonzero(accuracy.min(axis=1) < niah.MATCHED).tolist()
  if low:
    print(f"below {niah.MATCHED:g}% in a task under {run.sets[0][-1]}: {low}; {run.folder}/seeds.json has the tasks")


def keep(worst: np.ndarray) -> np.ndarray:
  """Which seeds are no spares, bool [seeds] of their accuracy in the worst task: the first that pass, then the best."""
  order = np.lexsort((np.arange(len(worst)), -np.minimum(worst, niah.MATCHED)))
  kept = np.zeros(len(worst), bool)
  kept[order[:len(worst) - STRAGGLERS.value]] = True
  return kept


def passes(accuracy: np.ndarray) -> np.ndarray:
  """Which seeds pass --leave_at in every task but multivalue, which comes last: bool [seeds] of [seeds, tasks]."""
  counts = np.array([name != "multivalue" or len(TASK_NAMES.value) == 1 for name in TASK_NAMES.value])
  return accuracy[:, counts].min(axis=1) >= LEAVE_AT.value


def report(folder, bar, step: int, stage: Stage, loss: np.ndarray, accuracy: np.ndarray, seconds: float) -> None:
  """A JSON line of every seed, and the worst seed to the terminal."""
  line = {"step": step, "length": stage.length, "loss": loss.tolist(), "seconds_per_batch": seconds,
          "accuracy": {name: accuracy[:, i].tolist() for i, name in enumerate(TASK_NAMES.value)}}
  with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
    file.write(json.dumps(line) + "\n")
  text = " ".join(f"{name}={100 * x:.0f}" for name, x in zip(TASK_NAMES.value, accuracy.min(axis=0), strict=True))
  bar.set_postfix_str(f"T={stage.length}, worst seed: {text}")
  if bar.disable:
    print(f"{step} T={stage.length} {seconds:.3f} s a batch, worst seed: {text}", flush=True)


def start(model: RATPlusLM, optimizer: Optimizer, params: Any, seeds: jax.Array, run: Checkpoints,
          notes: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
  """The states of all seeds, stacked: those of the run's newest checkpoint, else of `params`, else fresh ones."""
  tokens = np.zeros((1, 8), np.int32)
  if params is None:
    params = jax.jit(jax.vmap(lambda seed: model.init(jax.random.key(seed), tokens)["params"]))(seeds)
    params["embedding"] *= _EMBEDDING_SCALE
  found = jax.tree.leaves(params)[0].shape[0]
  if found < len(seeds):
    raise ValueError(f"--init={INIT.value} holds {found} seeds; use --seeds={found} or less.")
  params = jax.tree.map(lambda x: x[:len(seeds)], params)
  fresh = jax.jit(jax.vmap(lambda p: rat_jax.init_train_state(model, p, optimizer)))(params)
  if run.steps():
    state, saved = run.restore(dataclasses.replace(fresh, step=fresh.step[0]), model.config)
    common.check_same_run(run.folder, saved, {k: v for k, v in notes.items() if k not in ("stage", "done")})
    print(f"resuming from step {int(state.step)}")
    fresh, notes = dataclasses.replace(state, step=jnp.full_like(fresh.step, state.step)), saved
  return jax.device_put(fresh, niah.over_seeds()), notes


if __name__ == "__main__":
  common.run(main)
