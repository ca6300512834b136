"""Compares every kernel with plain JAX on the device that is here: `rat_jax.check_device()`."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import checked, devices
from pallas_kernels.attention.softmax import NOTHING
from pallas_kernels.crossovers import FASTEST
from pallas_kernels.decode.api import decode_attention
from pallas_kernels.decode.arg_specs import ArgSpec as Decode
from pallas_kernels.dilated.api import dilated_attention
from pallas_kernels.dilated.arg_specs import ArgSpec as Dilated
from pallas_kernels.implementation import is_forced, load
from pallas_kernels.pattern import Pattern
from pallas_kernels.scan.api import gated_scan
from pallas_kernels.scan.arg_specs import ArgSpec as Scan
from pallas_kernels.sparse.api import sparse_attention
from pallas_kernels.sparse.arg_specs import ArgSpec as Sparse
from pallas_kernels.split import CONTEXT
from pallas_kernels.table import IMPLEMENTATIONS

BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}  # on `DeviceCheck.errors`

# Float32 and bfloat16 of every operation: lengths that fill no block, several blocks of queries and of keys, chunks
# that are seen whole, grouped heads, windows of several blocks, and blocks that heads chose for themselves.
SPECS: dict[str, tuple[Any, ...]] = {
    "gated_scan": (Scan(2, 700, 2, 128, "float32", "float32", reset=True), Scan(1, 1500, 16, 128)),
    "gated_scan over context": (Scan(2, 700, 2, 128, "float32", "float32", reset=True), Scan(1, 700, 2, 128)),
    "dilated_attention": (Dilated(1, 5000, 2, 2, 128, "float32", Pattern(16, 600, 4)),
                          Dilated(1, 5000, 2, 1, 128, pattern=Pattern(1)),
                          Dilated(2, 1300, 4, 2, 128, pattern=Pattern(8, 0, 4))),
    "decode_attention": (Decode(3, 1500, 4, 2, 128, "float32", own=True),
                         Decode(3, 1024, 8, 4, 128, "float32", block=64, chosen=5, apart=True, own=True),
                         Decode(3, 1024, 8, 4, 128, block=64, chosen=5)),
    "sparse_attention": (Sparse(1, 1100, 4, 2, 128, "float32", block=64, chosen=3, rule=Pattern(None, 20, 4)),
                         Sparse(1, 1300, 4, 2, 128, block=64, chosen=4))}


@dataclasses.dataclass(frozen=True)
class DeviceCheck:
  """What `check_device` found.

  Attributes:
    device: its kind.
    errors: {(operation, implementation, type): the largest error of results and gradients against plain JAX}; infinite
      for what failed. Of an array it is the larger of two shares: the largest difference of the largest entry, and the
      differences' root mean square of the array's.
    reasons: likewise, why an implementation was not compared, or failed.
    seconds: that it took.
    file: that says that the check has passed; None where it has not, or where no file could be written.
  """

  device: str
  errors: dict[tuple[str, str, str], float]
  reasons: dict[tuple[str, str, str], str]
  seconds: float
  file: Path | None

  @property
  def passed(self) -> bool:
    return bool(self.errors) and all(error <= BOUNDS[dtype] for (*_, dtype), error in self.errors.items())

  def __str__(self) -> str:
    lines = [f"{' '.join(name)}: {error:.1e} of {BOUNDS[name[2]]:.0e}" for name, error in self.errors.items()]
    lines += [f"{' '.join(name)}: {why}" for name, why in self.reasons.items()]
    verdict = "passed" if self.passed else "FAILED" if self.errors else "no kernel runs here, nothing was compared"
    if self.errors and not self.passed:
      verdict += (': take pallas_kernels.force("xla")' if self.device in FASTEST else ": plain JAX is taken")
    where = f"; {self.file}" if self.file else ""
    return "\n".join([*lines, f"{self.device}: {verdict} in {self.seconds:.0f} s{where}"])


def check_device() -> DeviceCheck:
  """Compares every kernel that runs on this device with plain JAX: results and gradients, at a few shapes of each.

  If all agree, a file says so for this kind of device, this release of jax and of its compiler, and these kernels: in
  $RAT_JAX_CACHE, else in the user's folder for caches. From then on `implementation=None` takes kernels whose place is
  predicted and not measured (`crossovers.PREDICTED`), in programs that are compiled afterwards; without the file it
  takes plain JAX. If one does not agree, the file goes. Programs of several processes take no predicted kernel.

  Returns:
    What was found; `print` shows it.

  Raises:
    ValueError: inside `pallas_kernels.force`, where every implementation is the same.
  """
  if is_forced():
    raise ValueError("check_device inside pallas_kernels.force would compare an implementation with itself; call it"
                     " outside.")
  begun, device = time.perf_counter(), devices.device_of()
  errors: dict[tuple[str, str, str], float] = {}
  reasons: dict[tuple[str, str, str], str] = {}
  for operation_as, specs in SPECS.items():
    operation = operation_as.partition(" ")[0]
    names = [name for name in IMPLEMENTATIONS[operation] if name != "xla" and _runs(operation, name, device)]
    for spec in specs if names else ():
      arguments, rest = spec.draw()
      f = functools.partial(_RUNS[operation_as], **rest)
      expected = _values_and_gradients(f, arguments, "xla")
      for name in names:
        key = (operation_as, name, spec.dtype)
        try:
          error = _error(_values_and_gradients(f, arguments, name), expected)
        except NotImplementedError as why:
          reasons[key] = f"not compared: {str(why).partition('. Pass')[0]}"
        except Exception as why:  # such as the compiler's: the others are still worth knowing
          errors[key], reasons[key] = float("inf"), f"failed: {type(why).__name__}: {str(why)[:300]}"
        else:
          errors[key] = max(error, errors.get(key, 0.0))
  found = DeviceCheck(device.kind, errors, reasons, time.perf_counter() - begun, None)
  if not found.passed:
    checked.withdraw(device)
    return found
  file = checked.leave(device, {" ".join(name): error for name, error in errors.items()})
  return dataclasses.replace(found, file=file)


def _of_decode(q: Any, keys: Any, values: Any, own: Any, visible: Any, **rest: Any) -> Any:
  return decode_attention(q, keys, values, visible, own=own, **rest)


def _scan_over_context(gate_logits: Any, inputs: Any, state: Any, *, reset: Any, implementation: str) -> Any:
  """As several devices run it that have pieces of a sequence, of a single piece."""
  run = load("gated_scan", implementation).over_context
  assert run is not None
  mesh = jax.make_mesh((1,), (CONTEXT,), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
  return jax.shard_map(run, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)(
      gate_logits, inputs, state, reset)


_RUNS: dict[str, Callable[..., Any]] = {
    "gated_scan": gated_scan, "gated_scan over context": _scan_over_context,
    "dilated_attention": dilated_attention,
    "decode_attention": _of_decode, "sparse_attention": sparse_attention}


def _runs(operation: str, name: str, device: devices.Device) -> bool:
  try:
    return load(operation, name).runs_on.unsupported(device) is None
  except ImportError:
    return False


def _values_and_gradients(f: Callable[..., Any], arguments: tuple[Any, ...], name: str) -> list[np.ndarray]:
  """The results, and the gradients of their product with one fixed number for each entry."""

  def both(arguments: tuple[Any, ...]) -> Any:
    values, pull = jax.vjp(lambda *given: f(*given, implementation=name), *arguments)
    return values, pull(jax.tree.map(_fixed, values))

  with jax.default_matmul_precision("highest"):  # a TPU would round float32 in plain JAX's products
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(jax.jit(both)(arguments))]


def _fixed(x: jax.Array) -> jax.Array:
  """A cotangent; the log-sum-exp of nothing has none."""
  numbers = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
  return jnp.where(x == NOTHING, 0, numbers).astype(x.dtype)


def _error(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
  """As `DeviceCheck.errors`; infinite where a number is not finite, or is nothing in one of the two alone."""
  errors = [0.0]
  for one, other in zip(ours, theirs, strict=True):
    empty = other <= NOTHING / 2  # a log-sum-exp of nothing
    if not np.isfinite(one).all() or not np.isfinite(other).all() or (empty != (one <= NOTHING / 2)).any():
      return float("inf")
    one, other = np.where(empty, 0, one), np.where(empty, 0, other)
    away = np.abs(one - other)
    for share, whole in ((away.max(initial=0), np.abs(other).max(initial=0)),
                         (np.sqrt(np.mean(away**2)), np.sqrt(np.mean(other**2)))):
      if share > 0:
        errors.append(float(share / whole) if whole > 0 else float("inf"))
  return max(errors)
