"""Accuracy on mini-NIAH under many modes and budgets: the table that the claim stands on.

Claim: the same sparse methods at the same budgets lose far less on a backbone with the memory than on one without.
Command: python -m experiments.eval_niah --checkpoint=runs/niah/ratplus --checkpoint=runs/niah/attention
Result: 98% or more under Dense for both; under Quest at 1/16 attention 65.0%, RAT+ 84.3%.
Cost: three seeds of both take 594 seconds on one H200 with 16 processor cores.
A checkpoint is a folder of seed-* (experiments.sft_niah). All see the same sequences; finished cells are kept.
The paper's own budgets:  --table=paper --length=4096
A released model, needles in words planted in held-out text:  --haystack=runs/corpus --tokenizer=... --table=retrofit
Words:  --text --table=paper --length=4096 --checkpoint=runs/niah/words, a folder of one model (needles/words.py).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from experiments import pictures
from experiments.needles import planted, planted_answers, questions, report, rows, seeds, words
from experiments.needles.questions import Questions
from experiments.needles.rows import Row
from experiments.shared import command, device, inputs, output
from rat_jax import RATPlusLM
from rat_jax.evaluate.mini_niah import TASKS
from rat_jax.parallel import check_agreement, processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(questions.Settings, words.Settings):
  only: tuple[str, ...]
  skip: tuple[str, ...]
  tasks: tuple[str, ...]
  table: str
  prompt_end: str
  haystack: pathlib.Path | None
  free_running: int
  spacing: int
  near_miss: float

  @property
  def in_words(self) -> bool:
    """Whether the questions are in words, rather than mini-NIAH's."""
    return self.text or self.haystack is not None

  @property
  def asked(self) -> Questions:
    return dataclasses.replace(super().asked, spacing=self.spacing, near_miss=self.near_miss,
                               prompt_end=self.prompt_end, free_running=self.free_running)


def define_flags() -> None:
  command.define_common_flags("eval_niah")
  questions.define_flags()
  words.define_flags()
  flags.DEFINE_multi_string("only", [], "Rows of the table to compute, by their start, such as \"Quest 16, 1/8\";"
                            " repeat it for several.")
  flags.DEFINE_multi_string("skip", [], "Rows to leave out, by any part of their name, such as \"first\"; repeat it for"
                            " several.")
  flags.DEFINE_list("tasks", list(TASKS), "Tasks.")
  flags.DEFINE_enum("table", "main", list(_TABLES), "Rows: blocks of 8 to 32 tokens; the paper's of 64; those of a"
                    " released model with a memory.")
  command.define_path("haystack", "Prepared folder: needles are planted in its held-out tokens, for a language model.")
  flags.DEFINE_enum("prompt_end", "main", ["main", "answer"], "main: the prompt ends at the question (MoBA in the"
                    " paper's form and aware SnapKV: at the answer); answer: there for all.")
  flags.DEFINE_integer("free_running", 32, "Sequences that are also decoded greedily, in one or two tasks of some"
                       " rows.", lower_bound=0)
  flags.DEFINE_integer("spacing", 0, "Tokens that a needle and the filler after it take at least: 2 D leaves half a"
                       " needle per window of D at most.", lower_bound=0)
  flags.DEFINE_float("near_miss", 0.0, "Share of needles whose key differs from the asked one in its last symbol alone;"
                     " of the 96 such keys a row takes about 48 at most.", 0.0, 1.0)


_TABLES = {"main": rows.main_rows, "paper": rows.paper_rows, "retrofit": rows.retrofit_rows}
Cells = dict[str, dict[str, Any]]  # of a row, by task
Compute = Callable[[Row, Sequence[str]], Cells]
Job = tuple[str, str, list[str]]  # checkpoint, row's label, tasks


def main(settings: Settings) -> None:
  if settings.mesh or settings.distributed:
    settings.refuse(("workers",), "with --mesh a row runs on all devices, and one after another; leave it out.")
    settings = dataclasses.replace(settings, workers=1)
    settings.made_mesh()  # the processes find each other before any device is asked for
  seeds.share_device()
  opened.cache_clear()
  check(settings)
  names, shown, folder = settings.tasks, rows_to_compute(settings), settings.workdir
  if not settings.in_words:
    check_flags(settings, shown)
    settings.asked.check_room(names)
  results = kept_cells(folder)
  origins = {name: words.origin(settings, name) if settings.text else "" for name in names}
  keys = {(checkpoint, row.label, name): key(settings, checkpoint, row, name, origins[name])
          for checkpoint in settings.checkpoint for row in shown for name in names}
  every = [(checkpoint, row.label, [name for name in names if keys[checkpoint, row.label, name] not in results])
           for checkpoint in settings.checkpoint for row in shown]
  jobs = [job for job in every if job[2]]
  check_agreement({"cells to compute": jobs})  # processes may have found other finished ones
  output.made(folder)
  with tqdm(total=len(jobs), unit="row", disable=None) as bar:
    for (checkpoint, label, _), found in computed(settings, jobs):
      results |= {keys[checkpoint, label, name]: one for name, one in found.items()}
      if processes.is_first():
        output.write_json(folder / "results.json", results)
      bar.update()
      if bar.disable:
        output.say(f"{checkpoint}: {label}")
  if not processes.is_first():
    return
  table = {checkpoint: {row.label: {name: results[keys[checkpoint, row.label, name]] for name in names}
                        for row in shown} for checkpoint in settings.checkpoint}
  text = report.report(table, settings.match)
  print(f"{measure_of(settings)}, in percent, on {device.name()}\n\n{text}")
  (folder / "table.md").write_text(text + "\n", encoding="utf-8")
  output.write_json(folder / "accuracies.json", report.compact(table), indent=None)
  by_budget = report.by_budget(report.matched(table) if settings.match else table)
  pictures.save(pictures.against_budget(by_budget), folder / "budgets.png")


def measure_of(settings: Settings) -> str:
  """What the numbers of the table are."""
  scores = sorted({words.score_of(name).__name__ for name in settings.tasks})
  return f"{' and '.join(scores)}, {words.source(settings)}" if settings.text else "exact match"


def check(settings: Settings) -> None:
  """Raises ValueError for unknown tasks, flags that would change nothing, and checkpoints of one name."""
  if settings.haystack:
    planted.check_tasks(settings.tasks, "tasks")
    settings.refuse(("text", "spacing", "near_miss", "free_running", "answer_room", "ruler", "essay", "prompt_end"),
                    "--haystack plants needles of its own, and its prompts end at the answer; leave it out.")
  elif settings.text:
    words.check(settings, settings.tasks)
    settings.refuse(("spacing", "near_miss", "free_running"),
                    "they are of mini-NIAH, and --text asks in words; leave it out.")
  else:
    seeds.check_tasks(settings.tasks)
    settings.refuse(("answer_room", "ruler", "essay", "tokenizer"),
                    "without --text there are no words; give that too, or leave it out.")
  settings.refuse(("epochs",), "it is of the training (experiments.sft_niah), and nothing is trained; leave it out.")
  seeds.check_names(settings.checkpoint)


def check_flags(settings: Settings, shown: Sequence[Row]) -> None:
  """Raises ValueError for flags of mini-NIAH that would change none of these rows."""
  if settings.free_running and not any(decoded(settings, row.label, name) for row in shown for name in settings.tasks):
    settings.refuse(("free_running",), "no row that is asked for is also decoded; ask for one of"
                    f" {list(rows.CHECKED)}, or leave it out.")
  if not any(TASKS[name].key_length > 1 for name in settings.tasks):
    settings.refuse(("near_miss",), "keys of one symbol differ in it alone anyway; give a task of longer ones, such as"
                    " multikey_2, or leave it out.")


def rows_to_compute(settings: Settings) -> list[Row]:
  """The rows that are asked for."""
  if settings.text and (settings.table == "main" or settings.prompt_end == "answer"):
    raise ValueError(f"--text with --table={settings.table} --prompt_end={settings.prompt_end}; text has the paper's"
                     " rows alone (--table=paper), and their prompts end at the answer anyway.")
  if settings.haystack and settings.table == "main":
    raise ValueError("--haystack with --table=main, in which prompts end at the question; give --table=retrofit or"
                     " paper.")
  every = _TABLES[settings.table](settings.length)
  if settings.prompt_end == "answer":
    every = [row for row in every if not row.at_question]
  found = [row for row in every if (not settings.only or row.label.startswith(settings.only))
           and not any(part in row.label for part in settings.skip)]
  if not found:
    raise ValueError(f"--only={list(settings.only)} is the start of no row that --skip={list(settings.skip)} leaves;"
                     f" the rows are {[row.label for row in every]}.")
  return found


def kept_cells(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """The cells of results.json, by their `key`. Raises ValueError where it holds something else."""
  path = folder / "results.json"
  results = output.read_json(path)
  for one, cell in results.items():
    if not isinstance(cell, dict) or not {"accuracy", "blank"} & cell.keys():
      raise ValueError(f"{path} has no accuracy of {one!r}; move it away to start anew.")
  return results


def key(settings: Settings, checkpoint: str, row: Row, name: str, origin: str) -> str:
  """What a cell is known by: all that decides about it. `origin` is that of examples in words."""
  options = origin + questions.of_seed(settings.seed) if settings.in_words else settings.asked.options(row)
  count = decoded(settings, row.label, name)
  greedy = f"|{count} decoded" if count else ""
  about = f"{opened(settings, checkpoint)[0]}, {options}"
  return f"{about}|{settings.length}|{settings.count}|{row.label}|{name}{greedy}"


def decoded(settings: Settings, label: str, name: str) -> int:
  """How many sequences of a cell are also decoded greedily."""
  if settings.in_words or label not in rows.CHECKED:
    return 0
  one = settings.tasks[rows.CHECKED.index(label) % len(settings.tasks)]
  return settings.free_running if name in (one, "multikey_3") else 0  # multikey_3 is missed most


@functools.cache
def opened(settings: Settings, checkpoint: str) -> tuple[str, Compute]:
  """(what tells the model apart, what makes its cells)."""
  of_kind = planted_cells if settings.haystack else text_cells if settings.text else mini_cells
  return of_kind(settings, checkpoint)


def mini_cells(settings: Settings, checkpoint: str) -> tuple[str, Compute]:
  """`opened` for mini-NIAH."""
  config, params = seeds.load(checkpoint, settings.made_mesh())

  def compute(row, names):
    free = [TASKS[name] for name in names if decoded(settings, row.label, name)]
    return questions.cells(settings.asked, RATPlusLM(config), params, row, [TASKS[name] for name in names], free)

  return f"{checkpoint} {seeds.fingerprint(params)}", compute


def text_cells(settings: Settings, checkpoint: str) -> tuple[str, Compute]:
  """`opened` for tasks in words."""
  model, params, notes = words.load_model(checkpoint, settings.tokenizer, settings.made_mesh())
  examples = words.load(settings, settings.tasks, settings.count, settings.length, settings.asked.data_seed)
  words.check_unseen(settings.ruler, settings.tasks, checkpoint, notes)
  return f"{checkpoint} {seeds.fingerprint(params)}", lambda row, names: words.cells(
      settings, model, params, row, {name: examples[name] for name in names}, settings.length, settings.batch_size)


def planted_cells(settings: Settings, checkpoint: str) -> tuple[str, Compute]:
  """`opened` for needles planted in text."""
  model, params, _ = words.load_model(checkpoint, settings.tokenizer, settings.made_mesh())
  text = inputs.corpus(settings.haystack, settings.workdir / "data")["heldout"]
  asked = planted_answers.Asked(planted.words_of(settings.tokenizer), text, settings.length, settings.count,
                                settings.batch_size, settings.asked.data_seed)
  about = f"{checkpoint} {seeds.fingerprint(params)}, planted in {(text.sidecar.sha256 or '')[:16]}"
  return about, lambda row, names: planted_answers.cells(
      asked, model, params, row, [planted.TASKS[name] for name in names])


def computed(settings: Settings, jobs: Sequence[Job]) -> Iterator[tuple[Job, Cells]]:
  """The cells of every job as it is done; last, by themselves, of those that find no room beside others."""
  alone = []
  for i, found in seeds.side_by_side(functools.partial(compute_if_room, settings), jobs, settings.workers):
    if found is None:
      alone.append(jobs[i])
    else:
      yield jobs[i], found
  for job in alone:
    yield job, compute(settings, job)


def compute(settings: Settings, job: Job) -> Cells:
  """The cells of a job."""
  checkpoint, label, names = job
  row = next(row for row in rows_to_compute(settings) if row.label == label)
  return opened(settings, checkpoint)[1](row, names)


def compute_if_room(settings: Settings, job: Job) -> Cells | None:
  """`compute`, or None where the device has too little memory for it beside the other processes."""
  try:
    return compute(settings, job)
  except jax.errors.JaxRuntimeError as error:
    if not device.out_of_memory(error):
      raise
    return None


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
