"""Times every operation against dense attention by the best library kernel, in one run on one device.

Claim: memory, dilated prefill and decoding over a compact cache are as fast as their bytes and operations say.
Command: python -m experiments.bench_ops                      (--op=prefill --length=262144 --dilation=16 for one case)
Where the time goes, kernel by kernel: --profile
Time against T: --op=prefill --length=4096 --length=16384 ...   The authors' code beside ours: --torch_reference=DIR
Inputs are drawn anew, and every result is checked against the reference on some queries and heads before it is timed.
Floors are the operation's bytes and FLOPs over what this device's copies and matrix products were measured to do.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import pallas_kernels
from experiments import common, kernel_times, plots, torch_reference
from experiments.torch_reference import ROPE_BASE
from pallas_kernels import softmax
from pallas_kernels.dilated_attention.reference import dilated_pattern
from pallas_kernels.gated_scan.reference import gated_scan_sequential
from rat_jax import rope, selection
from rat_jax.block_step import attend_step
from rat_jax.cache import KVCache
from rat_jax.modes import Quest
from rat_jax.selection import Origin, Statistics

OPS = flags.DEFINE_multi_enum("op", ["scan", "prefill", "decode"], ["scan", "prefill", "decode"], "What to time.")
IMPLEMENTATIONS = flags.DEFINE_multi_string("implementation", [], "Implementations to compare. Default: all.")
LENGTHS = flags.DEFINE_multi_integer("length", [], "Tokens, instead of those of the standard cases.", lower_bound=1)
DILATIONS = flags.DEFINE_multi_integer("dilation", [], "D, instead of those of the standard cases.", lower_bound=1)
BLOCKS = flags.DEFINE_multi_integer("block", [], "Tokens of a block, for decoding by Quest beside --length.",
                                    lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Rows, beside --length.", lower_bound=1)
WINDOW = flags.DEFINE_integer("window", 0, "W, beside --length.", lower_bound=0)
SINKS = flags.DEFINE_integer("sinks", 4, "S0, beside --length.", lower_bound=0)
HEADS = flags.DEFINE_integer("heads", 32, "Query heads N.", lower_bound=1)
KV_HEADS = flags.DEFINE_integer("kv_heads", None, "Key/value heads K. Default: as many.", lower_bound=1)
HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "Head width H.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds, of what takes a second three at most; the median counts.",
                              lower_bound=1)
TORCH_REFERENCE = flags.DEFINE_string("torch_reference", None, "A checkout of the RAT+ authors' code, timed too.")
CROSSOVERS = flags.DEFINE_bool("crossovers", False, "Instead: from which sizes on the kernels are faster.")
CHECKED = 64  # queries, or rows, whose result is compared with the reference


@dataclasses.dataclass(frozen=True)
class Case:
  """One operation at one shape."""

  op: str
  length: int
  batch: int = 1
  dilation: int = 1  # 1 is dense
  window: int = 0
  sinks: int = 0
  block: int = 0  # of a decode step by Quest over a full cache, at a budget of 1/16

  @property
  def is_dense(self) -> bool:
    return self.op != "scan" and self.dilation == 1 and not self.block

  @property
  def mode(self) -> Quest:
    return Quest(1 / 16, self.block, keep_first=False)

  @property
  def rows(self) -> int:
    """Cache rows that a decode step reads."""
    if self.block:
      return self.length // 16
    return self.length if self.dilation == 1 else self.sinks + self.window + 1 + self.length // self.dilation

  def __str__(self) -> str:
    pattern = f", D={self.dilation}, W={self.window}, S={self.sinks}" if self.op != "scan" else ""
    if self.block:
      pattern = f", Quest 1/16, blocks of {self.block}"
    return f"{self.op} T={self.length}, B={self.batch}{pattern}"


def cases() -> list[Case]:
  """Those of the flags, or the standard ones, dense attention beside them."""
  found = []
  for op in OPS.value:
    if op == "scan":
      found += [Case(op, length, BATCH_SIZE.value) for length in LENGTHS.value or [32768, 262144]]
    elif LENGTHS.value or DILATIONS.value:
      found += [Case(op, length, BATCH_SIZE.value, *((1, 0, 0) if d == 1 else (d, WINDOW.value, SINKS.value)))
                for length in LENGTHS.value or [32768] for d in (1, *(DILATIONS.value or [16, 64]))]
      if op == "decode":
        found += [Case(op, length, BATCH_SIZE.value, block=block) for length in LENGTHS.value for block in BLOCKS.value]
    elif op == "prefill":
      found += [Case(op, 262144), Case(op, 262144, 1, 16, 0, 4), Case(op, 262144, 1, 64, 0, 4),
                Case(op, 262144, 1, 16, 256, 4), Case(op, 32768, 8), Case(op, 32768, 8, 16, 0, 4),
                Case(op, 32768, 8, 64, 0, 4)]
    else:
      found += [Case(op, length, batch, d) for length, batch in ((4096, 256), (16384, 128)) for d in (1, 16, 64)]
      found += [Case(op, 16384, 128, block=block) for block in (64, 16)]
  return found


def heads() -> tuple[int, int, int]:
  return HEADS.value, KV_HEADS.value or HEADS.value, HEAD_DIM.value


def floor(case: Case, copy: float, product: float) -> float:
  """Seconds that bytes (over the copy speed) and operations (over that of matrix products) take at least."""
  n, kv, h = heads()
  scan = 5 * 2 * case.batch * case.length * kv * h / copy
  if case.op == "scan":
    return scan
  if case.op == "decode":
    statistics = case.length // case.block if case.block else 0  # two rows of a block, as keys and values of a token
    return 2 * 2 * case.batch * kv * (case.rows + statistics) * h / copy
  reach, counts = np.arange(1, case.length + 1), 0
  if case.dilation == 1:
    counts = reach.sum()
  else:
    strided = np.maximum(reach - 1 - case.window, 0) // case.dilation - np.minimum(case.sinks, reach) // case.dilation
    counts = (np.maximum(strided, 0) + np.minimum(case.window + 1, reach) + np.minimum(case.sinks, reach)).sum()
  return float(4 * case.batch * n * h * counts / product) + (scan if case.dilation > 1 else 0.0)


def draw(case: Case) -> dict[str, jax.Array]:
  """Fresh random inputs, bfloat16."""
  n, kv, h = heads()
  key = jax.random.fold_in(jax.random.key(common.SEED.value), time.time_ns() % (1 << 31))

  def normal(i, *shape):
    return jax.random.normal(jax.random.fold_in(key, i), shape, jnp.bfloat16)

  if case.op == "decode":
    # Every kernel gets the order of axes that it reads fastest.
    shape = (case.batch, case.rows, kv, h) if case.is_dense else (case.batch, kv, case.rows, h)
    if case.block:
      shape = (case.batch, kv, case.length, h)
    made = {"q": normal(0, case.batch, 1, n, h), "keys": normal(1, *shape), "values": normal(2, *shape)}
    if case.block:
      made["statistics"] = jax.jit(functools.partial(_statistics, case))(made["keys"])
    if not case.is_dense:
      new = (case.batch, 1, kv, h)
      state = tuple(normal(i, case.batch, kv, h).astype(jnp.float32) for i in (6, 7))
      made |= {"gate": normal(3, *new), "k": normal(4, *new), "v": normal(5, *new), "state": state}
    return made
  shape = (case.batch, case.length, kv, h)
  made = {"gate": 2 * normal(3, *shape) + 2, "k": normal(1, *shape), "v": normal(2, *shape)}
  return made if case.op == "scan" else made | {"q": normal(0, case.batch, case.length, n, h)}


def build(case: Case, implementation: str) -> Callable[..., Any]:
  """The function of `draw`'s arrays that is timed."""
  dense: Any = jax.nn.dot_product_attention

  def scan(gate, k, v):
    return pallas_kernels.gated_scan(gate, (k, v), implementation=implementation)

  def decode(q, keys, values, gate=None, k=None, v=None, state=None, statistics=None):
    """Of a sparse case with the memory's step, RoPE, and the new token's own key."""
    if case.is_dense:
      return dense(q, keys, values, implementation=implementation)
    (k, v), state = pallas_kernels.gated_scan(gate, (k, v), state)
    at = jnp.full((case.batch, 1), case.length - 1, jnp.int32)
    q, k = (rope.rotate(x, at, ROPE_BASE).astype(jnp.bfloat16) for x in (q, k))
    if case.block:
      out = attend_step(q, k, v, case.mode, at, KVCache(keys[None], values[None]), 0, statistics, at[:, 0],
                        Origin(at[:, 0], 0), case.length, implementation)
      return out.astype(q.dtype), state
    seen = jnp.ones((case.batch, keys.shape[2]), bool)
    own = (k[:, 0], v[:, 0])
    out, _ = pallas_kernels.decode_attention(q[:, 0], keys, values, seen, own=own, implementation=implementation)
    return out[:, None].astype(q.dtype), state

  def prefill(gate, q, k, v):
    of_scan, of_attention = implementation.split(", ")
    at = jnp.arange(case.length, dtype=jnp.int32)[None]
    if case.dilation > 1:
      (k, v), _ = pallas_kernels.gated_scan(gate, (k, v), implementation=of_scan)
    q, k = (rope.rotate(x, at, ROPE_BASE).astype(jnp.bfloat16) for x in (q, k))
    if case.dilation == 1:
      return dense(q, k, v, is_causal=True, implementation=of_attention)
    return pallas_kernels.dilated_attention(q, k, v, dilation=case.dilation, window=case.window, sinks=case.sinks,
                                            implementation=of_attention)

  functions: dict[str, Callable[..., Any]] = {"scan": scan, "decode": decode, "prefill": prefill}
  return functions[case.op]


def served(case: Case) -> list[str]:
  """The implementations to time: of a prefill, those of its scan and its attention; of dense attention, libraries'."""
  libraries = ["xla", "cudnn"] if jax.default_backend() == "gpu" else ["xla"]
  if case.is_dense:
    return libraries if case.op == "decode" else [f"xla, {libraries[-1]}"]
  if IMPLEMENTATIONS.value:
    return [name if ", " in name or case.op != "prefill" else f"{name}, {name}" for name in IMPLEMENTATIONS.value]
  if case.op == "prefill":
    return ["xla, xla", "mosaic_gpu, cudnn", "mosaic_gpu, mosaic_gpu"]
  return ["xla", "mosaic_gpu"]


def check(case: Case, made: dict[str, jax.Array], result: Any) -> float:
  """The largest error on some queries, as a share of the largest entry. Raises ValueError above that of bfloat16."""
  if case.op == "scan":
    (outs, _), some = result, slice(0, min(case.length, 4096))
    wide = {name: x[:, some].astype(jnp.float32) for name, x in made.items()}
    zero = tuple(jnp.zeros(x[:, 0].shape, jnp.float32) for x in outs)
    expected, _ = jax.jit(gated_scan_sequential)(wide["gate"], (wide["k"], wide["v"]), zero, None)
    pairs = [(out[:, some], one) for out, one in zip(outs, expected, strict=True)]
  elif case.op == "decode":
    rows = CHECKED // 8 if case.block else CHECKED
    few, out = jax.tree.map(lambda x: x[:rows], made), result if case.is_dense else result[0]
    pairs = [(out[:rows], jax.jit(functools.partial(_decode_reference, case))(**few))]
  else:
    at = jnp.sort(jax.random.choice(jax.random.key(1), case.length, (CHECKED,), replace=False))
    n, kv, few = *heads()[:2], min(2, heads()[1])  # key/value heads
    made = made | {name: made[name][:, :, :few] for name in ("gate", "k", "v")} | {"q": made["q"][:, :, :few * n // kv]}
    pairs = [(result[:, at, :few * n // kv], jax.jit(functools.partial(_reference, case))(made, at))]
  worst = 0.0
  for ours, theirs in pairs:
    ours, theirs = jnp.asarray(ours, jnp.float32), jnp.asarray(theirs, jnp.float32)
    worst = max(worst, float(jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs))))
  if not worst < 2e-2:
    raise ValueError(f"{case}: the result is off by {worst:.2g} of its largest entry; it is not timed.")
  return worst


def _statistics(case: Case, keys) -> Statistics:
  blocks = keys.reshape(*keys.shape[:2], -1, case.block, keys.shape[3])
  return blocks.min(axis=3), blocks.max(axis=3)


def _decode_reference(case: Case, q, keys, values, gate=None, k=None, v=None, state=None, statistics=None) -> jax.Array:
  """One softmax over the cache and the new token, in float32."""
  seen = jnp.ones((1, 1, 1, 1), bool)
  if not case.is_dense:
    (k, v), _ = gated_scan_sequential(gate, (k, v), state)
    at = jnp.full((q.shape[0], 1), case.length - 1, jnp.int32)
    q, k = (rope.rotate(x, at, ROPE_BASE).astype(jnp.bfloat16) for x in (q, k.astype(jnp.bfloat16)))
    keys, values = (jnp.concatenate([jnp.swapaxes(old, 1, 2), new.astype(jnp.bfloat16)], axis=1)
                    for old, new in ((keys, k), (values, v)))
  if case.block:  # the last row of the cache is the new token's, which stands beside it here
    keys, values = (jnp.delete(x, case.length - 1, axis=1) for x in (keys, values))
    positions = jnp.broadcast_to(jnp.arange(case.length, dtype=jnp.int32), (q.shape[0], case.length))
    own = selection.continued(case.mode, statistics, keys[:, -1:], at, at[:, 0])
    scores = selection.score_blocks(case.mode, {"q": q, "own": own, "position": at}, statistics, (keys, positions),
                                    Origin(at[:, 0], 0))
    blocks, _ = selection.pick(case.mode, scores, at, case.length)
    seen = selection.seen_keys(case.mode, blocks, statistics[0].shape[2], at, positions)
    seen = selection.to_groups(seen, keys.shape[2])
  return softmax.attend_part(q, keys, values, seen)[0]


def _reference(case: Case, made: dict[str, jax.Array], at: jax.Array) -> jax.Array:
  """Attention of the queries `at` alone, over the memory by its plain form."""
  k, v, positions = made["k"], made["v"], jnp.arange(case.length, dtype=jnp.int32)
  if case.dilation > 1:
    (k, v), _ = pallas_kernels.gated_scan(made["gate"], (k, v), implementation="xla")
  q = rope.rotate(made["q"][:, at], at[None], ROPE_BASE).astype(jnp.bfloat16)
  k = rope.rotate(k, positions[None], ROPE_BASE).astype(jnp.bfloat16)
  seen = positions <= at[:, None]
  if case.dilation > 1:
    seen &= dilated_pattern(at[:, None], positions, case.dilation, case.window, case.sinks)
  return softmax.attend_part(q, k, v, seen[None, None])[0]


def median_seconds(compiled: Any, *arguments: Any) -> float:
  """The median over rounds of a call; short ones are called several times a round."""

  def seconds(calls):
    start = time.perf_counter()
    for _ in range(calls):
      out = compiled(*arguments)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls

  once = min(seconds(1), seconds(1))
  rounds = ROUNDS.value if once < 1 else min(ROUNDS.value, 3)
  return float(np.median([seconds(max(1, int(0.02 / once))) for _ in range(rounds)]))


def speeds() -> tuple[float, float]:
  """(bytes per second of a copy, operations per second of a bfloat16 product) of this device, as measured."""
  size = 1 << (29 if jax.default_backend() == "gpu" else 24)
  x = jnp.zeros(size, jnp.bfloat16)
  copy = 2 * x.nbytes / median_seconds(jax.jit(lambda x: x + 1).lower(x).compile(), x)
  width = 8192 if jax.default_backend() == "gpu" else 512
  a = jnp.ones((width, width), jnp.bfloat16)
  product = 2 * width**3 / median_seconds(jax.jit(lambda a: a @ a).lower(a).compile(), a)
  return copy, product


def time_one(case: Case, implementation: str, made: dict[str, Any]) -> tuple[float, float]:
  """(seconds, error) of a case by an implementation. Raises NotImplementedError where it does not serve it."""
  f = build(case, implementation)
  compiled = jax.jit(lambda made: f(**made)).lower(made).compile()
  error, seconds = check(case, made, compiled(made)), median_seconds(compiled, made)
  kernel_times.report(lambda: compiled(made))
  return seconds, error


def authors(directory: str, every: list[Case]) -> dict[Case, float]:
  """Seconds of the authors' code, in a process of its own that has the device to itself."""
  asked = {"cases": [dataclasses.asdict(case) for case in every], "heads": HEADS.value, "head_dim": HEAD_DIM.value,
           "rounds": ROUNDS.value}
  torch_reference.check_paths(directory)
  if heads()[0] != heads()[1]:
    raise ValueError(f"--torch_reference with --kv_heads={KV_HEADS.value}: the authors' code has no grouped heads.")
  done = subprocess.run([sys.executable, "-m", "experiments.torch_reference", directory], input=json.dumps(asked),
                        stdout=subprocess.PIPE, text=True, check=True)
  found = {}
  for case, line in zip(every, done.stdout.splitlines(), strict=True):
    answer = json.loads(line)
    if "error" in answer:
      print(f"{case} by the authors' code: {answer['error']}", flush=True)
    else:
      found[case] = answer["seconds"]
  return found


def crossovers() -> dict[str, dict[str, int]]:
  """{operation: {implementation: the least size from which on it was faster than those after it}}; crossovers.py."""
  prefills = lambda *lengths: [Case("prefill", t, max(1, 4096 // t), 16, 0, 4) for t in lengths]
  entries = lambda case: case.batch * (case.length if case.op == "scan" else case.rows) * heads()[1] * heads()[2]
  length = lambda case: case.length
  sweeps = [  # (operation, the slower one, the faster one, cases from small to large, their size)
      ("gated_scan", "xla", "mosaic_gpu", [Case("scan", t) for t in (16, 64, 128, 256, 512, 1024, 4096, 16384)],
       entries),
      ("decode_attention", "xla", "mosaic_gpu", [Case("decode", 16 * r, b, 16) for b, r in (
          (1, 16), (1, 64), (1, 256), (1, 1024), (8, 256), (8, 1024), (64, 256), (64, 1024))], entries),
      ("dilated_attention", "xla, cudnn", "xla, mosaic_gpu", prefills(2048, 4096, 8192, 16384, 32768), length),
      ("dilated_attention", "xla, cudnn_masked", "xla, cudnn", prefills(512, 1024, 2048, 4096, 8192), length),
      ("dilated_attention", "xla, xla", "xla, cudnn_masked", prefills(32, 64, 128, 256, 512, 1024), length)]
  found: dict[str, dict[str, int]] = {}
  for operation, slower, faster, every, size in sweeps:
    for case in reversed(every):
      made = draw(case)
      slow, fast = (time_one(case, name, made)[0] for name in (slower, faster))
      print(f"{case}: {slower} {slow * 1e3:.3f} ms, {faster} {fast * 1e3:.3f} ms", flush=True)
      if fast > slow:
        break
      found.setdefault(operation, {})[faster.split(", ")[-1]] = size(case)
  return found


def main() -> None:
  theirs = [case for case in cases() if not case.block]
  of_authors = authors(TORCH_REFERENCE.value, theirs) if TORCH_REFERENCE.value else {}
  folder, (copy, product) = common.workdir("bench_ops"), speeds()
  print(f"{common.device()}: copies {copy / 1e12:.2f} TB/s, bfloat16 products {product / 1e12:.0f} TFLOP/s;"
        f" {'/'.join(map(str, heads()))} query heads, key/value heads, width", flush=True)
  if CROSSOVERS.value:
    print(f"{common.device()!r}: {crossovers()}")
    return
  lines: list[dict[str, Any]] = []

  def add(case, least, implementation, seconds, error=None):
    lines.append({"case": dataclasses.asdict(case), "name": str(case), "implementation": implementation,
                  "seconds": seconds, "floor": least, "error": error})
    print(f"{case}, {implementation}: {seconds * 1e3:.3f} ms", flush=True)
    common.write_json(folder / "results.json", {"device": common.device(), "copy": copy, "product": product,
                                                "lines": lines})

  for case in cases():
    made, least = draw(case), floor(case, copy, product)
    for implementation in served(case):
      try:
        add(case, least, implementation, *time_one(case, implementation, made))
      except NotImplementedError as reason:
        print(f"{case} by {implementation}: not timed: {reason}", flush=True)
      except jax.errors.JaxRuntimeError as error:
        if not common.out_of_memory(error):
          raise
        print(f"{case} by {implementation}: not timed: out of memory", flush=True)
    if case in of_authors:
      add(case, least, "torch" if case.is_dense else "authors, torch", of_authors[case])
    del made
  text = table(lines)
  print(f"\n{text}")
  (folder / "table.md").write_text(text + "\n")
  plots.draw_times(lines, folder)


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
    rows.append([line["name"], line["implementation"], f"{line['seconds'] * 1e3:.3f}", f"{line['floor'] * 1e3:.3f}",
                 f"{line['floor'] / line['seconds']:.0%}",
                 f"{beside / line['seconds']:.1f}" if beside and line["case"]["op"] != "scan" else "",
                 "" if line["error"] is None else f"{line['error']:.1e}"])
  return common.markdown_table(["operation", "implementation", "ms", "floor, ms", "share of the floor",
                                "times faster than dense", "error"], rows)


if __name__ == "__main__":
  common.run(main)
