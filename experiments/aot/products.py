"""Operations of the matrix products that a program asks for, counted before it is compiled."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from experiments.aot.roofline import kernel_of


def per_device(traced: Any, devices: int) -> float:
  """Operations of every device of a traced program (`jax.jit(f).trace(...)`).

  Of loops every turn counts, and of a choice the mean of its branches, as the updates of a training step take turns.
  What stands in no `jax.shard_map` is taken to be cut evenly; kernels count as `roofline` counts them. What no result
  needs is left out, as the compiler does.
  """
  jaxpr = traced.jaxpr.jaxpr
  needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(needed, devices)


def _count(jaxpr: core.Jaxpr, pieces: int) -> float:
  return sum(_of_equation(equation, pieces) for equation in jaxpr.eqns)


def _of_equation(equation: Any, pieces: int) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted) / pieces
  if name == "pallas_call":
    return kernel_of(equation, {}).products
  inner = [_count(jaxpr, 1 if name == "shard_map" else pieces) for jaxpr in _inside(params)]
  if name == "cond":
    return sum(inner) / len(inner)
  return (params["length"] if name == "scan" else 1) * sum(inner)


def _inside(params: dict[str, Any]) -> list[core.Jaxpr]:
  """The programs that an equation runs."""
  leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr)))
  return [leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf for leaf in leaves
          if isinstance(leaf, (core.Jaxpr, core.ClosedJaxpr))]
