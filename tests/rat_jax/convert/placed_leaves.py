"""Loads OLMO2 and a folder of our own, sharded over four devices: placed_leaves.py OLMO2 SAVED."""

from __future__ import annotations

import sys
import weakref

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rat_jax

olmo2, saved = sys.argv[1:]
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
alive = []


def place(name, leaf):
  assert not any(one() is not None for one in alive), f"a leaf before {name} is still held"
  alive.append(weakref.ref(leaf))
  split = PartitionSpec(*("fsdp" if size % 4 == 0 and axis == leaf.ndim - 1 else None
                          for axis, size in enumerate(leaf.shape)))
  return jax.block_until_ready(jax.device_put(np.array(leaf), NamedSharding(mesh, split)))


def compare(load, source):
  alive.clear()
  config, placed = load(source, place=place)
  _, plain = load(source)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), placed, plain)
  query = placed["layers"]["query"]
  assert query.addressable_shards[0].data.size * 4 == query.size
  return config, plain


rat_jax.save_pretrained(saved, *compare(rat_jax.convert.load_olmo2, olmo2))
compare(rat_jax.load_pretrained, saved)
