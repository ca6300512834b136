"""Why the memory helps sparse inference: selection, computation, and how far it reaches.

Claims (arXiv 2605.28640): H1, heads choose the right keys more often; H2, what they choose carries more, so that even a
random choice keeps the answer.  Expected: RAT+ above attention in both.
Cost of three seeds of both: 15 minutes on one H100.
Command: python -m experiments.hypotheses --checkpoint=runs/niah/ratplus --checkpoint=runs/niah/attention
Writes results.json, a figure for each question, and prints the figures' numbers. Finished parts are kept.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

import rat_jax
from experiments import common, eval_niah, hypotheses_plots, niah
from experiments.eval_niah import BATCH_SIZE, COUNT, LENGTH
from experiments.niah_table import Row
from pallas_kernels.gated_scan.xla import linear_scan
from rat_jax import Dense, Dilated, MoBA, Quest, RATPlusLM, Selection, SnapKV, layout as layouts, transformer
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.mini_niah import TASKS, Rows, Task
from rat_jax.modes import Mode

DRAWS = flags.DEFINE_integer("draws", 5, "Seeds of the random selector.", lower_bound=1)
HARD = ("multikey_2", "multikey_3", "multivalue")  # where attention under a small budget fails


def heads(model: RATPlusLM, params: Any) -> dict[str, Any]:
  """H1: the share of sequences in which a head has chosen every symbol of the answer at the step that needs it.

  {method: {task: [seeds][layers][heads]}} in percent, at 1/16 of the tokens.
  """
  budget, size = LENGTH.value // 16, BATCH_SIZE.value
  methods = {"Quest 16": lambda task: Quest(budget, block=16, keep_first=False),
             "MoBA 16 decode": lambda task: MoBA(budget // 16, block=16, keep_first=False),
             "SnapKV aware": lambda task: SnapKV(budget, obs_window=task.query_length)}
  found: dict[str, Any] = {}
  for method, build in methods.items():
    found[method] = {}
    for name, task in TASKS.items():
      made = eval_niah.sequences(LENGTH.value, COUNT.value)[name]
      seeds = [np.concatenate([_hits(model, one, jax.tree.map(lambda x, i=i: x[i:i + size], made), task, build(task))
                               for i in range(0, COUNT.value, size)]) for one in _seeds(params)]
      found[method][name] = [(100 * hits.mean(axis=0)).tolist() for hits in seeds]
  return found


def _seeds(params: Any) -> list[Any]:
  return [jax.tree.map(lambda x, i=i: x[i], params) for i in range(len(jax.tree.leaves(params)[0]))]


def _hits(model: RATPlusLM, params: Any, made: dict[str, jax.Array], task: Task, mode: Mode) -> np.ndarray:
  """bool [B, layers, heads]: whether a head has chosen every symbol of the answer at the step that needs it."""
  first = LENGTH.value - task.answer_length
  prompt = first if isinstance(mode, SnapKV) else first - task.query_length
  chosen = rat_jax.inspect(model, params, made["tokens"], mode, prefill_mode=Dense(),
                           prompt_lengths=np.full(len(made["tokens"]), prompt))
  at = np.asarray(made["golden"])[:, first - 1:, None, None]  # [B, steps, 1, 1]; -1 where the step needs none
  layers = []
  for one in chosen:
    if isinstance(one, Selection):
      kept = (np.asarray(one.blocks)[:, first - 1:] == at // mode.block).any(axis=3)  # type: ignore[attr-defined]
    else:
      kept = (np.asarray(one.positions)[:, None] == at).any(axis=3)
    layers.append((kept | (at[..., 0] < 0)).all(axis=1))
  return np.stack(layers, axis=1)


def random_choice(model: RATPlusLM, params: Any) -> dict[str, Any]:
  """H2: accuracy at a quarter of the tokens, chosen at random: {method: {task: [draws][seeds]}} in percent."""
  quarter = LENGTH.value // 4

  def rows(draw):
    options: dict[str, Any] = {"selector": "random", "seed": draw}
    yield "Quest 16", Row("", lambda task: (Quest(quarter, block=16, keep_first=False, **options), None))
    yield "MoBA 16 decode", Row("", lambda task: (MoBA(quarter // 16, block=16, keep_first=False, **options), Dense()))
    yield "MoBA 16 prompt", Row("", lambda task: (Dense(), MoBA(quarter // 16, block=16, keep_first=False, **options)),
                                at_answer=True)
    yield "SnapKV aware", Row("", lambda task: (SnapKV(quarter, obs_window=task.query_length, **options), None),
                              at_answer=True)

  found: dict[str, Any] = {}
  for draw in range(DRAWS.value):
    for method, row in rows(draw):
      for name, cell in eval_niah.cells(model, params, row, list(TASKS.values())).items():
        found.setdefault(method, {}).setdefault(name, []).append(cell["accuracy"])
  return found


def two_by_two(model: RATPlusLM, params: Any) -> dict[str, Any]:
  """Choosing by keys with or without the memory, and attending with or without it: {setting: {task: [seeds]}}."""
  every, found = eval_niah.sequences(LENGTH.value, COUNT.value), {}
  made = [every[name] for name in TASKS]
  prompts = [LENGTH.value - task.answer_length - task.query_length for task in TASKS.values()]
  for mode in (Dense(), *(Quest(LENGTH.value // n, block=16, keep_first=False) for n in (8, 16))):
    for select_from in ("memory",) if mode == Dense() else ("memory", "plain"):
      for attend_to in ("memory", "plain"):
        right = niah.which_right(model, params, made, prompts, batch_size=BATCH_SIZE.value, mode=mode,
                                 select_from=select_from, attend_to=attend_to)
        found[f"{mode}, select from {select_from}, attend to {attend_to}"] = {
            name: (100 * one.mean(axis=1)).tolist() for name, one in zip(TASKS, right, strict=True)}
  return found


def future(model: RATPlusLM, params: Any) -> dict[str, Any]:
  """SnapKV compressed under question A: accuracy on A, on a later question B, and on B where it is compressed under B.

  {budget: {task: {"A", "B", "B under B": [seeds]}}} in percent; "dense" has no B under B. Both questions are about keys
  of the same context.
  """
  found: dict[str, Any] = {}
  for name in ("multikey_1", *HARD):
    task = TASKS[name]
    keys = None if task.filler == "needles" else (4, 4)
    made = jax.jit(lambda task=task, keys=keys: mini_niah.batch(
        (Rows(task, COUNT.value, 2, keys),), LENGTH.value, eval_niah.DATA_SEED, 1))()
    size = task.query_length + task.answer_length
    is_b = np.arange(LENGTH.value) >= LENGTH.value - size
    a, b = (made | {"answers": made["answers"] & counted} for counted in (~is_b, is_b))
    under_a, under_b = (("A", "B"), [a, b], 2), (("B under B",), [b], 1)
    for budget, mode, cases in [("dense", Dense(), (under_a,))] + [
        (f"1/{n}", SnapKV(LENGTH.value // n, obs_window=task.query_length), (under_a, under_b)) for n in (4, 8, 16)]:
      for labels, parts, left in cases:
        prompt = LENGTH.value - left * size + task.query_length
        right = niah.which_right(model, params, parts, [prompt] * len(parts), batch_size=BATCH_SIZE.value, mode=mode)
        found.setdefault(budget, {}).setdefault(name, {}).update(
            {question: (100 * one.mean(axis=1)).tolist() for question, one in zip(labels, right, strict=True)})
  return found


def reach(model: RATPlusLM, params: Any) -> dict[str, Any]:
  """How far back the memory reaches: the mean age in tokens of what a channel holds, [seeds][layers][heads][H], sorted.

  Of a state sum_s w_s x_s the age is sum_s w_s (t - s) over sum_s w_s; the mean is over tokens.
  """
  made = eval_niah.sequences(LENGTH.value, COUNT.value)
  tokens = jnp.concatenate([made[name]["tokens"][:8] for name in TASKS])
  return {"age": [np.asarray(_ages(model, one, tokens)).tolist() for one in _seeds(params)]}


@functools.partial(jax.jit, static_argnums=0)
def _ages(model: RATPlusLM, params: Any, tokens: jax.Array) -> jax.Array:
  config, layout = model.config, layouts.of_tokens(tokens.shape)
  x, ages = transformer.embed(params, tokens), []
  for i in range(config.num_layers):
    p = jax.tree.map(lambda a, i=i: a[i], params["layers"])
    gate = jax.nn.sigmoid(jnp.asarray(transformer.project(config, p, x).gate_logits, jnp.float32))
    (weight,) = linear_scan(gate, (1 - gate,))
    (weighted,) = linear_scan(gate, (weight - (1 - gate),))  # a token's share of it is older by one at the next
    ages.append(jnp.mean(weighted / weight, axis=(0, 1)))
    x, _, _ = transformer.block(config, p, x, layout, None, lambda at: rat_jax.attend(at.q, at.k, at.v, Dense()))
  return jnp.sort(jnp.stack(ages), axis=-1)


def distance(model: RATPlusLM, params: Any) -> dict[str, Any]:
  """Accuracy by the distance from the value's last symbol to the next kept token, under dilation alone.

  {mode: {"right": [seeds][D], "count": [D]}}, over all tasks that ask for one value, in percent.
  """
  found = {}
  for dilation in (8, 16, 32):
    tasks = [task for task in TASKS.values() if task.queries * task.values == 1]
    mode = Dilated(dilation)
    row = Row("", functools.partial(lambda mode, task: (mode, None), mode))
    right = eval_niah.which_right(model, params, row, tasks)
    made = eval_niah.sequences(LENGTH.value, COUNT.value)
    last = {task.name: np.asarray(made[task.name]["golden"]).max(axis=1) for task in tasks}
    away = np.concatenate([(dilation - 1 - last[task.name]) % dilation for task in tasks])
    rights = np.concatenate([right[task.name] for task in tasks], axis=1)
    count = np.bincount(away, minlength=dilation)
    found[str(mode)] = {"count": count.tolist(), "right": [
        (100 * np.bincount(away, one, dilation) / np.maximum(count, 1)).tolist() for one in rights]}
  return found


PARTS = {"heads": heads, "random": random_choice, "two_by_two": two_by_two, "future": future, "reach": reach,
         "distance": distance}
OF_MEMORY = ("two_by_two", "reach")  # what attention has no answer to
ONLY_PARTS = flags.DEFINE_list("parts", list(PARTS), "Questions to answer.")


def compute(job: tuple[str, str]) -> dict[str, Any]:
  """The numbers of (part, checkpoint)."""
  part, checkpoint = job
  config, params = niah.load(checkpoint)
  return PARTS[part](RATPlusLM(config), params)


def main() -> None:
  niah.share_device()
  folder = common.workdir("hypotheses")
  path = folder / "results.json"
  results: dict[str, Any] = common.read_json(path)
  unknown = set(ONLY_PARTS.value) - set(PARTS)
  if unknown:
    raise ValueError(f"--parts={sorted(unknown)} are unknown; use some of {list(PARTS)}.")
  least = 16 * (max(task.query_length for task in TASKS.values()) + 1)
  if LENGTH.value < least:
    raise ValueError(f"--length={LENGTH.value}: SnapKV at 1/16 has no room beside a question; use {least} or more.")
  checkpoints = eval_niah.CHECKPOINTS.value
  names = {checkpoint: niah.name(checkpoint) for checkpoint in checkpoints}
  if len(set(names.values())) < len(checkpoints):
    raise ValueError(f"--checkpoint={checkpoints}: two have one name; give folders of different names.")
  keys: dict[tuple[str, str], str] = {}
  for checkpoint in checkpoints:
    config, params = niah.load(checkpoint)
    of_run = f"{checkpoint} {niah.fingerprint(params)}|{LENGTH.value}|{COUNT.value}|{DRAWS.value}"
    keys |= {(part, checkpoint): f"{part}|{of_run}" for part in ONLY_PARTS.value
             if config.memory or part not in OF_MEMORY}
  jobs = [job for job, key in keys.items() if key not in results]
  done = niah.side_by_side(compute, jobs, eval_niah.WORKERS.value)
  with tqdm(done, total=len(jobs), unit="part", disable=None) as bar:
    for i, found in bar:
      results[keys[jobs[i]]] = found
      common.write_json(path, results)
      if bar.disable:
        print(f"{names[jobs[i][1]]}: {jobs[i][0]} done", flush=True)
  shown = {part: {names[checkpoint]: results[keys[part, checkpoint]] for checkpoint in checkpoints
                  if (part, checkpoint) in keys} for part in ONLY_PARTS.value}
  for part in ONLY_PARTS.value:
    hypotheses_plots.draw(part, shown[part], folder / f"{part}.png")
  print(report(shown))


def report(results: dict[str, dict[str, Any]]) -> str:
  """The figures' numbers, as Markdown tables of means over seeds."""
  return "\n".join(f"\n{part}, {name}\n\n{hypotheses_plots.table(part, found)}" for part, by_name in results.items()
                   for name, found in by_name.items())


if __name__ == "__main__":
  common.run(main)
