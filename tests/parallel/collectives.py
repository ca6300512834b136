"""What crosses devices in an update that is compiled for a TPU, counted by layer; in a process of its own.

Run by `test_collectives.py`, with the name of a case. Needs the compiler for TPUs, and no TPU.
"""

from __future__ import annotations

import collections
import math
import sys

from experiments.aot import chips, programs
from experiments.aot.hlo import Program
from rat_jax import Dense, Dilated, RATPlusConfig
from rat_jax.parallel import make_mesh

LAYERS, ROWS, LENGTH, E, F, N, H = 5, 8, 1024, 1024, 2048, 8, 128  # of so many layers a loop is compiled
CONFIG = RATPlusConfig(2048, LAYERS, E, N, mlp_dim=F, dtype="bfloat16")
MATRICES = 6 * [E * N * H] + 2 * [E * F]  # entries of a layer's: query, key, value, both gates, out; those of the MLP
# As the compiler would, but that a gather or a reduction stays in one piece, rather than in a loop of its product.
OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def sent(text, mode):
  """{(kind, times, entries of the arrays, "forward" | "backward"): how many} of an update's collectives.

  Left out are those of less than 16 KiB: norms, and numbers that are summed.
  """
  mesh = make_mesh(text, chips.devices_of("v5e:2x4"))
  work = programs.Work(CONFIG, ROWS, LENGTH, accumulation=1, remat="products", served=ROWS, modes=(mode,))
  compiled = programs.traced("train", work, mesh).program.lower().compile(OPTIONS)
  found = collections.Counter()
  for one in Program(compiled.as_text()).sent():
    if one.size >= 2**14:
      shapes = tuple(sorted(math.prod(shape) for shape in one.arrays if math.prod(shape) > 1))
      found[one.kind, one.times, shapes, "backward" if "transpose(" in one.name or not one.name else "forward"] += 1
  print(*found.items(), sep="\n")
  return found


def of_layers(found, kind, way=None):
  """{entries: how many} of the collectives of a kind that run once for every layer."""
  by_size = collections.Counter()
  for (one, times, shapes, where), count in found.items():
    if one == kind and times == LAYERS and way in (where, None):
      by_size.update({shapes: count})
  return by_size


def fsdp():
  """Each layer's parameters are gathered once forward and once backward, and nothing of the optimizer's state."""
  found = sent("fsdp:8", Dense())
  wanted = collections.Counter((size,) for size in MATRICES)
  assert of_layers(found, "all-gather", "forward") == wanted
  assert of_layers(found, "all-gather", "backward") == wanted
  gathered = [key for key in found if key[0] == "all-gather" and key[1] != LAYERS]
  assert sorted(key[2] for key in gathered) in ([(2048 * E,)], [(2048 * E,)] * 2), gathered  # the embedding, the head
  reduced = of_layers(found, "reduce-scatter") + of_layers(found, "all-reduce")
  assert sorted(size for sizes in reduced for size in sizes if size > E) == sorted(MATRICES)


def tensor():
  """Two sums of the stream forward and two backward for every layer, and nothing else of a layer but gradients."""
  found = sent("data:4,tensor:2", Dense())
  stream = (ROWS // 4 * LENGTH * E,)
  assert of_layers(found, "all-reduce", "forward") == {stream: 2}
  backward = of_layers(found, "all-reduce", "backward")
  assert backward.pop(stream) == 2
  assert sorted(size for sizes in backward for size in sizes if size > 2 * E) == sorted(n // 2 for n in MATRICES)
  assert not of_layers(found, "all-gather")
  assert not of_layers(found, "all-to-all")


def context():
  """The memory sends one gather of sums each way; Dilated(64) one each of T/64 keys and values."""
  found = sent("context:8", Dilated(64))
  sums, strided = (3 * ROWS * 8 * N * H,), (ROWS * LENGTH // 64 * N * H,)
  assert of_layers(found, "all-gather", "forward") == {sums: 1, strided: 2}
  assert of_layers(found, "all-gather", "backward") == {sums: 1, strided: 2}
  assert of_layers(found, "reduce-scatter") == {(ROWS * LENGTH // 64 // 8 * N * H,): 2}
  states = of_layers(found, "collective-permute")  # the state that entered a piece
  assert all(max(sizes) <= ROWS * N * H for sizes in states), states
  every_key = ROWS * LENGTH * N * H
  assert all(max(shapes, default=0) < every_key for _, _, shapes, _ in found), found


if __name__ == "__main__":
  {"fsdp": fsdp, "tensor": tensor, "context": context}[sys.argv[1]]()
