"""Which kinds of devices the kernels were compared on with plain JAX (`check.check_device`), by files of a cache."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import jax
from jax.extend import backend

from pallas_kernels.devices import Device

_PASSED: set[str] = set()  # in this process, also where no file can be written


def has_passed(device: Device) -> bool:
  """Whether the kernels as they are have passed on this kind of device, with this release of jax and its compiler.

  False with several processes: each has files of its own, and all must compile the same program.
  """
  if jax.process_count() > 1:
    return False
  name = _name(device)
  if name not in _PASSED:
    try:
      there = os.path.isfile(_folder() / name)
    except (OSError, RuntimeError):  # a folder that cannot be read; no home
      there = False
    if there:
      _PASSED.add(name)
  return name in _PASSED


def leave(device: Device, results: dict[str, Any]) -> Path | None:
  """Says that the kernels have passed. The file, or None where it cannot be written, which a warning says."""
  name = _name(device)
  _PASSED.add(name)
  try:
    path = _folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": device.kind, "jax": jax.__version__, "errors": results}), encoding="utf-8")
  except (OSError, RuntimeError) as error:
    warnings.warn(f"no file says that the check has passed ({error}); it counts for this process alone. Set"
                  " RAT_JAX_CACHE to a folder that can be written.", stacklevel=3)
    return None
  return path


def withdraw(device: Device) -> None:
  """Says no longer that the kernels have passed."""
  name = _name(device)
  _PASSED.discard(name)
  try:
    (_folder() / name).unlink(missing_ok=True)
  except (OSError, RuntimeError) as error:
    warnings.warn(f"the file of an earlier check stays, though this one failed: {error}", stacklevel=3)


def _folder() -> Path:
  if given := os.environ.get("RAT_JAX_CACHE"):
    return Path(given)
  return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "rat_jax"


def _name(device: Device) -> str:
  """Of a file: the device's kind, the release of jax, its compiler, and the kernels' source."""
  kind = re.sub(r"\W+", "-", device.kind).strip("-")
  return f"checked-{kind}-jax-{jax.__version__}-{_digest()}.json"


@functools.cache
def _digest() -> str:
  files = sorted(Path(__file__).parent.rglob("*.py"))
  compiler = backend.get_backend().platform_version.encode()
  return hashlib.sha256(b"".join([compiler, *(file.read_bytes() for file in files)])).hexdigest()[:12]
