"""Dilated attention folded into causal attention: values and gradients in float64, and its form for cuDNN."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import pallas_kernels
from conftest import GRADIENT, OPERATION, assert_close, examples, first_quick
from pallas_kernels.attention import softmax
from pallas_kernels.dilated import folding


def causal_mask(length, window):
  t, s = np.arange(length)[:, None], np.arange(length)
  return (s <= t) & (t - s <= (length if window is None else window))


def forward(q, k, v, window):
  assert q.shape[1] > 1  # cuDNN refuses a single token
  return softmax.attend_part(q, k, v, causal_mask(q.shape[1], window)[None, None])


def backward(q, k, v, window, out, lse, d_out):
  """The gradient by hand: weights exp(score - lse) of a softmax that has other parts too."""
  repeats, scale = q.shape[2] // k.shape[2], q.shape[3]**-0.5
  keys, values = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
  scores = jnp.einsum("btnh,bsnh->bnts", q, keys) * scale
  weights = jnp.where(causal_mask(q.shape[1], window), jnp.exp(scores - jnp.moveaxis(lse, 1, 2)[..., None]), 0)
  delta = jnp.moveaxis(jnp.sum(out * d_out, axis=-1), 1, 2)[..., None]
  d_scores = weights * (jnp.einsum("btnh,bsnh->bnts", d_out, values) - delta) * scale
  of_group = lambda x: x.reshape(*x.shape[:2], -1, repeats, x.shape[3]).sum(axis=3)
  return (jnp.einsum("bnts,bsnh->btnh", d_scores, keys), of_group(jnp.einsum("bnts,btnh->bsnh", d_scores, q)),
          of_group(jnp.einsum("bnts,btnh->bsnh", weights, d_out)))


PLAIN = types.SimpleNamespace(forward=forward, backward=backward)


def expected(q, k, v, pattern):
  """Masked softmax attention in float64."""
  repeats = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
  t, s = np.arange(q.shape[1])[:, None], np.arange(q.shape[1])
  seen = pattern.sees(t, s) & (s <= t)
  scores = jnp.where(seen, jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[3]**-0.5, -jnp.inf)
  return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)


def check(length, pattern, heads, groups, seed=0):
  rng = np.random.default_rng(seed)
  q, d_out = rng.standard_normal((2, 2, length, heads * groups, 4))
  k, v = rng.standard_normal((2, 2, length, heads, 4))

  def run(attention, dtype):
    @jax.jit
    def values_and_gradients(arrays, d):
      values, pull = jax.vjp(lambda *a: attention(*a, pattern), *arrays)
      return values, pull(d)
    return jax.tree.map(np.asarray, values_and_gradients(*jax.tree.map(lambda x: x.astype(dtype), ((q, k, v), d_out))))

  with jax.enable_x64():
    values, gradients = run(expected, np.float64)
  ours, found = run(lambda *a: folding.dilated_attention(*a, PLAIN), np.float32)
  assert_close(ours, values, OPERATION, pattern)
  for name, gradient, theirs in zip("qkv", found, gradients, strict=True):
    assert_close(gradient, theirs, GRADIENT, f"{name} {pattern}")


@pytest.mark.parametrize(("length", "pattern"), first_quick(7, [
    (23, (4, 0, 0)), (3, (4, 0, 0)), (25, (4, 5, 4)), (26, (4, 2, 9)), (21, (4, 40, 2)), (20, (None, 5, 2)),
    (17, (1, 3, 2)), (24, (4, 0, 0)), (4, (4, 0, 0)), (5, (4, 0, 0)), (25, (4, 3, 0)), (25, (4, 0, 3)),
    (21, (4, 19, 2)), (21, (4, 0, 40)), (20, (None, 0, 0)), (17, (1, 0, 0)), (30, (16, 1, 1))]))
def test_values_and_gradients_in_float64(length, pattern):
  check(length, folding.Pattern(*pattern), 2, 3)


def test_many_sinks_in_chunks_of_queries(monkeypatch):
  monkeypatch.setattr(folding, "_QUERIES", 8)
  check(21, folding.Pattern(4, 2, 9), 2, 3)


@pytest.mark.slow
@given(st.integers(1, 40), st.one_of(st.none(), st.integers(1, 9)), st.integers(0, 12), st.integers(0, 12),
       st.integers(0, 99))
@examples(4)
def test_any_pattern(length, dilation, window, sinks, seed):
  check(length, folding.Pattern(dilation, window, sinks), 1, 2, seed)


@pytest.mark.parametrize("pattern", [{"dilation": 16}, {"dilation": 64, "window": 256, "sinks": 4},
                                     {"dilation": None, "window": 1024, "sinks": 4}])
@pytest.mark.usefixtures("on_h200")
def test_what_cudnn_is_given(pattern):
  """Lowered for a GPU with none at hand: causal attention forward and backward, with an outside log-sum-exp."""
  q = jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((1, 4096, 2, 128), jnp.bfloat16)

  def loss(q, k, v):
    return jnp.sum(pallas_kernels.dilated_attention(q, k, v, implementation="cudnn", **pattern).astype(jnp.float32))

  text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
  parts = (pattern["dilation"] is not None) + ("window" in pattern)
  assert text.count("__cudnn$fmhaSoftmaxBackward") == text.count("__cudnn$fmhaSoftmax(") == parts
  if pattern["dilation"]:
    folded_queries = (4096 - pattern.get("window", 0)) // pattern["dilation"] - 1
    assert f"tensor<1x{folded_queries}x{8 * pattern['dilation']}x128xbf16>" in text


@pytest.mark.usefixtures("on_h200")
def test_short_rows_are_dense_attention_under_a_mask():
  """One kernel in each direction, and none of the mask's gradient, which cuDNN would sum up too."""
  q = jax.ShapeDtypeStruct((2, 512, 8, 64), jnp.bfloat16)
  attend = functools.partial(pallas_kernels.dilated_attention, dilation=16, sinks=4, implementation="cudnn_masked")
  loss = lambda q, k, v: jnp.sum(attend(q, k, v).astype(jnp.float32))
  text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, q, q).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("__cudnn$fmhaScaleBiasSoftmaxBackward") == text.count("__cudnn$fmhaScaleBiasSoftmax(") == 1
  (backward,) = (line for line in text.splitlines() if "fmhaScaleBiasSoftmaxBackward" in line)
  assert "512x512" not in backward.split("->")[1]
  odd = jax.ShapeDtypeStruct((1, 33, 2, 16), jnp.bfloat16)  # cuDNN takes an even length
  text = jax.jit(attend).trace(odd, odd, odd).lower(lowering_platforms=("cuda",)).as_text()
  (forward,) = (line for line in text.splitlines() if "fmhaScaleBiasSoftmax(" in line)
  assert "(tensor<1x34x2x16xbf16>" in forward


@pytest.mark.usefixtures("on_h200")
@pytest.mark.parametrize("implementation", ["cudnn", "cudnn_masked"])
def test_models_side_by_side_are_more_rows(implementation):
  """Under `jax.vmap`, whatever is mapped, along any axis."""
  attend = functools.partial(pallas_kernels.dilated_attention, dilation=16, sinks=4, implementation=implementation)
  loss = lambda q, k, v: jnp.sum(attend(q, k, v).astype(jnp.float32))
  many, one = (jax.ShapeDtypeStruct((*lead, 2, 64, 8, 64), jnp.bfloat16) for lead in ((3,), ()))
  second = jax.ShapeDtypeStruct((2, 3, 64, 8, 64), jnp.bfloat16)
  within = jax.jit(loss)  # a program within the mapped one, as a loop over layers is
  for f, arguments in ((jax.vmap(jax.grad(loss, argnums=(0, 1, 2))), (many, many, many)),
                       (jax.vmap(jax.grad(within, argnums=(0, 1, 2))), (many, many, many)),
                       (jax.vmap(attend, in_axes=(0, None, None)), (many, one, one)),
                       (jax.vmap(attend, in_axes=1), (second, second, second))):
    text = jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@__cudnn$fmha" in line]
    assert calls
    assert all("(tensor<6x" in line for line in calls)


@pytest.mark.usefixtures("on_h200")
def test_what_cudnn_does_not_take_is_said():
  q = jnp.zeros((1, 32, 2, 16))
  half, packed = q.astype(jnp.bfloat16), jnp.ones((1, 32), jnp.int32)
  wide = jnp.zeros((1, 32, 2, 256), jnp.bfloat16)
  for x, segments, reason in ((q, None, "q is float32"), (half[..., :12], None, "multiple of 8"),
                              (wide, None, "up to 128 wide, these are 256"), (half, packed, "packed rows")):
    for name in ("cudnn", "cudnn_masked", "mosaic_gpu"):  # the last has cuDNN's gradients
      with pytest.raises(NotImplementedError, match=f"'{name}' of dilated_attention takes .*{reason}"):
        pallas_kernels.dilated_attention(x, x, x, dilation=4, segment_ids=segments, implementation=name)


def test_gradients_through_the_merge_by_finite_differences():
  """Along random directions, of the parts' own log-sum-exps too: cuDNN's own gradient would miss these."""
  pattern, rng = folding.Pattern(4, 3, 5), np.random.default_rng(0)
  q, weights = rng.standard_normal((2, 2, 26, 4, 4)).astype(np.float32)
  k, v = rng.standard_normal((2, 2, 26, 2, 4)).astype(np.float32)

  @jax.jit
  def loss(q, k, v):
    return jnp.sum(folding.dilated_attention(q, k, v, pattern, PLAIN) * weights)

  gradients, step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v), 1e-2
  for i in range(3):
    ways = [np.zeros_like(x) for x in (q, k, v)]
    ways[i] = rng.standard_normal(ways[i].shape).astype(np.float32)
    ahead, behind = (loss(*(x + sign * step * way for x, way in zip((q, k, v), ways, strict=True))) for sign in (1, -1))
    np.testing.assert_allclose((ahead - behind) / (2 * step), np.vdot(gradients[i], ways[i]), rtol=2e-3, atol=2e-3)
