"""What every implementation of every operation must do: `test_suite.py` and `test_gpu.py` run these checks.

An implementation is compared with the operation's reference in float64, values and gradients, on arguments that an
ArgSpec describes. On a device that does not have it, or for arguments that it does not serve, it must say so.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from conftest import BFLOAT16, GRADIENT, OPERATION, WORST
from pallas_kernels import devices, implementation, pattern
from pallas_kernels.attention.softmax import NOTHING
from pallas_kernels.decode import api as decode_api, arg_specs as decode_specs, reference as decode_reference
from pallas_kernels.dilated import api as dilated_api, arg_specs as dilated_specs, reference as dilated_reference
from pallas_kernels.drawn import normal
from pallas_kernels.scan import api as scan_api, arg_specs as scan_specs, reference as scan_reference
from pallas_kernels.sparse import api as sparse_api, arg_specs as sparse_specs, reference as sparse_reference

VALUES = {"float32": OPERATION, "bfloat16": BFLOAT16}
GRADIENTS = {"float32": GRADIENT, "bfloat16": BFLOAT16}


@dataclasses.dataclass(frozen=True)
class Case:
  """An operation as the checks see it: a function of what has gradients, by position, and of the rest, by name.

  Attributes:
    operation: what the table calls it, and how its arguments are cut.
    run: the public function in that form; `reference` likewise.
    poison: of arguments that an ArgSpec drew, the same with NaN in what must not matter; and what of the results it
      must not matter to.
    canonical: of such arguments, (the operation's arguments, its options), as its implementations take them.
    small: the ArgSpecs of the suite.
  """

  operation: implementation.Operation
  run: Callable[..., Any]
  reference: Callable[..., Any]
  poison: Callable[..., tuple[tuple, Callable[[Any], Any]]]
  canonical: Callable[..., tuple[tuple, dict[str, Any]]]
  small: dict[str, Any]


# Of every operation, what of its arguments must not matter.


def poison_scan(arguments, rest):
  """NaN in the state of the first row and in its tokens before the last but one, at which it is reset."""
  logits, inputs, state = arguments
  at = max(logits.shape[1] - 2, 0)
  reset = jnp.zeros(logits.shape[:2], bool) if rest["reset"] is None else rest["reset"]
  rest["reset"] = reset.at[0, at].set(True)
  bad = tuple(x.at[0, :at].set(jnp.nan) for x in inputs), tuple(h.at[0].set(jnp.nan) for h in state)
  keep = lambda results: (tuple(x[0, at:] for x in results[0]), tuple(x[1:] for x in results[0]), results[1])
  return (logits, *bad), keep


def poison_dilated(arguments, rest):
  """NaN in the padding of packed rows, and in queries' tokens after which no real one comes."""
  if rest["segment_ids"] is None:
    return arguments, lambda results: results
  real = (rest["segment_ids"] != 0)[:, :, None, None]
  return tuple(jnp.where(real, x, jnp.nan) for x in arguments), lambda results: results


def poison_decode(arguments, rest):
  """NaN in rows that no head sees, and in other layers."""
  q, keys, values, own = arguments
  seen = rest["visible"]
  if rest["blocks"] is not None:
    seen = decode_reference.rows_of_blocks(seen, rest["blocks"], keys.shape[-2])
    seen = seen.reshape(q.shape[0], keys.shape[-3], -1, keys.shape[-2]).any(axis=2)
  seen = (seen[:, None] if seen.ndim == 2 else seen)[..., None]
  if rest["layer"] is not None:
    of_layer = jnp.arange(keys.shape[0]) == rest["layer"]
    seen = of_layer.reshape(-1, 1, 1, 1, 1) & seen
  return (q, *(jnp.where(seen, x, jnp.nan) for x in (keys, values)), own), lambda results: results


def canonical_dilated(arguments, rest):
  names = ("dilation", "window", "sinks")
  return (*arguments, rest["segment_ids"]), {"pattern": pattern.Pattern(*(rest[name] for name in names))}


def canonical_decode(arguments, rest):
  q, keys, values, own = arguments
  return (q, keys, values, rest["visible"], rest["layer"], own, rest["blocks"]), {}


def poison_sparse(arguments, rest):
  """NaN in the keys and values that no query of a head reads."""
  q, k, v = arguments
  at = rest["q_positions"]
  at = jnp.arange(k.shape[1])[None, -q.shape[1]:] if at is None else at
  t, s = at[:, :, None, None], jnp.arange(k.shape[1])
  seen = jnp.any((rest["blocks"][..., None] == s // rest["block"]) & rest["valid"][..., None], axis=3)
  seen = seen if rest["rule"] is None else seen | rest["rule"].sees(t, s)
  read = jnp.any(seen & (s <= t), axis=1)  # [B, K or N, S]
  read = jnp.any(read.reshape(k.shape[0], k.shape[2], -1, k.shape[1]), axis=2)
  bad = (jnp.where(jnp.swapaxes(read, 1, 2)[..., None], x, jnp.nan) for x in (k, v))
  return (q, *bad), lambda results: results


def canonical_sparse(arguments, rest):
  q, k, v = arguments
  at = jnp.zeros(q.shape[:2], jnp.int32) if rest["q_positions"] is None else rest["q_positions"]
  return (q, k, v, rest["blocks"], rest["valid"], at), {"block": rest["block"], "rule": rest["rule"]}


def with_own(f):
  """Decode attention in the form of `Case.run`."""
  return lambda q, keys, values, own, visible, **rest: f(q, keys, values, visible, own=own, **rest)


CASES = {
    "gated_scan": Case(scan_api.OPERATION, pallas_kernels.gated_scan, scan_reference.gated_scan, poison_scan,
                       lambda arguments, rest: ((*arguments, rest["reset"]), {}), scan_specs.SMALL),
    "dilated_attention": Case(
        dilated_api.OPERATION, pallas_kernels.dilated_attention, dilated_reference.dilated_attention, poison_dilated,
        canonical_dilated, dilated_specs.SMALL),
    "decode_attention": Case(
        decode_api.OPERATION, with_own(pallas_kernels.decode_attention), with_own(decode_reference.decode_attention),
        poison_decode, canonical_decode, decode_specs.SMALL),
    "sparse_attention": Case(
        sparse_api.OPERATION, pallas_kernels.sparse_attention, sparse_reference.sparse_attention, poison_sparse,
        canonical_sparse, sparse_specs.SMALL),
}


# The checks.


def in_float64(f, arguments, cotangents=None):
  """(values, gradients) of f in float64, by the processor; without cotangents no gradients."""
  wide = lambda x: jnp.asarray(np.asarray(x, np.float64)) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x
  with jax.enable_x64(), jax.default_device(jax.devices("cpu")[0]):
    arguments, cotangents = jax.tree.map(wide, (arguments, cotangents))
    if cotangents is None:
      return jax.tree.map(np.asarray, jax.jit(f)(*arguments)), None
    values, pull = jax.vjp(jax.jit(f), *arguments)
    return jax.tree.map(np.asarray, (values, pull(cotangents)))


def compare(ours, theirs, bound, *of):
  """Notes and bounds the largest error, as a share of the largest entry of the other; log-sum-exps of nothing apart."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  chex.assert_equal_shape([ours, theirs])
  nothing = theirs == NOTHING
  np.testing.assert_array_equal(ours <= NOTHING / 2, nothing)
  ours, theirs = np.where(nothing, 0, ours), np.where(nothing, 0, theirs)
  assert np.isfinite(ours).all(), of
  error = float(np.abs(ours - theirs).max(initial=0) / max(np.abs(theirs).max(initial=0), 1e-30))
  WORST[of] = max(error, WORST.get(of, 0.0))
  assert error <= bound, (of, error)


def compare_results(case, ours, theirs, dtype, *of):
  """`compare` of all results; log-sum-exps are sums in float32 whatever the type of the arguments."""
  letters = jax.tree.map(lambda axes, part: jax.tree.map(lambda _: axes, part), case.operation.results, theirs)
  for axes, one, other in zip(*map(jax.tree.leaves, (letters, ours, theirs)), strict=True):
    if axes.endswith("N"):
      compare(one, other, OPERATION, *of, "log-sum-exp")
    else:
      compare(one, other, VALUES[dtype], *of, "values")


def reason(operation, name, spec):
  """Why an implementation cannot be named here for arguments of a spec, as the error says it, or None."""
  case, one = CASES[operation], implementation.load(operation, name)
  arguments, options = case.canonical(*spec.draw())
  found = [one.runs_on.unsupported(devices.device_of()), one.unsupported(*arguments, **options)]
  return ", and ".join(filter(None, found)) or None


def check_refusal(operation, name, spec):
  """That an implementation which cannot serve says why; returns whether it cannot."""
  why = reason(operation, name, spec)
  if why is not None:
    case = CASES[operation]
    arguments, rest = spec.draw()
    with pytest.raises(NotImplementedError, match=re.escape(f"implementation={name!r} of {operation} {why}. Pass")):
      case.run(*arguments, **rest, implementation=name)
  return why is not None


def values_and_gradients(f, arguments, seed=1):
  """(values, gradients of random cotangents, these cotangents) of a function, compiled."""
  rng = np.random.default_rng(seed)
  values, pull = jax.jit(functools.partial(jax.vjp, f))(*arguments)
  empty = lambda x: x == NOTHING if x.dtype == jnp.float32 else False  # a log-sum-exp of nothing has no gradient
  cotangents = jax.tree.map(lambda x: jnp.where(empty(x), 0, normal(rng, x.shape, x.dtype)), values)
  return values, jax.jit(lambda pull, d: pull(d))(pull, cotangents), cotangents


def check_numbers(operation, name, spec, seed=0):
  """Values and gradients against the reference in float64; values without a gradient, too: another kernel may run."""
  case, of = CASES[operation], (operation, name, spec.dtype)
  arguments, rest = spec.draw(seed)
  f = functools.partial(case.run, **rest, implementation=name)
  values, gradients, cotangents = values_and_gradients(f, arguments)
  expected, expected_gradients = in_float64(functools.partial(case.reference, **rest), arguments, cotangents)
  for ours in (values, jax.jit(f)(*arguments)):
    compare_results(case, ours, expected, spec.dtype, *of)
  for one, other, x in zip(*map(jax.tree.leaves, (gradients, expected_gradients, arguments)), strict=True):
    assert one.dtype == x.dtype
    if np.abs(other).max() > 1e-9:  # else there is nothing for an error to be a share of: a softmax over one key
      compare(one, other, GRADIENTS[spec.dtype], *of, "gradients")


def check_poison(operation, name, spec, seed=0):
  """Values beside NaN in what must not matter, against the reference without it."""
  case = CASES[operation]
  arguments, rest = spec.draw(seed)
  bad, keep = case.poison(arguments, rest)
  f = functools.partial(case.run, **rest, implementation=name)
  results = keep(jax.jit(f)(*bad))
  expected = keep(in_float64(functools.partial(case.reference, **rest), arguments)[0])
  for one, other in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
    compare(one, other, VALUES[spec.dtype], operation, name, spec.dtype, "values beside NaN")
