"""What a call spends its time on: the kernels that a device ran, by the trace of JAX's profiler."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments import common

PROFILE = flags.DEFINE_bool("profile", False, "Print which kernels the time of every measurement goes to.")
_MOST = 16  # kernels of a table


def report(run: Callable[[], Any], calls: int = 1) -> None:
  """Prints, where --profile asks for it, the kernels of one `run`, which makes so many calls; times are of a call."""
  if not PROFILE.value:
    return
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(run())
    seconds = kernels(next(Path(folder).rglob("*.xplane.pb")))
  if seconds:
    print(f"\n{table(seconds, calls)}\n", flush=True)
  else:
    print(f"no kernels: the profiler names none on {common.device()}", flush=True)


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
  return common.markdown_table(["kernel", "runs", "ms"], [
      [name[:80], f"{len(times) / calls:g}", f"{1e3 * sum(times) / calls:.3f}"] for name, times in rows])
