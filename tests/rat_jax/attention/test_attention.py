"""The fast forms of attention against the mask form, in values and gradients; their memory; packed rows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import rat_jax
from conftest import GRADIENT, OPERATION, assert_close, examples, first_quick
from pallas_kernels import dilated_attention
from pallas_kernels.dilated import xla
from rat_jax import Dense, Dilated, PerHead, PerLayer, StreamingLLM, visible


def draw(batch, length, heads, kv_heads, width, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  q = rng.standard_normal((batch, length, heads, width)).astype(dtype)
  k, v = rng.standard_normal((2, batch, length, kv_heads, width)).astype(dtype)
  return q, k, v


def oracle(q, k, v, mask):
  """Attention in float64 by the textbook: mask [B, T, S], zeros where a query sees nothing."""
  q, k, v = (x.astype(np.float64) for x in (q, k, v))
  repeat = q.shape[2] // k.shape[2]
  k, v = np.repeat(k, repeat, axis=2), np.repeat(v, repeat, axis=2)
  scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
  weights = np.exp(scores - scores.max(axis=-1, keepdims=True)) * mask[:, None]
  return np.einsum("bnts,bsnh->btnh", weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300), v)


def mask_of(mode, length, batch):
  return np.broadcast_to(visible(mode, np.arange(length), np.arange(length)), (batch, length, length))


# One program per example is much quicker than one per operation.
two_part_form = jax.jit(xla.dilated_attention, static_argnums=(3, 4, 5))
operation = jax.jit(dilated_attention, static_argnames=("dilation", "window", "sinks"))
attend = jax.jit(rat_jax.attend, static_argnums=3)
patterns = st.tuples(st.one_of(st.none(), st.integers(1, 12)), st.integers(0, 20), st.integers(0, 12))


@given(patterns, st.integers(1, 45), st.sampled_from([(4, 4), (4, 2), (1, 1)]))
@examples(3)
def test_the_two_part_form_equals_the_oracle(pattern, length, heads):
  q, k, v = draw(2, length, *heads, 8)
  expected = oracle(q, k, v, mask_of(Dilated(*pattern), length, 2))
  assert_close(two_part_form(q, k, v, *pattern), expected, OPERATION)
  dilation, window, sinks = pattern
  assert_close(operation(q, k, v, dilation=dilation, window=window, sinks=sinks), expected, OPERATION)


@pytest.mark.parametrize("pattern", first_quick(1, [
    ((16, 5, 3),), ((4, 600, 1),), ((8, 0, 0),), ((None, 7, 2),), ((64, 0, 70),)]))
def test_several_chunks_give_values_and_gradients_of_the_oracle(pattern, monkeypatch):
  monkeypatch.setattr(xla, "_SCORES", 1)  # the smallest chunks
  length = 1300  # three chunks of queries, the last one filled up
  q, k, v = draw(1, length, 2, 1, 8)
  mode = Dilated(*pattern)
  mask = mask_of(mode, length, 1)
  assert_close(two_part_form(q, k, v, *pattern), oracle(q, k, v, mask), OPERATION)
  weights = draw(1, length, 2, 1, 8, seed=1)[0]

  def dense_form(q, k, v):  # in float64
    k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
    scores = jnp.where(mask[:, None], jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8), -jnp.inf)
    return jnp.sum(weights * jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v))

  ours = jax.jit(jax.grad(lambda *a: jnp.sum(weights * xla.dilated_attention(*a, *pattern)), (0, 1, 2)))(q, k, v)
  with jax.enable_x64(True):
    theirs = jax.jit(jax.grad(dense_form, (0, 1, 2)))(*(x.astype(np.float64) for x in (q, k, v)))
  for name, a, b in zip("qkv", ours, theirs, strict=True):
    assert_close(a, b, GRADIENT, f"d{name}")


@pytest.mark.parametrize(("length", "window"), first_quick(1, [(4100, 1600), (4200, 2000), (5000, 700)]))
def test_windows_of_several_blocks(length, window):
  q, k, v = draw(1, length, 1, 1, 4)
  mode = Dilated(64, window, 3)
  at = np.arange(length)[None]
  expected = rat_jax.attend(q, k, v, mode, q_positions=at)  # which takes the mask form
  assert_close(two_part_form(q, k, v, 64, window, 3), expected, OPERATION)


@pytest.mark.parametrize("pattern", first_quick(1, [((16, 32, 4),), ((16, 0, 0),)]))
@pytest.mark.parametrize("gradient", [False, True], ids=["values", "gradients"])
def test_memory_grows_with_the_length_and_not_its_square(pattern, gradient):
  def run(q, k, v):
    return dilated_attention(q, k, v, dilation=pattern[0], window=pattern[1], sinks=pattern[2])

  program = jax.grad(lambda *a: jnp.sum(run(*a)), (0, 1, 2)) if gradient else run
  size = {}
  for length in (8192, 16384, 32768):
    shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
    size[length] = jax.jit(program).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes
  assert size[16384] < 2.2 * size[8192]
  assert size[32768] < 2.2 * size[16384]
  assert size[32768] < 32768**2  # a quarter of one float32 score matrix


@given(patterns, st.lists(st.integers(0, 3), min_size=1, max_size=40))
@examples(4)
def test_packed_rows(pattern, ids):
  q, k, v = draw(1, len(ids), 2, 2, 8)
  dilation, window, sinks = pattern
  segment_ids = np.array([ids])
  out = np.asarray(operation(q, k, v, dilation=dilation, window=window, sinks=sinks, segment_ids=segment_ids))
  np.testing.assert_array_equal(attend(q, k, v, Dilated(*pattern), segment_ids=segment_ids), out)
  # Documents by a plain walk: a run of equal ids, padding neither belongs to it nor ends it.
  documents, last = [], 0
  for i, segment in enumerate(ids):
    if segment:
      if segment != last:
        documents.append([])
      documents[-1].append(i)
      last = segment
  for at in documents:
    alone = oracle(q[:, at], k[:, at], v[:, at], mask_of(Dilated(*pattern), len(at), 1))
    assert_close(out[:, at], alone, OPERATION)
  padding = [i for i, segment in enumerate(ids) if not segment]
  np.testing.assert_array_equal(out[:, padding], 0)


@pytest.mark.parametrize("mode", [Dense(), Dilated(4, 2, 1), StreamingLLM(3, 1)], ids=str)
def test_attend_with_lengths_and_positions(mode):
  q, k, v = draw(3, 12, 4, 2, 8)
  lengths = np.array([12, 7, 0])
  step = np.asarray(attend(q[:, :1], k, v, mode, lengths=lengths))
  for b, n in enumerate(lengths):
    mask = np.zeros((1, 1, 12), bool)
    if n:
      mask[0, 0, :n] = visible(mode, np.array([n - 1]), np.arange(n))
    assert_close(step[b:b + 1], oracle(q[b:b + 1, :1], k[b:b + 1], v[b:b + 1], mask), OPERATION)
  at = np.array([[3, 11], [-1, 6], [0, 0]])
  chosen = np.asarray(attend(q[:, :2], k, v, mode, q_positions=at))
  mask = np.asarray(visible(mode, at, np.broadcast_to(np.arange(12), (3, 12))))
  assert_close(chosen, oracle(q[:, :2], k, v, mask), OPERATION)
  np.testing.assert_array_equal(chosen[1, 0], 0)
  whole = jax.jit(functools.partial(rat_jax.attend, mode=PerLayer((Dense(), mode)), layer=1))(q, k, v)
  assert_close(whole, oracle(q, k, v, mask_of(mode, 12, 3)), OPERATION)


@pytest.mark.slow
def test_rows_that_see_nothing_have_finite_gradients():
  q, k, v = draw(1, 6, 2, 2, 8)
  lengths = np.array([0])

  def total(q, k, v):
    return jnp.sum(rat_jax.attend(q, k, v, Dilated(4), lengths=lengths) ** 2)

  for gradient in jax.grad(total, (0, 1, 2))(q, k, v):
    np.testing.assert_array_equal(gradient, 0)


def test_padding_of_packed_rows_may_hold_anything():
  q, k, v = draw(1, 12, 2, 1, 8)
  ids = np.array([[1] * 4 + [2] * 5 + [0] * 3])
  clean = dilated_attention(q, k, v, dilation=4, sinks=1, segment_ids=ids)
  k, v = (np.where((ids > 0)[:, :, None, None], x, np.nan).astype(np.float32) for x in (k, v))
  np.testing.assert_array_equal(dilated_attention(q, k, v, dilation=4, sinks=1, segment_ids=ids), clean)


@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("document", first_quick(1, [1, 2]))
@pytest.mark.parametrize("mode", [Dense(), Dilated(4, window=2, sinks=1), PerHead((Dense(), Dilated(3)))])
def test_what_is_not_finite_stays_in_its_document(mode, document, name, spoilt):
  """Values and gradients of the other document are those without it; of its own, only queries that see it have NaN."""
  arrays = dict(zip("qkv", draw(1, 24, 2, 2, 8), strict=True))
  ids = np.array([[1] * 10 + [2] * 12 + [0] * 2])
  at = {1: 3, 2: 14}[document]
  bad = arrays | {name: arrays[name].copy()}
  bad[name][0, at, :, 2] = spoilt

  def total(arrays):  # of squares, so that what is not finite goes back, too
    return jnp.sum(attend_packed(arrays) ** 2)

  attend_packed = lambda arrays: rat_jax.attend(*arrays.values(), mode, segment_ids=ids)
  other = ids[0] == 3 - document
  clean, out = attend_packed(arrays), np.asarray(attend_packed(bad))
  np.testing.assert_array_equal(out[:, other], clean[:, other])
  seen = np.asarray(visible(mode, np.arange(24), np.arange(24))) | np.zeros((2, 1, 1), bool)  # [K, T, S]
  first = 0 if document == 1 else 10
  sees = np.zeros((24, 2), bool)
  own = np.flatnonzero(ids[0] == document)
  sees[own] = seen[:, own - first, at - first].T
  if name == "q":
    sees = np.arange(24)[:, None] == np.array([at, at])
  np.testing.assert_array_equal(np.isnan(out[0]).any(-1), sees)
  expected, found = jax.grad(total)(arrays), jax.grad(total)(bad)
  for one in "qkv":
    np.testing.assert_array_equal(found[one][:, other], expected[one][:, other])


def test_rows_after_the_last_key_may_hold_anything():
  q, k, v = draw(2, 9, 2, 1, 8)
  lengths = np.array([4, 9])
  clean = rat_jax.attend(q[:, :1], k, v, Dilated(3), lengths=lengths)
  k[0, 4:], v[0, 4:] = np.nan, np.inf
  np.testing.assert_array_equal(rat_jax.attend(q[:, :1], k, v, Dilated(3), lengths=lengths), clean)


def test_long_dense_sequences_take_the_chunked_form():
  q, k, v = draw(1, 1500, 1, 1, 8)
  assert_close(rat_jax.attend(q, k, v, Dense()), oracle(q, k, v, mask_of(Dense(), 1500, 1)), OPERATION)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (dict(dilation=0), ValueError, "dilation=0; use an integer from 1"),
    (dict(dilation=4.5), ValueError, "dilation=4.5; use an integer"),
    (dict(dilation=2**30 + 1), ValueError, r"dilation=1073741825; use .* from 1 \(dense\) to 1073741824, or None"),
    (dict(dilation=True), ValueError, "dilation=True; use an integer"),
    (dict(dilation=2, window=True), ValueError, "window=True; use an integer"),
    (dict(dilation=2, sinks=False), ValueError, "sinks=False; use an integer"),
    (dict(dilation=2, sinks=2**31), ValueError, "sinks=2147483648; use an integer from 0 to"),
    (dict(dilation=2, window=-1), ValueError, "window=-1"),
    (dict(dilation=2, sinks=-1), ValueError, "sinks=-1"),
    (dict(dilation=2, implementation="quick"), ValueError, "'quick' is unknown"),
    (dict(dilation=2, segment_ids=np.zeros((1, 3), int)), ValueError, r"segment_ids is int32 \(1, 3\); give integers"),
    (dict(dilation=2, segment_ids=np.ones((1, 4))), ValueError, r"segment_ids is float32 \(1, 4\); give integers"),
    (dict(dilation=2, segment_ids=np.ones((1, 4), bool)), ValueError, r"is bool \(1, 4\); .* \[B, T\] = \(1, 4\)"),
])
def test_bad_arguments(arguments, error, message):
  q, k, v = draw(1, 4, 2, 1, 8)
  with pytest.raises(error, match=message):
    dilated_attention(q, k, v, **arguments)


@pytest.mark.parametrize("mode", [Dilated(4), Dilated(4, 2, 1)], ids=str)
def test_a_forward_gradient_is_refused_in_words(mode):
  q, k, v = draw(1, 8, 2, 1, 8)
  for call in (functools.partial(rat_jax.attend, mode=mode),
               functools.partial(dilated_attention, dilation=4, window=mode.window, sinks=mode.sinks)):
    with pytest.raises(NotImplementedError, match=r"no forward-mode gradient .*; take a reverse one: jax.grad"):
      jax.jvp(lambda q, call=call: call(q, k, v), (q,), (q,))


def test_bad_shapes():
  q, k, v = draw(1, 4, 3, 2, 8)
  for call in (functools.partial(dilated_attention, dilation=2), functools.partial(rat_jax.attend, mode=Dense())):
    with pytest.raises(ValueError, match="multiple of"):
      call(q, k, v)
  for arguments, message in ((dict(k=k[0], v=v[0]), "give q"), (dict(q_positions=np.zeros((1, 3), int)), "q_positions"),
                             (dict(mode=PerLayer((Dense(),)), layer=1), r"layer=1; .* 0\.\.0"),
                             (dict(mode="dense"), "is no mode"), (dict(lengths=[5]), r"use 0\.\.4"),
                             (dict(k=k[:, :3], v=v[:, :3]), "q has 4 queries and k 3 keys"),
                             (dict(k=k.astype(jnp.bfloat16)), "have types float32, bfloat16, float32"),
                             (dict(mode=Dilated(2), k=k.astype(jnp.int32)), "give one floating type"),
                             (dict(q=jnp.zeros((1, 1, 2, 8), jnp.int32), k=jnp.zeros_like(k, jnp.int32),
                                   v=jnp.zeros_like(v, jnp.int32)), "have types int32, int32, int32")):
    with pytest.raises(ValueError, match=message):
      rat_jax.attend(**(dict(q=q[:, :, :2], k=k, v=v, mode=Dense()) | arguments))
  with pytest.raises(ValueError, match="B, T and H must be the same"):
    dilated_attention(q[:, :3, :2], k, v, dilation=2)
  with pytest.raises(ValueError, match="every axis must have at least one entry"):
    dilated_attention(q[:, :0, :2], k[:, :0], v[:, :0], dilation=2)
  with pytest.raises(ValueError, match="q, k, v are float32, float32, bfloat16; give them one"):
    dilated_attention(q[:, :, :2], k, v.astype(jnp.bfloat16), dilation=2)
