"""The compiler options with which XLA makes faster and smaller programs of training and decoding on a GPU."""

from __future__ import annotations

from pallas_kernels import devices


def compiler_options() -> dict[str, str]:
  """The options for the outermost `jax.jit` around `train_step` or `decode_step`, as its `compiler_options`.

  An inner `jax.jit` cannot take options. On GPUs two passes are left out, elsewhere none:

  * Rematerialisation counts the memory of all updates of a training step, of which one runs at a time, and computes
    much of a large model again, once or more, to save what is not needed.
  * Products of one input are merged by copying their matrices side by side: in a decode step, all of a layer's
    projections, at every step.
  """
  if devices.platform_of() != "gpu":
    return {}
  return {"xla_disable_hlo_passes": "rematerialization", "xla_gpu_dot_merger_threshold_mb": "0"}
