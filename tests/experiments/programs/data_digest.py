"""Prints a digest of needle sequences of four seeds, spread over so many devices: data_digest.py DEVICES."""

from __future__ import annotations

import hashlib
import sys

import jax
import numpy as np

from experiments.needles.seeds import over_seeds
from rat_jax.evaluate import mini_niah

rows = mini_niah.training_rows({"multikey_1": 4, "multivalue": 4}, 96)
make = jax.jit(jax.vmap(lambda seed: mini_niah.batch(rows, 96, seed, 5)), out_shardings=over_seeds())
made = make(np.arange(4))
assert len(made["tokens"].sharding.device_set) == int(sys.argv[1])
print(hashlib.sha256(b"".join(np.asarray(made[name]).tobytes() for name in sorted(made))).hexdigest())
