"""Rewrites the tables of README.md, docs and experiments, and all figures, from their results.

Claim: a table on a page is what experiments/results says; nothing is measured here.
Commands: python -m experiments.tables            writes whatever stands between <!-- table: NAME --> and <!-- end -->
          python -m experiments.tables --check    says which tables differ, and fails where one does
Result: the pages and experiments/results/*.png.
Cost: seconds.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

from absl import flags
from matplotlib.figure import Figure

from experiments import pictures
from experiments.aot import cases, chips, kernel_cases, kernel_programs, paper
from experiments.bench import page_tables as speed
from experiments.needles import hypotheses_tables, page_tables as needles, released_tables, report
from experiments.shared import command, output, page_tables
from experiments.shared.page_tables import Read, Table
from experiments.shared.table_of_runs import RUNS
from rat_jax import Dense, Dilated, StreamingLLM

Draw = Callable[[Read], Figure | None]
ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(command.Settings):
  check: bool


def define_flags() -> None:
  command.define_common_flags("tables")
  flags.DEFINE_bool("check", False, "Write nothing; fail where a table differs.")


def main(settings: Settings) -> None:
  stale = []
  for path in pages():
    name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    new, others = page_tables.rewritten(text, name, made)
    stale += [f"{table} in {name}" for table in others]
    if others and not settings.check:
      path.write_text(new, encoding="utf-8")
  if stale and settings.check:
    raise ValueError(f"other than experiments/results says: {', '.join(stale)}; run python -m experiments.tables.")
  if not settings.check:
    for name, draw in FIGURES.items():
      pictures.save(draw(read_result), RESULTS / f"{name}.png")
  print("\n".join(f"rewritten: {one}" for one in stale) or "every table is as experiments/results says")


def pages() -> list[pathlib.Path]:
  """The pages whose tables are made."""
  return [ROOT / "README.md", ROOT / "docs/scaling.md", ROOT / "docs/kernels.md", ROOT / "experiments/README.md",
          *sorted((ROOT / "experiments/pages").glob("*.md"))]


def made(name: str) -> str:
  """The table of this name. Raises ValueError where there is none."""
  if name not in TABLES:
    raise ValueError(f"no table is called {name!r}; there are {', '.join(TABLES)}.")
  return TABLES[name](read_result)


read_result = page_tables.reader(RESULTS)


@dataclasses.dataclass(frozen=True)
class Entry:
  """A line of the index: a run, its main number, what it took where the table of runs does not say, its page.

  A page is a path without its suffix, from the folder of the index.
  """

  run: str
  number: Table
  cost: str
  page: str


def _pair(result: str, label: str, task: str = "") -> Table:
  """A cell of the needle tables, attention / RAT+, or its mean over tasks."""
  shown = needles.of(task) if task else needles.mean

  def number(read: Read) -> str:
    cells = needles.matched(needles.cells_of(read, result))
    return f"{', '.join(filter(None, (label, task)))}: {needles.both(cells, label, shown)}"
  return number


def _controls(read: Read) -> str:
  cells = needles.matched(needles.cells_of(read, "niah_controls"))
  branch, dense = (needles.mean(cells[arm]["Quest 16, 1/16"]) for arm in ("sparse_branch", "ratplus_dense"))
  return f"Quest 16, 1/16: sparse updates alone {branch}, memory alone {dense}"


def _adapted(read: Read) -> str:
  before, after = needles.cells_of(read, "niah_main")["ratplus"], needles.cells_of(read, "niah_adapted")
  mode = "dilated:8 everywhere"
  return (f"RAT+ at D=8: {needles.seeds(before[mode])[:3].mean():.1f} before,"
          f" {needles.mean(after['ratplus-dilated_8'][mode])} after")


def _long(read: Read) -> str:
  label = "MoBA 64 prompt, 1/16, first"
  return f"{label}: {needles.both(needles.long_cells(read), label)}"


def _spaced(read: Read) -> str:
  """RAT+ at D=16 on multikey_2."""
  mode, of = "dilated:16 everywhere", needles.of("multikey_2")
  apart = needles.cells_of(read, "niah_spaced")["spacing 32"]["ratplus"]
  return (f"RAT+ at D=16 on multikey_2: {of(needles.cells_of(read, 'niah_main')['ratplus'][mode])} as they come,"
          f" {of(apart[mode])} apart")


def _heads(read: Read) -> str:
  by_arm = hypotheses_tables.found(read, "heads")
  best = hypotheses_tables.pair(hypotheses_tables.best(by_arm[arm]["Quest 16"]["multikey_3"]) for arm in needles.PAIR)
  return f"best head under Quest 16, multikey_3: {best}"


def _retrofit(read: Read) -> str:
  cells, label = needles.retrofit_cells(read), "MoBA 16 decode, 1/16"
  without, with_memory = (needles.mean(cells[arm][label]) for arm in ("text-attention", "text-memory-dense"))
  return f"{label}: {without} without, {with_memory} with it, trained densely"


def _ops(result: str, case: str) -> Table:
  def number(read: Read) -> str:
    cases, dense = speed.by_case(read(result)["lines"])
    ours = speed.least(cases[case], (*speed.FOLDED, *speed.KERNELS))
    of = cases[case][0]["case"]
    beside = dense[of["op"], of["length"], of["batch"]]
    return f"{case}: {speed.milliseconds(ours)} ms, dense {speed.milliseconds(beside)}"
  return number


def _beside_the_authors(read: Read) -> str:
  case = "prefill T=262144, D=16"
  timed = speed.by_case(read("gpu_ops")["lines"])[0][case]
  ours, theirs = speed.least(timed, (*speed.FOLDED, *speed.KERNELS)), speed.least(timed, speed.AUTHORS)
  return f"{case}: {speed.milliseconds(ours)} ms, theirs {speed.milliseconds(theirs)}"


def _model(result: str, batch: int, context: int, mode: str) -> Table:
  """Tokens per second of a line."""
  def number(read: Read) -> str:
    line = speed.of_mode(read(result)["lines"])[batch, context][mode]
    tokens = batch * (1 if line["part"] == "decode" else context)
    return f"{batch} rows of {context}, {mode}: {tokens / line['seconds']:,.0f} tokens/s"
  return number


def _modes(read: Read) -> str:
  seconds = {line["mode"]: line["seconds"] for line in read("gpu_modes")["lines"]}
  return f"quest:0.0625: {speed.ratio(seconds['dense'], seconds['quest:0.0625'])} times faster than dense"


def _authors(read: Read) -> str:
  line = speed.of_mode(read("gpu_authors_decode")["lines"])[32, 16384]["dilated:64"]
  return f"32 rows, D=64: {1e3 * line['seconds']:.2f} ms, theirs {1e3 * line['authors']:.2f}"


def _fits(read: Read) -> str:
  cell = next(cell for cell in read("scaling")["cells"]
              if (cell["preset"], cell["topology"], cell["length"]) == ("ratplus-7b", "v5e:16x16", 4096))
  return f"7B, 768 rows of 4096 on 256 v5e: {cases.of_memory(cell)} GiB a device"


def _of_roofline(read: Read) -> str:
  label = "dilated, 7B, T=262144, D=16"
  cell = next(cell for cell in read("tpu_roofline")["cells"] if cell["label"] == label)
  seconds, floor, _ = kernel_cases.seconds_of(cell, chips.CHIPS["v5p"])
  return f"{label}: {1e3 * seconds:.1f} ms predicted on a v5p, {seconds / floor:.2f} times the floor"


INDEX = (
    Entry("needles", _pair("niah_main", "Quest 16, 1/16"), "2106 s", "pages/needles"),
    Entry("needles-three", _pair("niah_three_seeds", "Quest 16, 1/16"), "", "pages/needles"),
    Entry("topk", _pair("niah_topk", "TopK, 1/32"), "200 s", "pages/needles"),
    Entry("answer", _pair("niah_answer", "Quest 16, 1/16"), "557 s", "pages/needles"),
    Entry("spaced", _spaced, "308 s", "pages/needles"),
    Entry("adapted", _adapted, "798 s", "pages/needles"),
    Entry("near", _pair("niah_near", "Quest 16, 1/16", "multikey_3"), "265 s", "pages/needles"),
    Entry("controls", _controls, "1129 s, two of three arms", "pages/needles"),
    Entry("long", _long, "1290 s", "pages/needles"),
    Entry("hypotheses", _heads, "1309 s", "pages/hypotheses"),
    Entry("retrofit", _retrofit, "1234 s", "pages/retrofit"),
    Entry("ops", _ops("gpu_ops", "prefill T=262144, D=16"), "", "pages/kernels"),
    Entry("gradients", _ops("gpu_gradients", "prefill T=32768, D=64"), "", "pages/kernels"),
    Entry("authors-ops", _beside_the_authors, "", "pages/kernels"),
    Entry("lengths", _ops("gpu_lengths", "prefill T=524288, D=64"), "", "pages/kernels"),
    Entry("short", _ops("gpu_short", "prefill T=512, B=32, D=16"), "", "pages/kernels"),
    Entry("decode", _model("gpu_decode", 1024, 16384, "dilated:64"), "", "pages/kernels"),
    Entry("prompt", _model("gpu_prompt", 4, 65536, "dilated:64"), "", "pages/kernels"),
    Entry("modes", _modes, "", "pages/kernels"),
    Entry("authors", _authors, "", "pages/kernels"),
    Entry("train", _model("gpu_train", 8, 4096, "dilated:64"), "", "pages/language"),
    Entry("scaling", _fits, "5 minutes on 16 processor cores, a process for each row", "../docs/scaling"),
    Entry("roofline", _of_roofline, "a minute; compiled, 4 minutes on 16 processor cores", "../docs/kernels"),
)


def index(read: Read) -> str:
  rows = []
  for entry in INDEX:
    run = RUNS[entry.run]
    cost = f"{run.seconds} s" if run.seconds else entry.cost or "not timed"
    link = f"[{pathlib.PurePath(entry.page).name}]({entry.page}.md)"
    rows.append([run.claim, entry.number(read), cost, f"`{run.name}`", link])
  return output.markdown_table(["claim", "main number", "cost", "--run", "page"], rows)


def _budgets(read: Read) -> Figure | None:
  cells = needles.matched(needles.cells_of(read, "niah_main"))
  return pictures.against_budget(report.by_budget({name: cells[arm] for name, arm in needles.ARMS.items()}))


def _hypothesis(part: str) -> Draw:
  def draw(read: Read) -> Figure | None:
    by_arm = hypotheses_tables.found(read, part)
    return pictures.hypotheses.figure(part, {name: by_arm[arm] for name, arm in needles.ARMS.items() if arm in by_arm})
  return draw


def _throughput(result: str) -> Draw:
  return lambda read: pictures.throughput(read(result)["lines"])


_RULES = (Dense(), Dilated(16), Dilated(16, window=32, sinks=4), StreamingLLM(32, 4))

FIGURES: dict[str, Draw] = {
    "masks": lambda read: pictures.masks(_RULES), "caches": lambda read: pictures.caches(_RULES, length=96),
    "meshes": lambda read: pictures.meshes(), "readme": lambda read: pictures.against_budget(needles.budgets(read)),
    "budgets": _budgets,
    "gpu_prefill": lambda read: pictures.against_length(read("gpu_lengths")["lines"], "prefill"),
    "gpu_decode": _throughput("gpu_decode"), "gpu_decode_context": _throughput("gpu_decode_context"),
    "gpu_pretrain": lambda read: pictures.losses(read("gpu_pretrain")["lines"], read("gpu_pretrain")["modes"]),
    **{part: _hypothesis(part) for part in ("heads", "random", "layers", "two_by_two", "future", "reach", "distance")}}

TABLES: dict[str, Table] = {"index": index, **needles.TABLES, **released_tables.TABLES, **hypotheses_tables.TABLES,
                            **speed.TABLES,
                            "cost_model": lambda read: paper.table(),
                            "scaling": lambda read: cases.table(read("scaling")["cells"]),
                            "tpu_kernels": lambda read: kernel_cases.table(read("tpu_roofline")["cells"]),
                            "tpu_memory": lambda read: kernel_programs.memory_table(read("tpu_memory")["kernels"]),
                            "tpu_programs": lambda read: kernel_programs.programs_table(read("tpu_memory")["programs"])}

if __name__ == "__main__":
  command.run(main, Settings, define_flags)
