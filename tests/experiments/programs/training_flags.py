"""What the scripts that train say of their flags, with those of `experiments.retrofit`."""

from __future__ import annotations

import contextlib
import io

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from experiments import common, retrofit, training
from rat_jax import RATPlusConfig
from rat_jax.convert.added_memory import memory_leaves

flags.FLAGS(["retrofit", "--learning_rate=1e-3", "--warmup=0.1"])

said = io.StringIO()
with pytest.raises(SystemExit), contextlib.redirect_stderr(said):
  common.guarded(lambda: jnp.zeros(2**55, jnp.int8).block_until_ready(), ["retrofit"])
told, _, why = said.getvalue().partition(" RESOURCE_EXHAUSTED: ")
assert told == ("error: the memory of CPU did not suffice; raise --accumulation, or lower --batch_size, or lower"
                " --length."), said.getvalue()
assert why.count("\n") == 1, why

before, after = (float(training.optimizer_of(steps).schedule(np.int32(80))) for steps in (100, 400))
assert (f"{before:.3g}", f"{after:.3g}") == ("0.000118", "0.00097"), (before, after)
assert training.rate_change(80, 100, 400) == (
    "--steps=400 where the run had 100: the learning rate of the next batch is 0.00097, it would have been 0.000118")

added = {"layers": dict(memory_leaves(RATPlusConfig(31, 2, 16, 2, gate_bias=-12.0)))}
assert not retrofit.is_trained(added)
gates = np.array(added["layers"]["memory_gate"])
gates[1, -1] = 1e-9
assert retrofit.is_trained(added | {"layers": added["layers"] | {"memory_gate": gates}})
