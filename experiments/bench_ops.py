"""Times every operation against dense attention by the best library kernel, in one run on one device.

Claim: memory, dilated prefill and decoding over a compact cache are as fast as their bytes and operations say.
Command: python -m experiments.bench_ops                      (--op=prefill --length=262144 --dilation=16 for one case)
Inputs are drawn anew, and every result is checked against the reference on some of its queries before it is timed.
Floors are the operation's bytes and FLOPs over what this device's copies and matrix products were measured to do.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import pallas_kernels
from experiments import common
from pallas_kernels import softmax
from pallas_kernels.dilated_attention.reference import dilated_pattern
from pallas_kernels.gated_scan.reference import gated_scan_sequential
from rat_jax import rope

OPS = flags.DEFINE_multi_enum("op", ["scan", "prefill", "decode"], ["scan", "prefill", "decode"], "What to time.")
IMPLEMENTATIONS = flags.DEFINE_multi_string("implementation", [], "Implementations to compare. Default: all.")
LENGTHS = flags.DEFINE_multi_integer("length", [], "Tokens, instead of those of the standard cases.", lower_bound=1)
DILATIONS = flags.DEFINE_multi_integer("dilation", [], "D, instead of those of the standard cases.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Rows, beside --length.", lower_bound=1)
WINDOW = flags.DEFINE_integer("window", 0, "W, beside --length.", lower_bound=0)
SINKS = flags.DEFINE_integer("sinks", 4, "S0, beside --length.", lower_bound=0)
HEADS = flags.DEFINE_integer("heads", 32, "Query heads N.", lower_bound=1)
KV_HEADS = flags.DEFINE_integer("kv_heads", None, "Key/value heads K. Default: as many.", lower_bound=1)
HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "Head width H.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds; the median counts.", lower_bound=1)
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

  def __str__(self) -> str:
    pattern = f", D={self.dilation}, W={self.window}, S={self.sinks}" if self.op != "scan" else ""
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
    elif op == "prefill":
      found += [Case(op, 262144), Case(op, 262144, 1, 16, 0, 4), Case(op, 262144, 1, 64, 0, 4),
                Case(op, 262144, 1, 16, 256, 4), Case(op, 32768, 8), Case(op, 32768, 8, 16, 0, 4),
                Case(op, 32768, 8, 64, 0, 4)]
    else:
      found += [Case(op, length, batch, d) for length, batch in ((4096, 256), (16384, 128)) for d in (1, 16, 64)]
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
    rows = case.length if case.dilation == 1 else case.sinks + case.window + 1 + case.length // case.dilation
    return 2 * 2 * case.batch * kv * rows * h / copy
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
    rows = case.length if case.dilation == 1 else case.sinks + case.window + 1 + case.length // case.dilation
    # Every kernel gets the order of axes that it reads fastest.
    shape = (case.batch, rows, kv, h) if case.dilation == 1 else (case.batch, kv, rows, h)
    return {"q": normal(0, case.batch, n, h), "k": normal(1, *shape), "v": normal(2, *shape)}
  shape = (case.batch, case.length, kv, h)
  made = {"gate": 2 * normal(3, *shape) + 2, "k": normal(1, *shape), "v": normal(2, *shape)}
  return made if case.op == "scan" else made | {"q": normal(0, case.batch, case.length, n, h)}


def build(case: Case, implementation: str) -> Callable[..., Any]:
  """The function of `draw`'s arrays that is timed."""
  dense: Any = jax.nn.dot_product_attention

  def scan(gate, k, v):
    return pallas_kernels.gated_scan(gate, (k, v), implementation=implementation)

  def decode(q, k, v):
    if case.dilation == 1:
      return dense(q[:, None], k, v, implementation=implementation)[:, 0]
    seen = jnp.ones((case.batch, k.shape[2]), bool)
    return pallas_kernels.decode_attention(q, k, v, seen, implementation=implementation)[0]

  def prefill(gate, q, k, v):
    of_scan, of_attention = implementation.split(", ")
    at = jnp.arange(case.length, dtype=jnp.int32)[None]
    if case.dilation > 1:
      (k, v), _ = pallas_kernels.gated_scan(gate, (k, v), implementation=of_scan)
    q, k = (rope.rotate(x, at, 10000.0).astype(jnp.bfloat16) for x in (q, k))
    if case.dilation == 1:
      return dense(q, k, v, is_causal=True, implementation=of_attention)
    return pallas_kernels.dilated_attention(q, k, v, dilation=case.dilation, window=case.window, sinks=case.sinks,
                                            implementation=of_attention)

  functions: dict[str, Callable[..., Any]] = {"scan": scan, "decode": decode, "prefill": prefill}
  return functions[case.op]


def served(case: Case) -> list[str]:
  """The implementations to time: of a prefill, those of its scan and its attention."""
  if IMPLEMENTATIONS.value:
    return [name if ", " in name or case.op != "prefill" else f"{name}, {name}" for name in IMPLEMENTATIONS.value]
  if case.op == "scan":
    return ["xla", "mosaic_gpu"]
  if case.op == "decode":
    return ["xla", "cudnn"] if case.dilation == 1 else ["xla", "mosaic_gpu"]
  return ["xla, cudnn"] if case.dilation == 1 else ["xla, xla", "xla, cudnn", "mosaic_gpu, cudnn"]


def check(case: Case, made: dict[str, jax.Array], result: Any) -> float:
  """The largest error on some queries, as a share of the largest entry. Raises ValueError above that of bfloat16."""
  if case.op == "scan":
    (outs, _), some = result, slice(0, min(case.length, 4096))
    wide = {name: x[:, some].astype(jnp.float32) for name, x in made.items()}
    zero = tuple(jnp.zeros(x[:, 0].shape, jnp.float32) for x in outs)
    expected, _ = jax.jit(gated_scan_sequential)(wide["gate"], (wide["k"], wide["v"]), zero, None)
    pairs = [(out[:, some], one) for out, one in zip(outs, expected, strict=True)]
  elif case.op == "decode":
    few = {name: x[:CHECKED] for name, x in made.items()}
    mask = jnp.ones((1, 1, 1, 1), bool)
    k, v = (few[name] if case.dilation == 1 else jnp.swapaxes(few[name], 1, 2) for name in "kv")
    expected, _ = jax.jit(softmax.attend_part)(few["q"][:, None], k, v, mask)
    pairs = [(result[:CHECKED], expected[:, 0])]
  else:
    at = jnp.sort(jax.random.choice(jax.random.key(1), case.length, (CHECKED,), replace=False))
    pairs = [(result[:, at], jax.jit(functools.partial(_reference, case))(made, at))]
  worst = 0.0
  for ours, theirs in pairs:
    ours, theirs = jnp.asarray(ours, jnp.float32), jnp.asarray(theirs, jnp.float32)
    worst = max(worst, float(jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs))))
  if not worst < 2e-2:
    raise ValueError(f"{case}: the result is off by {worst:.2g} of its largest entry; it is not timed.")
  return worst


def _reference(case: Case, made: dict[str, jax.Array], at: jax.Array) -> jax.Array:
  """Attention of the queries `at` alone, over the memory by its plain form."""
  k, v, positions = made["k"], made["v"], jnp.arange(case.length, dtype=jnp.int32)
  if case.dilation > 1:
    (k, v), _ = pallas_kernels.gated_scan(made["gate"], (k, v), implementation="xla")
  q = rope.rotate(made["q"][:, at], at[None], 10000.0).astype(jnp.bfloat16)
  k = rope.rotate(k, positions[None], 10000.0).astype(jnp.bfloat16)
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

  calls = max(1, int(0.02 / min(seconds(1), seconds(1))))
  return float(np.median([seconds(calls) for _ in range(ROUNDS.value)]))


def speeds() -> tuple[float, float]:
  """(bytes per second of a copy, operations per second of a bfloat16 product) of this device, as measured."""
  size = 1 << (29 if jax.default_backend() == "gpu" else 24)
  x = jnp.zeros(size, jnp.bfloat16)
  copy = 2 * x.nbytes / median_seconds(jax.jit(lambda x: x + 1).lower(x).compile(), x)
  width = 8192 if jax.default_backend() == "gpu" else 512
  a = jnp.ones((width, width), jnp.bfloat16)
  product = 2 * width**3 / median_seconds(jax.jit(lambda a: a @ a).lower(a).compile(), a)
  return copy, product


def main() -> None:
  folder, (copy, product) = common.workdir("bench_ops"), speeds()
  print(f"{common.device()}: copies {copy / 1e12:.2f} TB/s, bfloat16 products {product / 1e12:.0f} TFLOP/s;"
        f" {'/'.join(map(str, heads()))} query heads, key/value heads, width", flush=True)
  rows, lines = [], []
  for case in cases():
    made, least = draw(case), floor(case, copy, product)
    for implementation in served(case):
      f = build(case, implementation)
      try:
        compiled = jax.jit(lambda made, f=f: f(**made)).lower(made).compile()
        error = check(case, made, compiled(made))
      except NotImplementedError as reason:
        print(f"{case} by {implementation}: not timed: {reason}", flush=True)
        continue
      seconds = median_seconds(compiled, made)
      lines.append({"case": dataclasses.asdict(case), "implementation": implementation, "seconds": seconds,
                    "floor": least, "error": error})
      rows.append([str(case), implementation, f"{seconds * 1e3:.3f}", f"{least * 1e3:.3f}", f"{least / seconds:.0%}",
                   f"{error:.1e}"])
      print(" | ".join(rows[-1]), flush=True)
      common.write_json(folder / "results.json", {"device": common.device(), "copy": copy, "product": product,
                                                  "lines": lines})
    del made
  header = ["operation", "implementation", "ms", "floor, ms", "share of the floor", "error"]
  text = common.markdown_table(header, rows)
  print(f"\n{text}")
  (folder / "table.md").write_text(text + "\n")


if __name__ == "__main__":
  common.run(main)
