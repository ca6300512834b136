"""Prints the size, the updates, the memory and the sets of modes of every arm of sft_niah."""

from __future__ import annotations

import sys

import jax
import numpy as np
from absl import flags

from experiments import sft_niah
from rat_jax import RATPlusLM

flags.FLAGS(sys.argv)
for arm in sft_niah.STEPS_OF:
  model = RATPlusLM(sft_niah.configuration(arm))
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8), np.int32))
  size = sum(x.size for x in jax.tree.leaves(shapes))
  sets = sft_niah.mode_sets(arm)
  updates = sft_niah.STEPS_OF[arm] * len(sets[0])
  print(size, updates, model.config.memory, *("+".join(map(str, modes)) for modes in sets))
