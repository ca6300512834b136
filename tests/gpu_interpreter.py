"""The parameters of Pallas' interpreter of GPU kernels, the only private name of jax in this repository.

jax exports them from 0.12 on. The releases before have them under a private path, of which the oldest and the newest
one are known; the public form is the export, so a newer jax is all that is needed where the path is another.
"""

from __future__ import annotations

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

if hasattr(plgpu, "InterpretGPUParams"):
  InterpretParams = plgpu.InterpretGPUParams
else:
  try:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as InterpretParams  # noqa: F401
  except ImportError as error:
    raise ImportError(f"jax {jax.__version__} keeps the interpreter of GPU kernels elsewhere; install jax 0.10.2, or"
                      " 0.12 or newer, which exports it.") from error
