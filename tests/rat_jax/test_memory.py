"""The recurrence: its parallel, sequential and one-step forms, against float64 and against each other."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax.test_util import check_grads

import rat_jax
from conftest import GRADIENT, OPERATION, assert_close, examples
from pallas_kernels import gated_scan
from pallas_kernels.scan import reference

memory = jax.jit(rat_jax.memory)


def draw(batch, length, seed=0):
  rng = np.random.default_rng(seed)
  logits = 3 * rng.standard_normal((batch, length, 2, 4))
  k, v = rng.standard_normal((2, batch, length, 2, 4))
  state = tuple(rng.standard_normal((2, batch, 2, 4)).astype(np.float32))
  return logits.astype(np.float32), k.astype(np.float32), v.astype(np.float32), state


def oracle(logits, x, state, ids):
  """The memory of one row by a loop in float64; padding (id 0) leaves the state as it is."""
  gate = 1 / (1 + np.exp(-logits.astype(np.float64)))
  state, document, out = state.astype(np.float64), None, np.zeros(x.shape)
  for t, segment in enumerate(ids):
    if segment:
      if document is not None and segment != document:
        state = np.zeros_like(state)
      document = segment
      state = gate[t] * state + (1 - gate[t]) * x[t]
    out[t] = state
  return out, state


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 99))
@examples(10)
def test_documents_and_padding(ids, seed):
  logits, k, v, state = draw(1, len(ids), seed)
  k_mem, v_mem, last = memory(logits, k, v, state, segment_ids=np.array([ids]))
  real = np.array(ids) > 0
  for ours, end, x, start in ((k_mem, last[0], k, state[0]), (v_mem, last[1], v, state[1])):
    expected, final = oracle(logits[0], x[0], start[0], ids)
    np.testing.assert_allclose(ours[0, real], expected[real], rtol=0, atol=OPERATION * 4)
    np.testing.assert_allclose(end[0], final, rtol=0, atol=OPERATION * 4)


@given(st.integers(1, 40), st.integers(1, 13))
@examples(8)
def test_chunks_of_any_size_go_on_where_the_last_one_ended(length, chunk):
  logits, k, v, _ = draw(2, length)
  whole = memory(logits, k, v)
  pieces, state = [], None
  for start in range(0, length, chunk):
    at = slice(start, start + chunk)
    k_mem, v_mem, state = memory(logits[:, at], k[:, at], v[:, at], state)
    pieces.append((k_mem, v_mem))
  for i in range(2):
    assert_close(np.concatenate([piece[i] for piece in pieces], axis=1), whole[i], OPERATION)
    assert_close(state[i], whole[2][i], OPERATION)


@pytest.mark.parametrize("with_reset", [False, True])
def test_parallel_and_sequential_forms_and_their_gradients(with_reset):
  logits, k, v, state = draw(2, 37)
  reset = np.random.default_rng(5).random((2, 37)) < 0.2 if with_reset else None
  weights = draw(2, 37, seed=9)[1:3]

  def total(scan):
    def run(logits, inputs, state):
      outputs, last = scan(logits, inputs, state, reset)
      return sum(jnp.sum(w * y) for w, y in zip(weights, outputs, strict=True)) + sum(
          jnp.sum(jnp.sin(h)) for h in last), (outputs, last)
    return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(logits, (k, v), state)

  (ours, theirs) = total(gated_scan), total(reference.gated_scan)
  jax.tree.map(lambda a, b: assert_close(a, b, OPERATION), ours[0][1], theirs[0][1])
  jax.tree.map(lambda a, b: assert_close(a, b, GRADIENT), ours[1], theirs[1])


def test_gradients_by_finite_differences():
  logits, k, v, state = draw(1, 9)
  reset = np.array([[False] * 5 + [True] + [False] * 3])

  def total(logits, k, v, state):
    outputs, last = gated_scan(logits, (k, v), state, reset)
    return sum(jnp.sum(jnp.sin(y)) for y in (*outputs, *last))

  check_grads(total, (logits, k, v, state), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_bfloat16_outside_is_float32_inside():
  logits, k, v, _ = draw(1, 300)
  logits = logits + 8.0  # gates near 1: a gate rounded to bfloat16 would write nothing
  narrow = [jnp.asarray(x, jnp.bfloat16) for x in (logits, k, v)]
  (out, _), (last, _) = gated_scan(narrow[0], tuple(narrow[1:]))
  assert out.dtype == jnp.bfloat16
  assert last.dtype == jnp.float32
  exact, _, state = rat_jax.memory(*(x.astype(jnp.float32) for x in narrow))
  assert_close(last, state[0], OPERATION)
  assert_close(out, exact, 2**-8)


def test_what_is_not_finite_stays_in_its_document():
  logits, k, v, _ = draw(1, 12)
  k[0, 3] = np.nan
  ids = np.array([[1] * 6 + [2] * 6])
  k_mem, _, _ = rat_jax.memory(logits, k, v, segment_ids=ids)
  clean, _, _ = rat_jax.memory(logits[:, 6:], k[:, 6:], v[:, 6:])
  assert_close(k_mem[:, 6:], clean, OPERATION)


def test_lists_are_arrays():
  logits, k, v, _ = draw(1, 5)
  reset = [[False, False, True, False, False]]
  ours = gated_scan(logits, [k, v], [np.zeros((1, 2, 4)).tolist()] * 2, reset)
  chex.assert_trees_all_equal(ours, gated_scan(logits, (k, v), reset=np.array(reset)))


@pytest.mark.parametrize(("change", "message"), [
    (dict(inputs=()), "at least one input"),
    (dict(inputs=(np.zeros((1, 3, 2, 4), np.float32),)), r"inputs\[0\] has shape"),
    (dict(inputs=(np.zeros((1, 5, 2, 4), np.int32),)), r"inputs\[0\] is int32; use float32 or bfloat16\."),
    (dict(gate_logits=np.zeros((1, 5, 2, 4), bool)), r"gate_logits is bool; use float32 or bfloat16\."),
    (dict(inputs=(np.zeros((1, 5, 2, 4), np.float16),)), r"inputs\[0\] is float16; use float32 or bfloat16\."),
    (dict(state=(np.zeros((1, 2, 4), complex),)), r"state\[0\] is complex64; use float32 or bfloat16\."),
    (dict(state=(np.zeros((1, 2, 4), np.int32),)), r"state\[0\] is int32; use float32 or bfloat16\."),
    (dict(state=(np.zeros((1, 2, 4)),) * 2), "state has shapes"),
    (dict(state=(0.0,)), r"state has shapes \[\(\)\]; give one array of shape \(1, 2, 4\)"),
    (dict(state=0.0), "state is a float; give a tuple of arrays"),
    (dict(inputs=np.zeros((1, 5, 2, 4), np.float32)), "inputs is a ndarray; give a tuple of arrays"),
    (dict(reset=np.zeros((1, 4), bool)), r"reset is bool \(1, 4\); give bool \[B, T\] = \(1, 5\)"),
    (dict(reset=[[0.0, 0.5, 0.0, 1.0, 0.0]]), r"reset is float32 \(1, 5\); give bool"),
    (dict(implementation="fast"), "'fast' is unknown"),
])
def test_bad_arguments(change, message):
  x = np.zeros((1, 5, 2, 4), np.float32)
  with pytest.raises(ValueError, match=message):
    gated_scan(**{"gate_logits": x, "inputs": (x,), **change})
  with pytest.raises(ValueError, match=r"segment_ids has shape \(1, 4\)"):
    rat_jax.memory(x, x, x, segment_ids=np.zeros((1, 4), int))
  with pytest.raises(ValueError, match="gate_logits, k, v have shapes"):
    rat_jax.memory(x, x[:, :, :1], x)
  with pytest.raises(NotImplementedError, match="does not exist for gated_scan; it has"
                                                r" \('xla', 'mosaic_gpu', 'pallas_tpu'\)"):
    gated_scan(x, (x,), implementation="cudnn")


def test_the_memory_takes_floats_alone():
  x, ids = np.ones((1, 3, 1, 2), np.float32), np.array([[1, 1, 2]])
  for name in ("gate_logits", "k", "v"):
    for dtype in (np.int32, bool, np.complex64):
      with pytest.raises(ValueError, match=rf"^{name} is {np.dtype(dtype)}; use float32 or bfloat16\.$"):
        rat_jax.memory(**{"gate_logits": x, "k": x, "v": x, name: x.astype(dtype)}, segment_ids=ids)
  with pytest.raises(ValueError, match=r"^state\[1\] is int32; use float32 or bfloat16\.$"):
    rat_jax.memory(x, x, x, (x[:, 0], np.zeros((1, 1, 2), np.int32)))


@pytest.mark.parametrize("wide", [False, True])
def test_float64_is_taken_as_float32(wide):
  x = np.random.default_rng(0).normal(size=(1, 3, 1, 2))
  narrow, state = x.astype(np.float32), (x[:, 0].astype(np.float32),) * 2
  expected = rat_jax.memory(narrow, narrow, narrow, state)
  with jax.enable_x64(wide):
    found = rat_jax.memory(x, x, x, (x[:, 0],) * 2)
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)
