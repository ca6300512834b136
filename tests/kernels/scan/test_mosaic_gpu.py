"""The Hopper kernel of `gated_scan`, in the interpreter for GPU kernels, and that it compiles as far as CUDA."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import BFLOAT16, GRADIENT, OPERATION, assert_close
from gpu_interpreter import InterpretParams
from pallas_kernels import gated_scan
from pallas_kernels.scan.arg_specs import ARG_SPECS
from pallas_kernels.scan.mosaic_gpu import MosaicGPU, default_tuning, unsupported
from pallas_kernels.scan.mosaic_gpu_shapes import Tuning
from pallas_kernels.scan.passes import differentiable
from pallas_kernels.scan.xla import XLA

INTERPRET = InterpretParams(detect_races=True)
SMALL = Tuning(channels=32, steps=4, stages=2, workers=2)  # tiles of 32 tokens


def kernel(tuning):
  return MosaicGPU(tuning, tuning, INTERPRET)


def draw(shape, dtype, reset=False, inputs=2, seed=0):
  """Logits with infinities of both signs, inputs, state, reset."""
  rng = np.random.default_rng(seed)
  logits = 3 * rng.standard_normal(shape)
  logits = np.where(rng.random(shape) < 0.03, np.inf, np.where(rng.random(shape) < 0.03, -np.inf, logits))
  x = tuple(jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(inputs))
  state = tuple(jnp.asarray(rng.standard_normal(shape[:1] + shape[2:]), jnp.float32) for _ in range(inputs))
  return jnp.asarray(logits, dtype), x, state, rng.random(shape[:2]) < 0.08 if reset else None


def oracle(logits, x, state, reset):
  """The recurrence by a loop in float64."""
  with np.errstate(over="ignore"):
    decay = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    write = 1 / (1 + np.exp(np.asarray(logits, np.float64)))
  x, h, out = np.asarray(x, np.float64), np.asarray(state, np.float64), []
  for t in range(x.shape[1]):
    if reset is not None:
      h = np.where(np.reshape(reset[:, t], (-1,) + (1,) * (h.ndim - 1)), 0, h)
    h = decay[:, t] * h + write[:, t] * x[:, t]
    out.append(h)
  return np.stack(out, axis=1), h


CASES = {
    "blocks of channels": ((1, 33, 2, 32), "bfloat16", SMALL, dict(reset=True)),
    "channels that fill no block, segments": ((1, 100, 5, 4), "float32",
                                              Tuning(steps=4, stages=2, workers=2, segments=2),
                                              dict(reset=True, inputs=1)),
    "wide blocks, one worker": ((1, 70, 128), "bfloat16", Tuning(channels=128, steps=16, stages=2, workers=1), {}),
    "three workers": ((1, 100, 64), "float32", Tuning(channels=64, steps=8, stages=3, workers=3),
                                 dict(inputs=1)),
    "one token": ((1, 1, 32), "float32", SMALL, {}),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case == "one token" else pytest.mark.slow)
                                  for case in CASES])
def test_numbers_and_gradients(case):
  shape, dtype, tuning, how = CASES[case]
  logits, inputs, state, reset = draw(shape, dtype, **how)
  weights = draw(shape, dtype, inputs=len(inputs), seed=1)[1:3]

  @functools.partial(jax.jit, static_argnums=0)
  def run(backend, logits, inputs, state, weights):
    results, pull = jax.vjp(lambda *a: differentiable(backend, *a, reset), logits, inputs, state)
    return results, pull(weights)

  results, cotangents = run(kernel(tuning), logits, inputs, state, weights)
  _, expected = run(XLA(), logits, inputs, state, weights)
  for x, first, y, last in zip(inputs, state, *results, strict=True):
    states, end = oracle(logits, x, first, reset)
    assert (y.dtype, last.dtype) == (x.dtype, jnp.float32)
    assert_close(y, states, OPERATION if dtype == "float32" else 2**-8, case)
    assert_close(last, end, OPERATION, case)
  for ours, theirs in zip(jax.tree.leaves(cotangents), jax.tree.leaves(expected), strict=True):
    assert ours.dtype == theirs.dtype
    assert_close(ours, theirs, GRADIENT if dtype == "float32" else BFLOAT16, case)


@pytest.mark.slow
def test_what_is_not_finite_stays_in_its_row_and_its_document():
  logits, (x, _), (first, _), _ = draw((2, 64, 32), "float32")
  reset = np.zeros((2, 64), bool)
  reset[0, 40] = True
  x, first = x.at[0, 3].set(jnp.nan), first.at[0].set(jnp.inf)
  with np.errstate(invalid="ignore"):
    expected = oracle(logits, x, first, reset)[0]
  results, pull = jax.vjp(lambda *a: differentiable(kernel(SMALL), *a, reset), logits, (x,), (first,))
  assert_close(results[0][0][1], expected[1], OPERATION)
  assert_close(results[0][0][0, 40:], expected[0, 40:], OPERATION)
  d_logits, (d_x,), _ = pull(jax.tree.map(jnp.ones_like, results))
  for d in (d_logits, d_x):
    assert np.isfinite(d[1]).all()
    assert np.isfinite(d[0, 40:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("backend", [XLA(), kernel(SMALL)], ids=["xla", "mosaic_gpu"])
def test_a_state_that_a_reset_drops_has_no_gradient(backend):
  """Exactly, whatever the cotangents of what comes after; the other row has its own."""
  logits, (x, _), (first, _), _ = draw((2, 33, 32), "float32")
  reset = np.zeros((2, 33), bool)
  reset[0, 0] = True
  _, pull = jax.vjp(lambda h: differentiable(backend, logits, (x,), (h,), reset), first)
  (d_state,) = pull(((jnp.ones_like(x).at[0].set(jnp.nan),), (jnp.ones_like(first).at[0].set(jnp.nan),)))
  decays = np.cumprod(1 / (1 + np.exp(-np.asarray(logits[1], np.float64))), axis=0)
  np.testing.assert_array_equal(d_state[0], 0)
  assert_close(d_state[1], decays.sum(axis=0) + decays[-1], GRADIENT)


def lower(spec, backward):
  """Lowers `gated_scan`, or its gradient, of a real shape for CUDA; no GPU is needed."""
  logits, inputs, state, reset = spec.types()

  def forward(logits, inputs, state, reset):
    return gated_scan(logits, inputs, state, reset, implementation="mosaic_gpu")

  def gradient(logits, inputs, state, reset, d):
    return jax.vjp(lambda *a: forward(*a, reset), logits, inputs, state)[1](d)

  arguments = (logits, inputs, state, reset, (inputs, state)) if backward else (logits, inputs, state, reset)
  traced = jax.jit(gradient if backward else forward).trace(*arguments)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.usefixtures("on_h200")
def test_lowers_for_cuda_at_the_target_shape(backward):
  text = lower(ARG_SPECS["prefill_256k"], backward)
  assert text.count("@mosaic_gpu_v2") == 1 + backward  # one pass each way: 128 blocks, no segments


@pytest.mark.slow
@pytest.mark.parametrize("name", ARG_SPECS)
@pytest.mark.usefixtures("on_h200")
def test_lowers_for_cuda_at_every_named_shape(name):
  for backward in (False, True):
    assert "@mosaic_gpu_v2" in lower(ARG_SPECS[name], backward)


def test_default_tuning():
  def tuning(name, backward=False):
    logits, inputs, _, _ = ARG_SPECS[name].types()
    reads = (logits, *inputs, *inputs, *inputs) if backward else (logits, *inputs)
    return default_tuning(logits, reads, (logits, *inputs) if backward else inputs, 2)

  assert tuning("prefill_256k") == Tuning(channels=32, steps=16, stages=4, workers=2)
  assert tuning("prefill_256k", backward=True).steps == 8
  assert tuning("prefill_64k_float32").steps == 8
  assert tuning("few_channels").segments == 8
  many = jax.ShapeDtypeStruct((1, 4096, 128), jnp.float32)
  with pytest.raises(NotImplementedError, match="do not fit the shared memory"):
    default_tuning(many, (many,) * 30, (many,) * 10, 10)
  assert "does not fit 10 inputs" in unsupported(many, (many,) * 10)


@pytest.mark.parametrize(("change", "message"), [
    (dict(channels=48), "32, 64 or 128 channels"),
    (dict(stages=3), "stages=3 is no multiple of workers=2"),
    (dict(steps=2), "at least 32 tokens"),
    (dict(segments=0), "at least one segment"),
])
def test_bad_tuning(change, message):
  with pytest.raises(ValueError, match=message):
    Tuning(**change)


def test_tuning_that_does_not_fit():
  logits, inputs, state, _ = draw((1, 512, 32), "float32")
  with pytest.raises(NotImplementedError, match=r"gated_scan with Tuning.* bytes of shared memory"):
    kernel(Tuning(steps=64)).forward(logits, inputs, state, None)
