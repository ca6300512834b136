"""Why the memory helps sparse inference: selection, computation, and how far it reaches.

Claims (arXiv 2605.28640): H1, heads choose the right keys more often; H2, what they choose carries more, so that even a
random choice keeps the answer.  Expected: RAT+ above attention in both.
Cost of five seeds: RAT+ 753 seconds, attention 556, on one H200 with other work beside them.
Command: python -m experiments.hypotheses --checkpoint=runs/niah/ratplus --checkpoint=runs/niah/attention
Writes results.json, a figure for each question, and prints the figures' numbers. Finished parts are kept. Seeds below
95 in a task under Dense are named and left out (--nomatch keeps them), as in the tables of experiments.eval_niah.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

import rat_jax
from experiments import common, eval_niah, hypotheses_plots, niah, niah_report
from experiments.eval_niah import BATCH_SIZE, COUNT, LENGTH
from experiments.niah_table import Row
from pallas_kernels.scan.xla import linear_scan
from rat_jax import Dense, Dilated, MoBA, PerLayer, Quest, RATPlusLM, Selection, SnapKV, batch as batches, transformer
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.mini_niah import TASKS, Rows, Task
from rat_jax.modes import Mode
from rat_jax.plan import layer_runs

DRAWS = flags.DEFINE_integer("draws", 5, "Draws of the random selector.", lower_bound=1)


def dense(model: RATPlusLM, params: Any, _: str) -> dict[str, Any]:
  """{"dense": {task: cell}}: by these seeds are left out."""
  return {"dense": eval_niah.cells(model, params, Row("dense", lambda question: (Dense(), None)), list(TASKS.values()))}


def heads(model: RATPlusLM, params: Any, method: str) -> dict[str, Any]:
  """H1: the share of sequences in which a head has chosen every symbol of the answer at the step that needs it.

  {method: {task: [seeds][layers][heads]}} in percent, at 1/16 of the tokens.
  """
  size, found, row = BATCH_SIZE.value, {}, methods("1/16")[method]
  for name, task in TASKS.items():
    made, (mode, _) = eval_niah.sequences(name), row.build(task.query_length)
    batches = [jax.tree.map(lambda x, i=i: x[i:i + size], made) for i in range(0, COUNT.value, size)]
    seeds = [np.concatenate([hits(model, one, batch, task, mode, row.at_answer) for batch in batches])
             for one in _seeds(params)]
    found[name] = [(100 * of_seed.mean(axis=0)).tolist() for of_seed in seeds]
  return {method: found}


def methods(part: str, **options: Any) -> dict[str, Row]:
  """The methods, at a part of the tokens such as "1/16"."""
  budget = _tokens(part)
  moba = lambda: MoBA(budget // 16, block=16, keep_first=False, **options)
  return {"Quest 16": Row("", lambda question: (Quest(budget, block=16, keep_first=False, **options), None)),
          "MoBA 16 decode": Row("", lambda question: (moba(), Dense())),
          "MoBA 16 prompt": Row("", lambda question: (Dense(), moba()), at_answer=True),
          "SnapKV aware": Row("", lambda question: (SnapKV(budget, obs_window=question, **options), None),
                              at_answer=True),
          "SnapKV blind": Row("", lambda question: (SnapKV(budget, obs_window=8, **options), None), at_question=True)}


def _seeds(params: Any) -> list[Any]:
  return [jax.tree.map(lambda x, i=i: x[i], params) for i in range(len(jax.tree.leaves(params)[0]))]


def hits(model: RATPlusLM, params: Any, made: dict[str, jax.Array], task: Task, mode: Mode, aware: bool) -> np.ndarray:
  """bool [B, layers, heads]: whether a head has chosen every symbol of the answer at the step that needs it."""
  first = LENGTH.value - task.answer_length
  prompt = first if aware else first - task.query_length
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


def random_choice(model: RATPlusLM, params: Any, method: str) -> dict[str, Any]:
  """H2: accuracy at a quarter of the tokens, chosen at random: {method: {task: [draws][seeds]}} in percent."""
  row, tasks = methods("1/4", selector="random")[method], list(TASKS.values())
  draws = [eval_niah.cells(model, params, row, tasks, draw=draw) for draw in range(DRAWS.value)]
  return {method: {name: [cells[name]["accuracy"] for cells in draws] for name in TASKS}}


def layers(model: RATPlusLM, params: Any, case: str) -> dict[str, Any]:
  """Which layer it is that sparsity harms: accuracy where one alone runs under a method, at 1/8 of the tokens.

  {case: {"layer 0": {task: [seeds]}}} in percent; a case is a method, and another part of the tokens if any.
  """
  method, _, part = case.partition(", ")
  row, count, found = methods(part or "1/8")[method], model.config.num_layers, {}
  for layer in range(count):
    alone = dataclasses.replace(row, build=functools.partial(_in_layer, row, layer, count))
    cells = eval_niah.cells(model, params, alone, list(TASKS.values()))
    found[f"layer {layer}"] = {name: cells[name]["accuracy"] for name in TASKS}
  return {case: found}


def _in_layer(row: Row, layer: int, count: int, question: int) -> tuple[Mode, Mode | None]:
  """The modes of the row in one layer, dense attention in the others."""
  def alone(mode):
    return mode if mode in (None, Dense()) else PerLayer(tuple(mode if i == layer else Dense() for i in range(count)))
  mode, prefill_mode = row.build(question)
  return alone(mode), alone(prefill_mode)


def two_by_two(model: RATPlusLM, params: Any, budget: str) -> dict[str, Any]:
  """Choosing by keys with or without the memory, and attending with or without it: {setting: {task: [seeds]}}."""
  made, found = [eval_niah.sequences(name) for name in TASKS], {}
  prompts = [LENGTH.value - task.answer_length - task.query_length for task in TASKS.values()]
  mode = Dense() if budget == "dense" else Quest(_tokens(budget), block=16, keep_first=False)
  for select_from in ("memory",) if mode == Dense() else ("memory", "plain"):
    for attend_to in ("memory", "plain"):
      right = niah.which_right(model, params, made, prompts, batch_size=BATCH_SIZE.value, mode=mode,
                               select_from=select_from, attend_to=attend_to)
      found[f"{mode}, select from {select_from}, attend to {attend_to}"] = {
          name: (100 * one.mean(axis=1)).tolist() for name, one in zip(TASKS, right, strict=True)}
  return found


def _tokens(budget: str) -> int:  # "1/8"
  return LENGTH.value // int(budget.removeprefix("1/"))


def future(model: RATPlusLM, params: Any, budget: str) -> dict[str, Any]:
  """SnapKV compressed under question A: accuracy on A, on a later question B, and on B where it is compressed under B.

  {budget: {task: {"A", "B", "B under B": [seeds]}}} in percent; "dense" has no B under B. Both questions are about keys
  of the same context.
  """
  found: dict[str, Any] = {}
  for name in ("multikey_1", *niah_report.HARD):
    task = TASKS[name]
    keys = None if task.filler == "needles" else (4, 4)
    made = jax.jit(lambda task=task, keys=keys: mini_niah.batch(
        (Rows(task, COUNT.value, 2, keys),), LENGTH.value, eval_niah.data_seed(), 1))()
    size = task.query_length + task.answer_length
    is_b = np.arange(LENGTH.value) >= LENGTH.value - size
    a, b = (made | {"answers": made["answers"] & counted} for counted in (~is_b, is_b))
    mode: Mode = Dense()
    cases: list[tuple[tuple[str, ...], list, int]] = [(("A", "B"), [a, b], 2)]
    if budget != "dense":
      mode = SnapKV(_tokens(budget), obs_window=task.query_length)
      cases.append((("B under B",), [b], 1))
    found[name] = {}
    for labels, parts, left in cases:
      prompt = LENGTH.value - left * size + task.query_length
      right = niah.which_right(model, params, parts, [prompt] * len(parts), batch_size=BATCH_SIZE.value, mode=mode)
      found[name] |= {question: (100 * one.mean(axis=1)).tolist() for question, one in zip(labels, right, strict=True)}
  return {budget: found}


def reach(model: RATPlusLM, params: Any, _: str) -> dict[str, Any]:
  """How far back the memory reaches: the mean age in tokens of what a channel holds, [seeds][layers][heads][H], sorted.

  Of a state sum_s w_s x_s the age is sum_s w_s (t - s) over sum_s w_s; the mean is over tokens.
  """
  tokens = jnp.concatenate([eval_niah.sequences(name)["tokens"][:8] for name in TASKS])
  return {"age": [np.asarray(_ages(model, one, tokens)).tolist() for one in _seeds(params)]}


@functools.partial(jax.jit, static_argnums=0)
def _ages(model: RATPlusLM, params: Any, tokens: jax.Array) -> jax.Array:
  config, batch = model.config, batches.of_call(tokens)

  def layer(x, at):
    gate = jax.nn.sigmoid(jnp.asarray(transformer.project(config, at.params, x).gate_logits, jnp.float32))
    (weight,) = linear_scan(gate, (1 - gate,))
    (weighted,) = linear_scan(gate, (weight - (1 - gate),))  # a token's share of it is older by one at the next
    x, _, _ = transformer.block(config, at.params, x, batch, None, lambda heads: rat_jax.attend(*heads[:3], Dense()))
    return x, jnp.mean(weighted / weight, axis=(0, 1))

  runs = layer_runs(Dense(), config.num_layers)
  _, (ages,) = transformer.walk(params, runs, transformer.embed(params, tokens), layer)
  return jnp.sort(ages, axis=-1)


def distance(model: RATPlusLM, params: Any, _: str) -> dict[str, Any]:
  """Accuracy by the tokens from the needle's END to the next kept one, under dilation alone; 0 where END is kept.

  A kept token before END holds the needle in part; only at D - 1, where the value's last symbol is kept, it holds all
  that is asked. {mode: {"right": [seeds][D], "count": [D]}}, over all tasks that ask for one value, in percent.
  """
  found = {}
  for dilation in (8, 16, 32):
    tasks = [task for task in TASKS.values() if task.queries * task.values == 1]
    mode = Dilated(dilation)
    row = Row("", functools.partial(lambda mode, question: (mode, None), mode))
    right = eval_niah.which_right(model, params, row, tasks)
    ends = [1 + np.asarray(eval_niah.sequences(task.name)["golden"]).max(axis=1) for task in tasks]  # after the value
    away = (dilation - 1 - np.concatenate(ends)) % dilation
    rights = np.concatenate([right[task.name] for task in tasks], axis=1)
    count = np.bincount(away, minlength=dilation)
    found[str(mode)] = {"count": count.tolist(), "right": [
        (100 * np.bincount(away, one, dilation) / np.maximum(count, 1)).tolist() for one in rights]}
  return found


_METHODS = ("Quest 16", "MoBA 16 decode", "MoBA 16 prompt", "SnapKV aware")  # of which accuracy is asked
# A question, and its pieces: a process takes one at a time.
Part = tuple[Callable[[RATPlusLM, Any, str], dict[str, Any]], tuple[str, ...]]
PARTS: dict[str, Part] = {
    "heads": (heads, ("Quest 16", "MoBA 16 decode", "SnapKV aware", "SnapKV blind")),
    "random": (random_choice, _METHODS),
    "layers": (layers, (*_METHODS, "SnapKV blind", "MoBA 16 prompt, 1/16")),
    "two_by_two": (two_by_two, ("dense", "1/8", "1/16")), "future": (future, ("dense", "1/4", "1/8", "1/16")),
    "reach": (reach, ("",)), "distance": (distance, ("from END",))}
_EVERY = PARTS | {"dense": (dense, ("",))}
OF_MEMORY = ("two_by_two", "reach")  # what attention has no answer to
ONLY_PARTS = flags.DEFINE_list("parts", list(PARTS), "Questions to answer.")


def compute(job: tuple[str, str, str]) -> dict[str, Any]:
  """The numbers of (part, piece, checkpoint)."""
  part, piece, checkpoint = job
  config, params = _load(checkpoint)
  return _EVERY[part][0](RATPlusLM(config), params, piece)


_load = functools.cache(niah.load)


def main() -> None:
  niah.share_device()
  common.refuse(("tasks", "only", "skip", "table", "text", "prompt_end", "spacing", "near_miss", "free_running"),
                "hypotheses asks all tasks of mini-NIAH, as the main table of eval_niah does; leave it out.")
  folder = common.workdir("hypotheses")
  path = folder / "results.json"
  results: dict[str, Any] = common.read_json(path)
  unknown = set(ONLY_PARTS.value) - set(PARTS)
  if unknown:
    raise ValueError(f"--parts={sorted(unknown)} are unknown; use some of {list(PARTS)}.")
  least = max(16 * (max(task.query_length for task in TASKS.values()) + 1), 512)
  if LENGTH.value < least:
    raise ValueError(f"--length={LENGTH.value}: at 1/16 SnapKV has no room beside a question, or MoBA no block beside"
                     f" its own; use {least} or more.")
  checkpoints = eval_niah.CHECKPOINTS.value
  names = {checkpoint: niah.name(checkpoint) for checkpoint in checkpoints}
  niah.check_names(checkpoints)
  _load.cache_clear()
  keys: dict[tuple[str, str, str], str] = {}
  for checkpoint in checkpoints:
    config, params = _load(checkpoint)
    of_run = f"{checkpoint} {niah.fingerprint(params)}, {eval_niah.options()}|{LENGTH.value}|{COUNT.value}"
    for part in ("dense", *ONLY_PARTS.value):
      if config.memory or part not in OF_MEMORY:
        draws = f"|{DRAWS.value}" if part == "random" else ""
        keys |= {(part, piece, checkpoint): f"{part}, {piece}|{of_run}{draws}" for piece in _EVERY[part][1]}
  jobs = [job for job, key in keys.items() if key not in results]
  done = niah.side_by_side(compute, jobs, eval_niah.WORKERS.value)
  with tqdm(done, total=len(jobs), unit="piece", disable=None) as bar:
    for i, found in bar:
      results[keys[jobs[i]]] = found
      common.write_json(path, results)
      if bar.disable:
        part, piece, checkpoint = jobs[i]
        print(f"{names[checkpoint]}: {part} {piece}", flush=True)
  shown: dict[str, dict[str, Any]] = {part: {} for part in ("dense", *ONLY_PARTS.value)}
  for (part, _, checkpoint), key in keys.items():
    shown[part].setdefault(names[checkpoint], {}).update(results[key])
  of_dense, low = shown.pop("dense"), ""
  if eval_niah.MATCH.value:
    shown, low = matched(shown, of_dense), niah_report.unmatched(of_dense)
  for part in ONLY_PARTS.value:
    hypotheses_plots.draw(part, shown[part], folder / f"{part}.png")
  text = report(shown) + (f"\n\nnot matched\n\n{low}" if low else "")
  print(text)
  (folder / "table.md").write_text(text + "\n", encoding="utf-8")


def matched(results: dict[str, dict[str, Any]], of_dense: niah_report.Cells) -> dict[str, dict[str, Any]]:
  """{part: {name: numbers}} without the seeds that are left out of tables for their cells `of_dense`."""
  return {part: {name: _without(numbers, niah_report.left_out(of_dense[name]), 1 if part == "random" else 0)
                 for name, numbers in by_name.items()} for part, by_name in results.items()}


def _without(numbers: Any, seeds: list[int], axis: int) -> Any:
  """Numbers without some seeds, which are this axis of every list but a "count"."""
  if isinstance(numbers, dict):
    return {name: one if name == "count" else _without(one, seeds, axis) for name, one in numbers.items()}
  return np.delete(np.array(numbers), seeds, axis).tolist()


def report(results: dict[str, dict[str, Any]]) -> str:
  """The figures' numbers, as Markdown tables of means over seeds."""
  return "\n".join(f"\n{part}, {name}\n\n{hypotheses_plots.table(part, found)}" for part, by_name in results.items()
                   for name, found in by_name.items())


if __name__ == "__main__":
  common.run(main)
