"""The tables of speed of experiments/pages, made from experiments/results: those of operations and of whole models.

A table is a function of `read`, which gives a result by its name, such as "gpu_ops". Results have seconds; tables have
milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.shared.output import markdown_table
from experiments.shared.page_tables import Read, Table
from rat_jax.costs import PEAK_FLOPS

Line = dict[str, Any]

# Columns of operations: the implementations that they show, which `experiments.bench_ops` names.
XLA, FOLDED, KERNELS = ("xla", "xla, xla"), ("mosaic_gpu, cudnn",), ("mosaic_gpu", "mosaic_gpu, mosaic_gpu")
MASKED, AUTHORS = ("mosaic_gpu, cudnn_masked",), ("authors, torch",)
_SHOWN = {"RAT+ authors": AUTHORS, "plain JAX": XLA, "folded, cuDNN": FOLDED, "kernels": KERNELS}


def milliseconds(seconds: float | None) -> str:
  """With three digits at least."""
  if seconds is None:
    return ""
  ms = 1e3 * seconds
  return f"{ms:.3f}" if ms < 2 else f"{ms:.2f}" if ms < 20 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def ratio(slow: float | None, fast: float | None) -> str:
  if slow is None or fast is None:
    return ""
  times = slow / fast
  return f"{times:.1f}" if times >= 1 else f"{times:.2f}"


def least(lines: Sequence[Line], names: Sequence[str] | None = None) -> float | None:
  """The fastest of these implementations; None where none was timed."""
  return min((line["seconds"] for line in lines if names is None or line["implementation"] in names), default=None)


def label(case: dict[str, Any]) -> str:
  """A case without what all cases of a table share."""
  if case["block"]:
    name = "sparse attention" if case["op"] == "sparse" else "Quest"
    return f"{name} 1/16, blocks of {case['block']}, T={case['length']}, B={case['batch']}"
  rows = f", B={case['batch']}" if case["batch"] > 1 else ""
  pattern = f", D={case['dilation']}" if case["op"] != "scan" else ""
  return f"{case['op']} T={case['length']}{rows}{pattern}{', W=' + str(case['window']) if case['window'] else ''}"


def by_case(lines: Sequence[Line]) -> tuple[dict[str, list[Line]], dict[tuple, float]]:
  """({label: its lines} of what is no dense attention, {(op, length, batch): the fastest dense attention})."""
  cases: dict[str, list[Line]] = {}
  dense: dict[tuple, float] = {}
  for line in lines:
    case = line["case"]
    at = case["op"], case["length"], case["batch"]
    if case["op"] != "scan" and case["dilation"] == 1 and not case["block"]:
      dense[at] = min(line["seconds"], dense.get(at, line["seconds"]))
    else:
      cases.setdefault(label(case), []).append(line)
  return cases, dense


def operations(lines: Sequence[Line], columns: Sequence[str], header: str) -> str:
  """A line for every case that is no dense attention: seconds by implementation, the floor, and how much faster."""
  cases, dense = by_case(lines)
  rows = []
  for name, timed in cases.items():
    case = timed[0]["case"]
    beside = dense.get((case["op"], case["length"], case["batch"]))
    ours = least(timed, (*FOLDED, *KERNELS))
    row = [name, milliseconds(beside), *(milliseconds(least(timed, _SHOWN[column])) for column in columns),
           milliseconds(timed[0]["floor"]), ratio(beside, ours)]
    rows.append([*row, *([ratio(least(timed, AUTHORS), ours)] if "RAT+ authors" in columns else [])])
  compared = ["times faster than dense", *(["than the authors'"] if "RAT+ authors" in columns else [])]
  return markdown_table([header, "dense", *columns, "floor", *compared], rows)


def ops(read: Read) -> str:
  """Scan and prefill of one run, decoding of the other."""
  lines = [line for line in read("gpu_ops")["lines"] if line["case"]["op"] != "decode"]
  return operations([*lines, *read("gpu_decode_ops")["lines"]], tuple(_SHOWN), "one H200, ms")


def decode_h100(read: Read) -> str:
  return operations(read("gpu_decode_ops_h100")["lines"], ("RAT+ authors", "plain JAX", "kernels"),
                    "one H100 80GB, ms")


def dense_decode(read: Read) -> str:
  """Dense decoding by library."""
  rows = []
  for card, name in (("H200", "gpu_decode_ops"), ("H100", "gpu_decode_ops_h100")):
    for length, batch in ((4096, 256), (16384, 128)):
      timed = [line for line in read(name)["lines"] if line["case"]["dilation"] == 1 and not line["case"]["block"]
               and line["case"]["length"] == length]
      ours, torch = least(timed, KERNELS), least(timed, ("torch",))
      rows.append([f"{card}, T={length}, B={batch}", milliseconds(ours), milliseconds(least(timed, ("cudnn",))),
                   milliseconds(torch), milliseconds(least(timed, ("xla",)))])
  return markdown_table(["dense decode step, ms", "our kernel", "cuDNN through JAX", "PyTorch", "plain JAX"], rows)


def gradients(read: Read) -> str:
  return operations(read("gpu_gradients")["lines"], tuple(_SHOWN), "forward and backward, one H200, ms")


def gradients_h100(read: Read) -> str:
  return operations(read("gpu_gradients_h100")["lines"], ("folded, cuDNN", "kernels"),
                    "forward and backward, one H100, ms")


def _prefills(read: Read, result: str, columns: Sequence[tuple[str, int, Sequence[str]]]) -> str:
  """A line for every length; a column is (its header, D, implementations)."""
  timed: dict[int, dict[int, list[Line]]] = {}  # by length and D
  for line in read(result)["lines"]:
    timed.setdefault(line["case"]["length"], {}).setdefault(line["case"]["dilation"], []).append(line)
  rows = [[f"{length}", *(milliseconds(least(by_dilation[dilation], names)) for _, dilation, names in columns)]
          for length, by_dilation in timed.items()]
  return markdown_table(["tokens", *(header for header, *_ in columns)], rows)


_DENSE = ("dense, RoPE alone", 1, ("xla, cudnn",))


def lengths(read: Read) -> str:
  return _prefills(read, "gpu_lengths", [_DENSE, *(
      (f"D={dilation}: {name}", dilation, names) for dilation in (16, 64)
      for name, names in (("folded", FOLDED), ("kernels", KERNELS)))])


def short(read: Read) -> str:
  return _prefills(read, "gpu_short", [_DENSE, *(
      (f"D={dilation}: {name}", dilation, names) for dilation in (16, 64)
      for name, names in (("folded", FOLDED), ("under a mask", MASKED), ("kernels", KERNELS)))])


def of_mode(lines: Sequence[Line]) -> dict[tuple[int, int], dict[str, Line]]:
  """{(rows, context): {mode: its line}} of a whole model."""
  found: dict[tuple[int, int], dict[str, Line]] = {}
  for line in lines:
    found.setdefault((line["batch_size"], line["context"]), {})[line["mode"]] = line
  return found


def decode(read: Read) -> str:
  """A decode step of 1.4 billion parameters against rows and context."""
  rows = []
  for name in ("gpu_decode", "gpu_decode_context"):
    for (batch, context), by_mode in of_mode(read(name)["lines"]).items():
      dense, sparse = by_mode.get("dense"), by_mode["dilated:64"]
      rows.append([f"{batch} x {context}", f"{1e3 * dense['seconds']:.2f}" if dense else "no memory",
                   f"{1e3 * sparse['seconds']:.2f}", f"{batch / sparse['seconds']:,.0f}",
                   ratio(dense["seconds"], sparse["seconds"]) if dense else "", f"{sparse['memory'] / 1e9:.1f} GB"])
  return markdown_table(["rows x context", "dense, ms", "D=64, ms", "D=64, tokens/s", "times faster", "memory, D=64"],
                        rows)


def authors_decode(read: Read) -> str:
  """The same beside the authors' model."""
  return markdown_table(["decode step, ms", "ours", "RAT+ authors"], [
      [f"{line['batch_size']} rows, {line['mode']}", milliseconds(line["seconds"]), milliseconds(line["authors"])]
      for line in read("gpu_authors_decode")["lines"]])


def prompt(read: Read) -> str:
  """A prompt of 1.4 billion parameters."""
  rows = []
  for (batch, context), by_mode in of_mode(read("gpu_prompt")["lines"]).items():
    dense, near, far = (by_mode[mode] for mode in ("dense", "dilated:16", "dilated:64"))
    rows.append([f"{context}", *(f"{1e3 * line['seconds']:.0f}" for line in (dense, near, far)),
                 f"{batch * context / far['seconds']:,.0f}", ratio(dense["seconds"], far["seconds"]),
                 f"{dense['memory'] / 1e9:.1f}, {far['memory'] / 1e9:.1f} GB"])
  return markdown_table(["tokens", "dense, ms", "D=16, ms", "D=64, ms", "D=64, tokens/s", "times faster",
                         "memory, dense and D=64"], rows)


def training(read: Read) -> str:
  """A step of training with 1.4 billion parameters, alone and beside the authors' model in another run."""
  alone, beside = read("gpu_train"), read("gpu_authors_train")
  names = {"dense": "two dense updates", "dilated:64": "active recurrence learning, D=64"}
  rows = []
  for line, other in zip(alone["lines"], beside["lines"], strict=True):
    tokens, peak = line["batch_size"] * line["context"], PEAK_FLOPS[alone["device"]]
    rows.append([names[line["mode"]], f"{1e3 * line['seconds']:.0f}", f"{tokens / line['seconds']:,.0f}",
                 f"{line['memory'] / 1e9:.1f} GB", f"{100 * line['flops'] / line['seconds'] / peak:.0f}%",
                 f"{1e3 * other['seconds']:.0f}", f"{1e3 * other['authors']:.0f}",
                 f"{tokens / other['authors']:,.0f}"])
  return markdown_table(["training, one H200", "ms", "tokens/s", "memory", "of the peak", "another run: ours, ms",
                         "RAT+ authors, ms", "RAT+ authors, tokens/s"], rows)


def modes(read: Read) -> str:
  """A decode step of every mode, plain heads and grouped ones."""
  grouped = {line["mode"]: line for line in read("gpu_modes_grouped")["lines"]}
  plain = {line["mode"]: line for line in read("gpu_modes")["lines"]}
  rows = [[mode, *(cell for of in (plain, grouped) for cell in (
      f"{1e3 * of[mode]['seconds']:.2f}", ratio(of["dense"]["seconds"], of[mode]["seconds"])))] for mode in plain]
  return markdown_table(["one NVIDIA H200", "ms per step, 16 heads", "times faster", "ms per step, 16/2 heads",
                         "times faster"], rows)


TABLES: dict[str, Table] = {
    "ops": ops, "ops_decode_h100": decode_h100, "ops_dense_decode": dense_decode, "ops_gradients": gradients,
    "ops_gradients_h100": gradients_h100, "ops_lengths": lengths, "ops_short": short, "model_decode": decode,
    "model_authors_decode": authors_decode, "model_prompt": prompt, "model_training": training, "model_modes": modes}
