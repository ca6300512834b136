"""Why the memory helps sparse inference: selection, computation, and how far it reaches.

Claims (arXiv 2605.28640): H1, heads choose the right keys more often; H2, what they choose carries more, so that even a
random choice keeps the answer.
Command: python -m experiments.hypotheses --checkpoint=runs/niah/ratplus --checkpoint=runs/niah/attention
Result: the best head under Quest hits 4.6% of multikey_3's answers in attention, 74.9% in RAT+.
Cost of five seeds: RAT+ 753 seconds, attention 556, on one H200 with other work beside them.
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
from experiments import pictures
from experiments.needles import hypotheses_report, questions, report, seeds
from experiments.needles.rows import Row
from experiments.shared import command, output
from pallas_kernels.scan.passes import linear_scan
from rat_jax import Dense, Dilated, MoBA, PerLayer, Quest, RATPlusLM, Selection, SnapKV, batch as batches, transformer
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.mini_niah import TASKS, Rows, Task
from rat_jax.modes import Mode
from rat_jax.plan import layer_runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(questions.Settings):
  draws: int
  parts: tuple[str, ...]


def define_flags() -> None:
  command.define_common_flags("hypotheses")
  questions.define_flags()
  flags.DEFINE_integer("draws", 5, "Draws of the random selector.", lower_bound=1)
  flags.DEFINE_list("parts", list(PARTS), "Questions to answer.")


def dense(settings: Settings, model: RATPlusLM, params: Any, _: str) -> dict[str, Any]:
  """{"dense": {task: cell}}: by these seeds are left out."""
  row = Row("dense", lambda question: (Dense(), None))
  return {"dense": questions.cells(settings.asked, model, params, row, list(TASKS.values()))}


def heads(settings: Settings, model: RATPlusLM, params: Any, method: str) -> dict[str, Any]:
  """H1: the share of sequences in which a head has chosen every symbol of the answer at the step that needs it.

  {method: {task: [seeds][layers][heads]}} in percent, at 1/16 of the tokens.
  """
  size, found, row = settings.batch_size, {}, methods(settings.length, "1/16")[method]
  for name, task in TASKS.items():
    made, (mode, _) = settings.asked.sequences(name), row.build(task.query_length)
    batches = [jax.tree.map(lambda x, i=i: x[i:i + size], made) for i in range(0, settings.count, size)]
    by_seed = [np.concatenate([hits(model, one, batch, task, mode, row.at_answer) for batch in batches])
               for one in _seeds(params)]
    found[name] = [(100 * of_seed.mean(axis=0)).tolist() for of_seed in by_seed]
  return {method: found}


def methods(length: int, part: str, **options: Any) -> dict[str, Row]:
  """The methods, at a part of the tokens such as "1/16"."""
  budget = _tokens(length, part)
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
  first = made["tokens"].shape[1] - task.answer_length
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


def random_choice(settings: Settings, model: RATPlusLM, params: Any, method: str) -> dict[str, Any]:
  """H2: accuracy at a quarter of the tokens, chosen at random: {method: {task: [draws][seeds]}} in percent."""
  row, tasks = methods(settings.length, "1/4", selector="random")[method], list(TASKS.values())
  draws = [questions.cells(settings.asked, model, params, row, tasks, draw=draw) for draw in range(settings.draws)]
  return {method: {name: [cells[name]["accuracy"] for cells in draws] for name in TASKS}}


def layers(settings: Settings, model: RATPlusLM, params: Any, case: str) -> dict[str, Any]:
  """Which layer it is that sparsity harms: accuracy where one alone runs under a method, at 1/8 of the tokens.

  {case: {"layer 0": {task: [seeds]}}} in percent; a case is a method, and another part of the tokens if any.
  """
  method, _, part = case.partition(", ")
  row, count, found = methods(settings.length, part or "1/8")[method], model.config.num_layers, {}
  for layer in range(count):
    alone = dataclasses.replace(row, build=functools.partial(_in_layer, row, layer, count))
    cells = questions.cells(settings.asked, model, params, alone, list(TASKS.values()))
    found[f"layer {layer}"] = {name: cells[name]["accuracy"] for name in TASKS}
  return {case: found}


def _in_layer(row: Row, layer: int, count: int, question: int) -> tuple[Mode, Mode | None]:
  """The modes of the row in one layer, dense attention in the others."""
  def alone(mode):
    return mode if mode in (None, Dense()) else PerLayer(tuple(mode if i == layer else Dense() for i in range(count)))
  mode, prefill_mode = row.build(question)
  return alone(mode), alone(prefill_mode)


def two_by_two(settings: Settings, model: RATPlusLM, params: Any, budget: str) -> dict[str, Any]:
  """Choosing by keys with or without the memory, and attending with or without it: {setting: {task: [seeds]}}."""
  made, found = [settings.asked.sequences(name) for name in TASKS], {}
  prompts = [settings.length - task.answer_length - task.query_length for task in TASKS.values()]
  mode = Dense() if budget == "dense" else Quest(_tokens(settings.length, budget), block=16, keep_first=False)
  for select_from in ("memory",) if mode == Dense() else ("memory", "plain"):
    for attend_to in ("memory", "plain"):
      right = seeds.which_right(model, params, made, prompts, batch_size=settings.batch_size, mode=mode,
                                select_from=select_from, attend_to=attend_to)
      found[f"{mode}, select from {select_from}, attend to {attend_to}"] = {
          name: (100 * one.mean(axis=1)).tolist() for name, one in zip(TASKS, right, strict=True)}
  return found


def _tokens(length: int, budget: str) -> int:  # "1/8"
  return length // int(budget.removeprefix("1/"))


def future(settings: Settings, model: RATPlusLM, params: Any, budget: str) -> dict[str, Any]:
  """SnapKV compressed under question A: accuracy on A, on a later question B, and on B where it is compressed under B.

  {budget: {task: {"A", "B", "B under B": [seeds]}}} in percent; "dense" has no B under B. Both questions are about keys
  of the same context.
  """
  length, found = settings.length, dict[str, Any]()
  for name in ("multikey_1", *report.HARD):
    task = TASKS[name]
    keys = None if task.filler == "needles" else (4, 4)
    made = jax.jit(lambda task=task, keys=keys: mini_niah.batch(
        (Rows(task, settings.count, 2, keys),), length, settings.asked.data_seed, 1))()
    size = task.query_length + task.answer_length
    is_b = np.arange(length) >= length - size
    a, b = (made | {"answers": made["answers"] & counted} for counted in (~is_b, is_b))
    mode: Mode = Dense()
    cases: list[tuple[tuple[str, ...], list, int]] = [(("A", "B"), [a, b], 2)]
    if budget != "dense":
      mode = SnapKV(_tokens(length, budget), obs_window=task.query_length)
      cases.append((("B under B",), [b], 1))
    found[name] = {}
    for labels, parts, left in cases:
      prompt = length - left * size + task.query_length
      right = seeds.which_right(model, params, parts, [prompt] * len(parts), batch_size=settings.batch_size, mode=mode)
      found[name] |= {question: (100 * one.mean(axis=1)).tolist() for question, one in zip(labels, right, strict=True)}
  return {budget: found}


def reach(settings: Settings, model: RATPlusLM, params: Any, _: str) -> dict[str, Any]:
  """How far back the memory reaches: the mean age in tokens of what a channel holds, [seeds][layers][heads][H], sorted.

  Of a state sum_s w_s x_s the age is sum_s w_s (t - s) over sum_s w_s; the mean is over tokens.
  """
  tokens = jnp.concatenate([settings.asked.sequences(name)["tokens"][:8] for name in TASKS])
  return {"age": [np.asarray(_ages(model, one, tokens)).tolist() for one in _seeds(params)]}


@functools.partial(jax.jit, static_argnums=0)
def _ages(model: RATPlusLM, params: Any, tokens: jax.Array) -> jax.Array:
  config, batch = model.config, batches.of_call(tokens)

  def layer(x, at):
    gate = jax.nn.sigmoid(jnp.asarray(transformer.project(config, at.params, x).gate_logits, jnp.float32))
    (weight,) = linear_scan(gate, (1 - gate,))
    (weighted,) = linear_scan(gate, (weight - (1 - gate),))  # a token's share of it is older by one at the next
    x, _, _ = transformer.block(config, at, x, batch, None, lambda heads: rat_jax.attend(*heads[:3], Dense()))
    return x, jnp.mean(weighted / weight, axis=(0, 1))

  runs = layer_runs(Dense(), config.num_layers)
  _, (ages,) = transformer.walk(params, runs, transformer.embed(params, tokens), layer)
  return jnp.sort(ages, axis=-1)


def distance(settings: Settings, model: RATPlusLM, params: Any, _: str) -> dict[str, Any]:
  """Accuracy by the tokens from the needle's END to the next kept one, under dilation alone; 0 where END is kept.

  A kept token before END holds the needle in part; only at D - 1, where the value's last symbol is kept, it holds all
  that is asked. {mode: {"right": [seeds][D], "count": [D]}}, over all tasks that ask for one value, in percent.
  """
  found = {}
  for dilation in (8, 16, 32):
    tasks = [task for task in TASKS.values() if task.queries * task.values == 1]
    mode = Dilated(dilation)
    row = Row("", functools.partial(lambda mode, question: (mode, None), mode))
    right = questions.which_right(settings.asked, model, params, row, tasks)
    golden = [np.asarray(settings.asked.sequences(task.name)["golden"]) for task in tasks]
    ends = [1 + one.max(axis=1) for one in golden]  # after the value
    away = (dilation - 1 - np.concatenate(ends)) % dilation
    rights = np.concatenate([right[task.name] for task in tasks], axis=1)
    count = np.bincount(away, minlength=dilation)
    found[str(mode)] = {"count": count.tolist(), "right": [
        (100 * np.bincount(away, one, dilation) / np.maximum(count, 1)).tolist() for one in rights]}
  return found


_METHODS = ("Quest 16", "MoBA 16 decode", "MoBA 16 prompt", "SnapKV aware")  # of which accuracy is asked
# A question, and its pieces: a process takes one at a time.
Part = tuple[Callable[[Settings, RATPlusLM, Any, str], dict[str, Any]], tuple[str, ...]]
PARTS: dict[str, Part] = {
    "heads": (heads, ("Quest 16", "MoBA 16 decode", "SnapKV aware", "SnapKV blind")),
    "random": (random_choice, _METHODS),
    "layers": (layers, (*_METHODS, "SnapKV blind", "MoBA 16 prompt, 1/16")),
    "two_by_two": (two_by_two, ("dense", "1/8", "1/16")), "future": (future, ("dense", "1/4", "1/8", "1/16")),
    "reach": (reach, ("",)), "distance": (distance, ("from END",))}
_EVERY = PARTS | {"dense": (dense, ("",))}
OF_MEMORY = ("two_by_two", "reach")  # what attention has no answer to


def compute(settings: Settings, job: tuple[str, str, str]) -> dict[str, Any]:
  """The numbers of (part, piece, checkpoint)."""
  part, piece, checkpoint = job
  config, params = _load(checkpoint)
  return _EVERY[part][0](settings, RATPlusLM(config), params, piece)


_load = functools.cache(seeds.load)


def main(settings: Settings) -> None:
  seeds.share_device()
  check(settings)
  folder, parts = settings.workdir, ("dense", *settings.parts)
  path = folder / "results.json"
  results: dict[str, Any] = output.read_json(path)
  names = {checkpoint: seeds.name_of(checkpoint) for checkpoint in settings.checkpoint}
  _load.cache_clear()
  keys = {job: key for checkpoint in settings.checkpoint for job, key in keys_of(settings, checkpoint).items()}
  jobs = [job for job, key in keys.items() if key not in results]
  output.made(folder)
  done = seeds.side_by_side(functools.partial(compute, settings), jobs, settings.workers)
  with tqdm(done, total=len(jobs), unit="piece", disable=None) as bar:
    for i, found in bar:
      results[keys[jobs[i]]] = found
      output.write_json(path, results)
      if bar.disable:
        part, piece, checkpoint = jobs[i]
        print(f"{names[checkpoint]}: {part} {piece}", flush=True)
  shown: dict[str, dict[str, Any]] = {part: {} for part in parts}
  for (part, _, checkpoint), key in keys.items():
    shown[part].setdefault(names[checkpoint], {}).update(results[key])
  of_dense, low = shown.pop("dense"), ""
  if settings.match:
    shown, low = matched(shown, of_dense), report.unmatched(of_dense)
  for part in settings.parts:
    pictures.save(pictures.hypotheses.figure(part, shown[part]), folder / f"{part}.png")
  text = tables(shown) + (f"\n\nnot matched\n\n{low}" if low else "")
  print(text)
  (folder / "table.md").write_text(text + "\n", encoding="utf-8")


def check(settings: Settings) -> None:
  """Raises ValueError for unknown parts, sequences that are too short, unused flags, checkpoints of one name."""
  unknown = set(settings.parts) - set(PARTS)
  if unknown or not settings.parts:
    raise ValueError(f"--parts={sorted(unknown)} are unknown; use some of {list(PARTS)}.")
  if "random" not in settings.parts:
    settings.refuse(("draws",), "they are of the part random, which is not asked for; leave it out.")
  least = max(16 * (max(task.query_length for task in TASKS.values()) + 1), 512)
  if settings.length < least:
    raise ValueError(f"--length={settings.length}: at 1/16 SnapKV has no room beside a question, or MoBA no block"
                     f" beside its own; use {least} or more.")
  seeds.check_names(settings.checkpoint)


def keys_of(settings: Settings, checkpoint: str) -> dict[tuple[str, str, str], str]:
  """{(part, piece, checkpoint): what its numbers are known by} of all that is asked of a checkpoint."""
  config, params = _load(checkpoint)
  of_run = f"{checkpoint} {seeds.fingerprint(params)}, {settings.asked.options()}|{settings.length}|{settings.count}"
  found: dict[tuple[str, str, str], str] = {}
  for part in ("dense", *settings.parts):
    if config.memory or part not in OF_MEMORY:
      draws = f"|{settings.draws}" if part == "random" else ""
      found |= {(part, piece, checkpoint): f"{part}, {piece}|{of_run}{draws}" for piece in _EVERY[part][1]}
  return found


def matched(results: dict[str, dict[str, Any]], of_dense: report.Cells) -> dict[str, dict[str, Any]]:
  """{part: {name: numbers}} without the seeds that are left out of tables for their cells `of_dense`."""
  return {part: {name: _without(numbers, report.left_out(of_dense[name]), 1 if part == "random" else 0)
                 for name, numbers in by_name.items()} for part, by_name in results.items()}


def _without(numbers: Any, left_out: list[int], axis: int) -> Any:
  """Numbers without some seeds, which are this axis of every list but a "count"."""
  if isinstance(numbers, dict):
    return {name: one if name == "count" else _without(one, left_out, axis) for name, one in numbers.items()}
  return np.delete(np.array(numbers), left_out, axis).tolist()


def tables(results: dict[str, dict[str, Any]]) -> str:
  """The figures' numbers, as Markdown tables of means over seeds."""
  return "\n".join(f"\n{part}, {name}\n\n{hypotheses_report.table(part, found)}" for part, by_name in results.items()
                   for name, found in by_name.items())


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
