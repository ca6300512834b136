"""How fast a device copies, reads and multiplies, and what a call spends its time on: the kernels that a device ran, by
the trace of JAX's profiler.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.aot.chips import chip_of_device
from experiments.shared import command, device, output

_MOST = 16  # kernels of a table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(command.Settings):
  """Of every command that times on a device."""

  profile: bool


def define_flags() -> None:
  flags.DEFINE_bool("profile", False, "Print which kernels the time of every measurement goes to.")


class Speeds(NamedTuple):
  """What a device does, measured or as its maker says.

  Bytes per second of a copy (both ways counted) and of reading alone, operations per second of a bfloat16 product.
  """

  copy: float
  read: float
  product: float

  @property
  def reads(self) -> float:
    """The speed of what reads and hardly writes: the faster of the two, which a floor must not be below."""
    return max(self.copy, self.read)

  def __str__(self) -> str:
    return (f"copies {self.copy / 1e12:.2f} TB/s, reads {self.read / 1e12:.2f} TB/s, bfloat16 products"
            f" {self.product / 1e12:.0f} TFLOP/s")


class Work(NamedTuple):
  """What an operation cannot do without."""

  bytes: float  # to and from memory
  flops: float  # of matrix products


def speeds() -> Speeds:
  """Of a TPU what its maker says, else those of the first device.

  A read is the fastest of several: which program reads fastest depends on the device.
  """
  if chip := chip_of_device(jax.devices()[0]):
    bandwidth = chip.bandwidth / chip.devices
    return Speeds(bandwidth, bandwidth, chip.products / chip.devices)
  is_gpu = jax.default_backend() == "gpu"
  size, width = (1 << 30, 8192) if is_gpu else (1 << 25, 512)

  def seconds(f, *arguments):
    return median_seconds(jax.jit(f).lower(*arguments).compile(), *arguments)

  x = jnp.ones((size // 8192, 4096), jnp.bfloat16)
  copy = 2 * x.nbytes / seconds(lambda x: x + 1, x)
  reads = [seconds(lambda x: jnp.sum(x, axis=1, dtype=jnp.float32), x),
           seconds(lambda x, few: x @ few, x, jnp.ones((4096, 8), jnp.bfloat16))]
  del x
  reads.append(seconds(lambda x: jnp.max(x, axis=1), jnp.ones((size // 16384, 4096), jnp.int32)))
  a = jnp.ones((width, width), jnp.bfloat16)
  return Speeds(copy, size / min(reads), 2 * width**3 / seconds(lambda a: a @ a, a))


def median_seconds(compiled: Any, *arguments: Any, rounds: int = 7) -> float:
  """The median over rounds of a call; short ones are called several times a round, long ones have few rounds."""

  def seconds(calls):
    start = time.perf_counter()
    for _ in range(calls):
      out = compiled(*arguments)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls

  once = min(seconds(1), seconds(1))
  rounds = rounds if once < 1 else min(rounds, 3)
  return float(np.median([seconds(max(1, int(0.02 / once))) for _ in range(rounds)]))


def report(run: Callable[[], Any], calls: int = 1) -> None:
  """Prints, for --profile, the kernels of one `run`, which makes so many calls; times are of a call."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(run())
    seconds = kernels(next(Path(folder).rglob("*.xplane.pb")))
  if seconds:
    print(f"\n{table(seconds, calls)}\n", flush=True)
  else:
    print(f"no kernels: the profiler names none on {device.name()}", flush=True)


def kernels(trace: Path) -> dict[str, list[float]]:
  """The seconds of every run of every kernel in a trace; numbers at the end of a name, which tell copies apart, go."""
  found = collections.defaultdict(list)
  for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
    for line in plane.lines if plane.name.startswith("/device:") else ():
      if (line.name or "").startswith(("Stream", "XLA Ops")):  # of a GPU, of a TPU
        for event in line.events:
          found[re.sub(r"[._]\d+$", "", event.name)].append(event.duration_ns / 1e9)
  return found


def table(seconds: dict[str, list[float]], calls: int) -> str:
  """The kernels that took longest, and a line for the others; of one of so many calls."""
  longest = sorted(seconds.items(), key=lambda item: -sum(item[1]))
  rest = [one for _, of_kernel in longest[_MOST:] for one in of_kernel]
  rows = [*longest[:_MOST], *([(f"{len(longest) - _MOST} others", rest)] if rest else []),
          ("all", [one for of_kernel in seconds.values() for one in of_kernel])]
  return output.markdown_table(["kernel", "runs", "ms"], [
      [name[:80], f"{len(times) / calls:g}", f"{1e3 * sum(times) / calls:.3f}"] for name, times in rows])
