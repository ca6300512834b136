"""Dilated attention by the kernel that folds nothing: against a masked softmax, in Pallas' interpreter.

And what every GPU implementation is lowered to.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import BFLOAT16, OPERATION, assert_close
from gpu_interpreter import InterpretParams
from pallas_kernels import dilated_attention
from pallas_kernels.attention import reference
from pallas_kernels.dilated import mosaic_gpu_kernel
from pallas_kernels.dilated.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.pattern import Pattern


def expected(q, k, v, pattern):
  """One softmax over all keys of the pattern, and its log-sum-exp."""
  t, s = np.arange(q.shape[1])[:, None], np.arange(q.shape[1])
  return reference.attend(q, k, v, pattern.sees(t, s) & (s <= t))


@pytest.mark.parametrize(("shape", "pattern"), [  # of three blocks, some take two tiles of queries
    ((1, 200, 2, 1, 64), (16, 0, 4)),  # batch, tokens, heads, key/value heads, width; D, W, S0
    pytest.param((1, 150, 1, 1, 64), (3, 5, 4), marks=pytest.mark.slow),
    pytest.param((1, 256, 2, 1, 64), (2, 0, 4), marks=pytest.mark.slow),   # strided keys where they lie
    pytest.param((1, 512, 1, 1, 64), (4, 0, 5), marks=pytest.mark.slow),   # a strided key that is a sink
    pytest.param((2, 384, 2, 2, 128), (2, 3, 0), marks=pytest.mark.slow),
    pytest.param((1, 256, 1, 1, 64), (1, 0, 128), marks=pytest.mark.slow),  # a whole tile of sinks
    pytest.param((1, 640, 1, 1, 64), (1, 0, 9), marks=pytest.mark.slow),   # tiles without an edge between
    pytest.param((1, 640, 1, 1, 64), (50, 300, 60), marks=pytest.mark.slow),  # whole tiles in the window
    pytest.param((1, 512, 1, 1, 64), (16, 255, 4), marks=pytest.mark.slow),
    pytest.param((1, 130, 1, 1, 64), (None, 400, 4), marks=pytest.mark.slow),
    pytest.param((1, 300, 1, 1, 64), (500, 0, 0), marks=pytest.mark.slow),  # D > T
    pytest.param((1, 1, 1, 1, 64), (16, 0, 4), marks=pytest.mark.slow),
], ids=str)
def test_the_kernel_equals_a_masked_softmax(shape, pattern):
  batch, length, heads, kv_heads, width = shape
  draw = np.random.default_rng(0).standard_normal
  q, k, v = (jnp.asarray(draw((batch, length, n, width)), jnp.bfloat16) for n in (heads, kv_heads, kv_heads))
  run = jax.jit(functools.partial(mosaic_gpu_kernel.forward, pattern=Pattern(*pattern), blocks=3,
                                  interpret=InterpretParams(detect_races=True)))
  (out, lse), (wanted, wanted_lse) = run(q, k, v), expected(q, k, v, Pattern(*pattern))
  assert_close(out, wanted, BFLOAT16)
  assert_close(lse, wanted_lse, OPERATION)


# {implementation: (a kernel of its values, one of its gradients)}.
FOLDED, MASKED = "@__cudnn$fmhaSoftmaxBackward(", "@__cudnn$fmhaScaleBiasSoftmaxBackward("
KERNELS = {"mosaic_gpu": ("@mosaic_gpu_v2(", None), "cudnn": ("@__cudnn$fmhaSoftmax(", FOLDED),
           "cudnn_masked": ("@__cudnn$fmhaScaleBiasSoftmax(", MASKED)}


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("spec", [
    *(pytest.param(spec, marks=() if i == 0 else pytest.mark.slow) for i, spec in enumerate(ARG_SPECS.values())),
    ArgSpec(1, 2000, 2, 1, 64, pattern=Pattern(4, 40, 30)), ArgSpec(2, 512, 2, 1, pattern=Pattern(None, 300, 5))],
    ids=str)
@pytest.mark.usefixtures("on_h200")
def test_lowers_for_cuda(spec, implementation):
  """Values and gradients of the public function; no GPU is needed."""
  attend = functools.partial(dilated_attention, **spec.pattern._asdict(), implementation=implementation)
  loss = lambda q, k, v: jnp.sum(attend(q, k, v).astype(jnp.float32))
  forward, backward = KERNELS[implementation]
  backward = backward or (MASKED if spec.length <= 2048 else FOLDED)  # the kernel has gradients of both kinds
  for f, kernel in ((attend, forward), (jax.grad(loss, argnums=(0, 1, 2)), backward)):
    assert kernel in jax.jit(f).trace(*spec.types()).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("shape", "dtype", "message"), [
    ((1, 256, 1, 96), "bfloat16", "heads of 64 or 128, these are 96"), ((1, 256, 1, 64), "float16", "takes bfloat16"),
    ((1, 300, 1, 64), "bfloat16", "up to 128 sinks, not 129")])
def test_what_the_kernel_refuses(shape, dtype, message):
  q = jax.ShapeDtypeStruct(shape, dtype)
  assert message in mosaic_gpu_kernel.unsupported(q, q, 129)
