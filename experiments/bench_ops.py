"""Times every operation against dense attention by the best library kernel, in one run on one device.

Claim: memory, dilated prefill and decoding over a compact cache are as fast as their bytes and operations say.
Command: python -m experiments.bench_ops                      (--op=prefill --length=262144 --dilation=16 for one case)
Result: a prompt of 262144 tokens at D=16 takes 65.6 ms on an H200, dense attention 1068.
Cost: not timed; some minutes of one GPU.
Where the time goes, kernel by kernel: --profile
Time against T: --op=prefill --length=4096 --length=16384 ...   The authors' code beside ours: --torch_reference=DIR
Training: --gradient times scan and prefill with their gradients.
Inputs are drawn anew, by --seed and the clock, and every result is checked against the reference on some queries and
heads before it is timed.
Floors are the operation's bytes and FLOPs over what this device was measured to do: copies, in decoding reads, and
matrix products.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from experiments import pictures
from experiments.bench import cases, times, torch_reference
from experiments.bench.cases import Case, check, draw, floor, work
from experiments.shared import command, device, output
from pallas_kernels.devices import kind_of
from pallas_kernels.table import IMPLEMENTATIONS

# Work of so few seconds is timed as one of so many in a program, which takes time to start; of fewer where memory ends.
SHORT, TOGETHER = 1e-3, 8

# The operations of pallas_kernels that each --op consists of.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "scan": ("gated_scan",), "prefill": ("gated_scan", "dilated_attention"), "decode": ("decode_attention",),
    "sparse": ("sparse_attention",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(cases.Settings):
  op: tuple[str, ...]
  implementation: tuple[str, ...]
  length: tuple[int, ...]
  dilation: tuple[int, ...]
  block: tuple[int, ...]
  batch_size: int
  window: int
  sinks: int
  rounds: int
  torch_reference: str | None
  gradient: bool
  crossovers: bool


def define_flags() -> None:
  command.define_common_flags("bench_ops")
  cases.define_flags()
  flags.DEFINE_multi_enum("op", ["scan", "prefill", "decode"], ["scan", "prefill", "decode", "sparse"], "What to time;"
                          " sparse is attention to blocks chosen per query, where they are given.")
  flags.DEFINE_multi_string("implementation", [], "Implementations to compare, of the operations that"
                            " have them; of prefill its scan's and its attention's, such as \"mosaic_gpu, cudnn\"."
                            " Default: all.")
  flags.DEFINE_multi_integer("length", [], "Tokens, instead of those of the standard cases.", lower_bound=1)
  flags.DEFINE_multi_integer("dilation", [], "D, instead of those of the standard cases.", lower_bound=1)
  flags.DEFINE_multi_integer("block", [], "Tokens of a block, of decoding by Quest or sparse attention, beside"
                             " --length.", lower_bound=1)
  flags.DEFINE_integer("batch_size", 1, "Rows, beside --length or --dilation; of the scan always.", lower_bound=1)
  flags.DEFINE_integer("window", 0, "W, beside --length or --dilation.", lower_bound=0)
  flags.DEFINE_integer("sinks", 4, "S0, beside --length or --dilation.", lower_bound=0)
  flags.DEFINE_integer("rounds", 7, "Timed rounds, of what takes a second three at most; the median counts.",
                       lower_bound=1)
  flags.DEFINE_string("torch_reference", None, "A checkout of the RAT+ authors' code, timed too.")
  flags.DEFINE_alias("torch-reference", "torch_reference")
  flags.DEFINE_bool("gradient", False, "Scan and prefill with the gradient by all their inputs.")
  flags.DEFINE_bool("crossovers", False, "Instead: from which sizes on the kernels are faster, of sizes of its own.")


def timed_ops(settings: Settings) -> list[str]:
  """Those of --op that are timed. Raises ValueError for those that were given and have no gradient to time."""
  without = [op for op in settings.op if settings.gradient and op in ("decode", "sparse")]
  if without and ("op" in settings.given or len(without) == len(settings.op)):
    raise ValueError(f"--gradient with --op={without[0]}; only scan and prefill have gradients that are timed.")
  return [op for op in settings.op if op not in without]


def cases_of(settings: Settings) -> list[Case]:
  """Those of the flags, or the standard ones, dense attention beside them."""
  lengths, batch, gradient, ops = settings.length, settings.batch_size, settings.gradient, timed_ops(settings)
  blocks = settings.block or ((64,) if "sparse" in ops and lengths else ())
  for block in blocks:
    if not lengths or any(length % block for length in lengths):
      raise ValueError(f"--block={block} beside --length={list(lengths)}; give lengths that are multiples of it.")
    if "sparse" in ops and min(lengths) < 16 * block:
      raise ValueError(f"--op=sparse with --block={block} beside --length={list(lengths)}; a query chooses a sixteenth"
                       f" of the blocks, so give lengths of {16 * block} or more, or smaller blocks.")
  found = []
  for op in ops:
    if op == "scan" and (lengths or batch > 1):
      of_scan = lengths or [case.length for case in cases.standard(op, gradient)]
      found += [Case(op, length, batch) for length in of_scan]
    elif op == "sparse" and lengths:
      found += [Case(op, length, batch, block=block) for length in lengths for block in (0, *blocks)]
    elif op in ("prefill", "decode") and (lengths or settings.dilation):
      found += [Case(op, length, batch, *((1, 0, 0) if d == 1 else (d, settings.window, settings.sinks)))
                for length in lengths or [32768] for d in (1, *(settings.dilation or [16, 64]))]
      if op == "decode":
        found += [Case(op, length, batch, block=block) for length in lengths for block in settings.block]
    else:
      found += cases.standard(op, gradient)
  return [dataclasses.replace(case, gradient=gradient) for case in found]


def check_flags(settings: Settings) -> None:
  """Raises ValueError for flags that would change nothing, and for heads and implementations that nothing serves."""
  if settings.crossovers:
    settings.refuse(("op", "implementation", "length", "dilation", "block", "batch_size", "window", "sinks",
                     "torch_reference"), "--crossovers has operations and sizes of its own; leave it out.")
  ops, (n, kv, _) = timed_ops(settings), settings.size
  if settings.torch_reference and n != kv:
    raise ValueError(f"--torch_reference with --kv_heads={kv}: the authors' code has no grouped heads; leave one of"
                     " them out.")
  if set(ops) == {"scan"} and settings.kv_heads is not None:
    settings.refuse(("heads",), "--op=scan has the heads of --kv_heads alone; leave one of them out.")
  elif n % kv:
    raise ValueError(f"--kv_heads={kv} does not divide --heads={n}; every key/value head serves as many query heads.")
  check_sizes(settings, ops)
  check_implementations(settings, ops)
  every = cases_of(settings)
  if all(case.is_dense for case in every):
    settings.refuse(("implementation",), "all cases are dense attention, which libraries compute; leave it out.")
  if not any(is_theirs(case) for case in every):
    settings.refuse(("torch_reference",), f"the authors' code has no --op={', '.join(ops)}; leave it out.")


def check_sizes(settings: Settings, ops: list[str]) -> None:
  """Raises ValueError for sizes that no case of the operations takes, and for rows that some do not."""
  dilated = [op for op in ops if op in ("prefill", "decode")]
  standard = [op for op in ops if op != "scan" and not settings.length and (op == "sparse" or not settings.dilation)]
  if not dilated:
    settings.refuse(("dilation", "window", "sinks"), f"--op={', '.join(ops)} is not dilated; leave it out.")
  elif not settings.length and not settings.dilation:
    settings.refuse(("window", "sinks"), "the standard cases have their own; give --length or --dilation too, or leave"
                    " it out.")
  elif set(settings.dilation) == {1}:
    settings.refuse(("window", "sinks"), "--dilation=1 is dense attention, which has none; leave it out.")
  if standard:
    settings.refuse(("batch_size",), f"the standard cases of {standard[0]} have rows of their own; give --length too,"
                    " or leave it out.")
  if not {"decode", "sparse"} & set(ops):
    settings.refuse(("block",), f"--op={', '.join(ops)} reads no blocks; leave it out.")


def implementations(op: str, names: Sequence[str]) -> list[str]:
  """Those of the names that an operation has: of a prefill "its scan's, its attention's", where one name is both."""
  found, operations = [], OPERATIONS[op]
  for name in names:
    each = name.split(", ") if ", " in name else [name] * len(operations)
    if len(each) == len(operations) and all(
        one in IMPLEMENTATIONS[operation] for one, operation in zip(each, operations, strict=True)):
      found.append(", ".join(each))
  return found


def check_implementations(settings: Settings, ops: list[str]) -> None:
  """Raises ValueError for a name that none of the operations has, and for an operation that has none of the names."""
  names = settings.implementation
  there = "; ".join(f"{op} has {', '.join('/'.join(IMPLEMENTATIONS[one]) for one in OPERATIONS[op])}" for op in ops)
  for name in names:
    if not any(implementations(op, [name]) for op in ops):
      raise ValueError(f"--implementation={name}: no operation that is timed has it; {there}.")
  for op in ops if names else ():
    if not implementations(op, names):
      raise ValueError(f"--implementation={list(names)}: {op} has none of them; give --op without {op}, or name one of"
                       f" its own: {there}.")


def served(settings: Settings, case: Case) -> list[str]:
  """The implementations to time here: of a prefill, those of its scan and its attention.

  Of dense attention libraries', and in decoding our kernel, which the model takes.
  """
  platform = jax.default_backend()
  library, kernels = {"gpu": ("cudnn", "mosaic_gpu"), "tpu": (cases.FLASH, "pallas_tpu")}.get(platform, ("xla", ""))
  if case.is_dense and case.op == "decode":
    return list(dict.fromkeys(["xla", *(["cudnn"] if platform == "gpu" else []), *filter(None, [kernels])]))
  if case.is_dense:
    return [f"xla, {library}"]
  if settings.implementation:
    return implementations(case.op, settings.implementation)
  if case.op == "prefill":
    return list(dict.fromkeys(["xla, xla", *(["mosaic_gpu, cudnn"] if platform == "gpu" else []),
                               *([f"{kernels}, {kernels}"] if kernels else [])]))
  if case.op == "sparse":
    return list(IMPLEMENTATIONS["sparse_attention"])
  return ["xla", *filter(None, [kernels])]


def time_one(settings: Settings, case: Case, implementation: str) -> tuple[float, float]:
  """(seconds, error) of a case by an implementation; NotImplementedError where it does not serve the case."""
  drawn = lambda: draw(case, settings.size, settings.seed, implementation)
  draws = [drawn()]
  seconds, error = _time_together(settings, case, implementation, draws)
  limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
  room = 3 / 4 * limit / sum(x.nbytes for x in jax.tree.leaves(draws))
  if seconds >= SHORT or room < 2:
    return seconds, error
  draws += [drawn() for _ in range(int(min(room, TOGETHER)) - 1)]
  return _time_together(settings, case, implementation, draws)


def _time_together(settings: Settings, case: Case, implementation: str, draws: list[dict[str, Any]]
                   ) -> tuple[float, float]:
  """`time_one` of one of as many calls in one program as there are inputs."""
  f, count = cases.build(case, implementation), len(draws)
  compiled = jax.jit(lambda draws: [f(**made) for made in draws]).lower(draws).compile()
  error = check(case, settings.size, implementation, draws[-1], compiled(draws)[-1])
  if settings.profile:
    times.report(lambda: compiled(draws), count)
  return times.median_seconds(compiled, draws, rounds=settings.rounds) / count, error


def is_theirs(case: Case) -> bool:
  """Whether the authors' code has it: it chooses no blocks."""
  return not case.block and case.op != "sparse"


def authors(settings: Settings, every: list[Case]) -> dict[Case, float]:
  """Seconds of the authors' code, where it is given, in a process of its own that has the device to itself."""
  if not settings.torch_reference:
    return {}
  n, _, h = settings.size
  asked = {"cases": [dataclasses.asdict(case) for case in every], "heads": n, "head_dim": h, "rounds": settings.rounds}
  found = {}
  for case, answer in zip(every, torch_reference.ask(settings.torch_reference, asked), strict=True):
    if "error" in answer:
      print(f"{case} by the authors' code: {answer['error']}", flush=True)
    else:
      found[case] = answer["seconds"]
  return found


def crossovers(settings: Settings) -> dict[str, dict[str, int]]:
  """{operation: {implementation: the least size from which on it was faster than those after it}}; crossovers.py."""
  of_token, gradient = settings.size.kv * settings.size.h, settings.gradient
  entries = lambda case: case.batch * (case.length if case.op == "scan" else case.rows) * of_token
  prefills = [Case("prefill", t, max(1, 4096 // t), 16, 0, 4, gradient=gradient)
              for t in (32, 128, 512, 1024, 2048, 4096, 8192)]
  scans = [Case("scan", t, gradient=gradient) for t in (16, 64, 128, 256, 512, 1024, 4096, 16384)]
  of_tpu = jax.default_backend() == "tpu"
  kernels = ["pallas_tpu" if of_tpu else "mosaic_gpu"]
  sweeps = [  # (operation, its implementations, cases from small to large, their size)
      ("gated_scan", [*kernels, "xla"], scans, entries),
      ("decode_attention", [*kernels, "xla"], [Case("decode", 16 * r, b, 16) for b, r in (
          (1, 16), (1, 64), (1, 256), (1, 1024), (8, 256), (8, 1024), (64, 256), (64, 1024))], entries),
      ("decode_attention_blocks", [*kernels, "xla"], [Case("decode", 16 * r, b, block=64) for b, r in (
          (1, 64), (1, 256), (1, 1024), (8, 256), (8, 1024), (32, 1024))], entries),
      ("dilated_attention", [*kernels, *([] if of_tpu else ["cudnn", "cudnn_masked"]), "xla"], prefills,
       lambda case: case.length)]
  if of_tpu and not gradient:
    sweeps.append(("sparse_attention", [*kernels, "xla"], [Case("sparse", t, block=64) for t in (1024, 4096, 16384)],
                   lambda case: case.length**2))
  found: dict[str, dict[str, int]] = {}
  for operation, names, cases_of_it, size in sweeps:
    if gradient and operation.startswith("decode"):
      continue
    seconds = {case: times_of(settings, case, names) for case in cases_of_it}
    for i, name in enumerate(names[:-1]):
      for case in reversed(cases_of_it):
        of_others = [seconds[case][other] for other in names[i + 1:] if other in seconds[case]]
        if name not in seconds[case] or seconds[case][name] > min(of_others, default=math.inf):
          break
        found.setdefault(operation, {})[name] = size(case)
  return found


def times_of(settings: Settings, case: Case, names: list[str]) -> dict[str, float]:
  """The seconds of a case by every implementation that this device has."""
  found: dict[str, float] = {}
  for name in names:
    try:
      found[name] = time_one(settings, case, f"xla, {name}" if case.op == "prefill" else name)[0]
    except NotImplementedError as reason:
      print(f"{case} by {name}: not timed: {reason}", flush=True)
    except jax.errors.JaxRuntimeError as error:
      if not device.out_of_memory(error):
        raise
      print(f"{case} by {name}: not timed: out of memory", flush=True)
  print(f"{case}: " + ", ".join(f"{name} {1e3 * s:.3f} ms" for name, s in found.items()), flush=True)
  return found


def main(settings: Settings) -> None:
  check_flags(settings)
  every, size = cases_of(settings), settings.size
  of_authors = authors(settings, [case for case in every if is_theirs(case)])
  folder, speeds = output.made(settings.workdir), times.speeds()
  print(f"{device.name()}: {speeds}; {'/'.join(map(str, size))} query heads, key/value heads, width", flush=True)
  if settings.crossovers:
    print(f"{kind_of(jax.devices()[0])!r}: {crossovers(settings)}")
    return
  lines: list[dict[str, Any]] = []

  def add(case, implementation, seconds, error=None):
    lines.append({"case": dataclasses.asdict(case), "name": str(case), "implementation": implementation,
                  "seconds": seconds, "floor": floor(case, size, speeds), **work(case, size)._asdict(), "error": error})
    print(f"{case}, {implementation}: {seconds * 1e3:.3f} ms", flush=True)
    output.write_json(folder / "results.json", {"device": device.name(), **speeds._asdict(), "lines": lines})

  for case in every:
    for implementation in served(settings, case):
      try:
        add(case, implementation, *time_one(settings, case, implementation))
      except NotImplementedError as reason:
        print(f"{case} by {implementation}: not timed: {reason}", flush=True)
      except jax.errors.JaxRuntimeError as error:
        if not device.out_of_memory(error):
          raise
        print(f"{case} by {implementation}: not timed: out of memory", flush=True)
    if case in of_authors:
      add(case, "torch" if case.is_dense else "authors, torch", of_authors[case])
  text = table(lines)
  print(f"\n{text}")
  (folder / "table.md").write_text(text + "\n", encoding="utf-8")
  for op in dict.fromkeys(line["case"]["op"] for line in lines):
    pictures.save(pictures.against_length(lines, op), folder / f"{op}.png")


def table(lines: list[dict[str, Any]]) -> str:
  """A line for each timing; the ratio is that to the fastest dense attention of the same op, length and batch."""
  dense: dict[tuple, float] = {}
  for line in lines:
    if Case(**line["case"]).is_dense:
      of = (line["case"]["op"], line["case"]["length"], line["case"]["batch"])
      dense[of] = min(line["seconds"], dense.get(of, math.inf))
  rows = []
  for line in lines:
    beside = dense.get((line["case"]["op"], line["case"]["length"], line["case"]["batch"]))
    rows.append([line["name"], line["implementation"], f"{line['seconds'] * 1e3:.3f}", f"{line['bytes'] / 1e9:.3g}",
                 f"{line['flops'] / 1e12:.3g}", f"{line['floor'] * 1e3:.3f}", f"{line['floor'] / line['seconds']:.0%}",
                 f"{beside / line['seconds']:.1f}" if beside and line["case"]["op"] != "scan" else "",
                 "" if line["error"] is None else f"{line['error']:.1e}"])
  return output.markdown_table(["operation", "implementation", "ms", "GB", "TFLOP", "floor, ms", "share of the floor",
                                "times faster than dense", "error"], rows)


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
