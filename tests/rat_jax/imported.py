"""Prints the modules that the library has imported."""

from __future__ import annotations

import sys

import pallas_kernels
import rat_jax

print(*sys.modules, rat_jax.__name__, pallas_kernels.__name__)
