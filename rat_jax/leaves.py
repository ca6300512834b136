"""The leaves (arrays) of a parameter tree by name, and checks that they are the ones that a config asks for."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from rat_jax import transformer
from rat_jax.axes import Params
from rat_jax.config import RATPlusConfig

_PIECE = 2**22  # entries


class Spec(NamedTuple):
  """The shape and type of a tensor, which are known before the tensor is read."""

  shape: tuple[int, ...]
  dtype: str


def named_leaves(params: Params) -> dict[str, jax.Array | np.ndarray]:
  """The leaves of a parameter tree by their path, as in {"layers/query": leaf}."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@functools.cache
def shapes_of(config: RATPlusConfig) -> Mapping[str, tuple[int, ...]]:
  """The shapes of a model's leaves by name, {name: shape}, as its config says."""
  drawn = {name: jax.eval_shape(draw, jax.random.key(0)) for name, draw in transformer.initializers(config).items()}
  return types.MappingProxyType({name: leaf.shape for name, leaf in named_leaves(drawn).items()})


def check_params(params: Params, config: RATPlusConfig, same_type: bool = True) -> None:
  """Raises ValueError, as `check_leaves`, where parameters (traced ones too) do not fit the config."""
  if isinstance(params, Mapping) and params.keys() == {"params"}:
    raise ValueError("the parameters are {'params': ...}; give the tree inside, variables['params'].")
  leaves = named_leaves(params)
  for name, leaf in leaves.items():
    if not hasattr(leaf, "dtype"):
      raise ValueError(f"the parameters: {name}={leaf!r} is no array but a {type(leaf).__name__}; give arrays.")
  specs = {name: Spec(np.shape(leaf), str(leaf.dtype)) for name, leaf in leaves.items()}
  check_leaves(specs, config, "the parameters", same_type)


def check_leaves(found: Mapping[str, Spec], config: RATPlusConfig, where: str, same_type: bool = True) -> None:
  """Raises ValueError where leaves are not those of the config.

  `same_type`: and where they are not of its `param_dtype`.
  """
  shapes = shapes_of(config)
  wrong = [name for name in sorted(shapes.keys() | found.keys())
           if name not in found or name not in shapes or found[name].shape != shapes[name]]
  if wrong:
    name = wrong[0]
    raise ValueError(f"{where}: {name} is {found[name].shape if name in found else 'missing'}, the config wants"
                     f" {shapes.get(name, 'no such leaf')}; {len(wrong)} leaves differ in all.")
  for name, spec in found.items():
    if same_type and spec.dtype != config.param_dtype:
      raise ValueError(f"{where}: {name} is {spec.dtype}, the config has param_dtype={config.param_dtype!r}; cast the"
                       " leaves, or set param_dtype to what they are.")
    if "float" not in spec.dtype:
      raise ValueError(f"{where}: {name} is {spec.dtype}; parameters are floating numbers, such as float32.")


def is_finite(leaf: np.ndarray) -> bool:
  """Whether every number is finite. Looks at a piece at a time, so that no second leaf is made."""
  flat = np.ravel(leaf, order="K")
  return flat.dtype.kind not in "fV" or all(
      np.isfinite(flat[i:i + _PIECE]).all() for i in range(0, flat.size, _PIECE))
