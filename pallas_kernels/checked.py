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

from pallas_kernels.devices import Device

_PASSED: set[Path] = set()  # in this process, also where no file can be written


def has_passed(device: Device) -> bool:
  """Whether the kernels as they are have passed on this kind of device, with this release of jax."""
  path = file_of(device)
  if path not in _PASSED and path.is_file():
    _PASSED.add(path)
  return path in _PASSED


def leave(device: Device, results: dict[str, Any]) -> Path | None:
  """Says that the kernels have passed. The file, or None where it cannot be written, which a warning says."""
  path = file_of(device)
  _PASSED.add(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": device.kind, "jax": jax.__version__, "errors": results}), encoding="utf-8")
  except OSError as error:
    warnings.warn(f"{path}: {error}; the check counts for this process alone. Set RAT_JAX_CACHE to a folder that can be"
                  " written.", stacklevel=3)
    return None
  return path


def file_of(device: Device) -> Path:
  """Of a device's kind, a release of jax, and the kernels' source."""
  caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  folder = os.environ.get("RAT_JAX_CACHE") or caches / "rat_jax"
  kind = re.sub(r"\W+", "-", device.kind).strip("-")
  return Path(folder) / f"checked-{kind}-jax-{jax.__version__}-{_digest()}.json"


@functools.cache
def _digest() -> str:
  files = sorted(Path(__file__).parent.rglob("*.py"))
  return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
