"""The cost model of docs/scaling.md: what an update sends over each axis of a mesh, from sizes alone.

Written down before anything is compiled; `experiments.aot_compile` counts the same in compiled programs.
"""

from __future__ import annotations

import dataclasses
import math

import jax

from experiments.aot.chips import CHIPS, Chip
from experiments.shared import output
from rat_jax import Dense, Dilated, RATPlusConfig, transformer
from rat_jax.costs import training_flops

ROWS, LENGTH, DILATION = 768, 4096, 64
# By the number of chips: the mesh.
MESHES = {8: {"fsdp": 8}, 64: {"fsdp": 64}, 256: {"data": 4, "fsdp": 64},
          4096: {"data": 4, "fsdp": 64, "tensor": 4, "context": 4}}
_WORD, _STATE = 2, 4  # bytes of bfloat16, of float32


@dataclasses.dataclass(frozen=True)
class Update:
  """What an update takes on a device: the mean of one under Dilated(64) and one under Dense.

  Attributes:
    tokens: of a device's rows, which the devices of its `tensor` group share.
    products: seconds of matrix products at the chip's peak, without what is computed twice.
    sent: bytes over each axis; links: seconds of them.
  """

  tokens: float
  products: float
  sent: dict[str, float]
  links: dict[str, float]


def update(config: RATPlusConfig, chip: Chip, mesh: dict[str, int], rows: int = ROWS, length: int = LENGTH) -> Update:
  """The cost of an update of `rows` of `length` tokens."""
  size = {axis: mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor", "context")}
  others = {axis: (n - 1) / n for axis, n in size.items()}  # the share of a gathered array that others have
  own_rows = rows / (size["data"] * size["fsdp"])
  tokens = own_rows * length / size["context"]
  weights = _WORD * matrices(config) / size["tensor"]
  keys = _WORD * config.num_kv_heads * config.head_dim / size["tensor"]
  stream = config.num_layers * tokens * config.embed_dim
  sums = 3 * _STATE * config.num_kv_heads * config.head_dim / size["tensor"] * size["context"]
  mean_keys = length * (1 / DILATION + 1) / 2
  sent = {
      # Matrices forward, matrices backward, gradients.
      "fsdp": 3 * weights * others["fsdp"],
      # A gradient that is reduced is sent twice: to who sums it, and from there.
      "data": 2 * weights / size["fsdp"] * others["data"],
      # The stream twice forward in float32, and its gradient twice backward in bfloat16.
      "tensor": 2 * stream * (2 * _STATE + 2 * _WORD) * others["tensor"],
      # Sums of the memory each way; keys and values forward, again, and their gradients; gradients of matrices.
      "context": others["context"] * (config.num_layers * own_rows * (2 * sums + 3 * 2 * keys * mean_keys)
                                      + 2 * weights / size["fsdp"]),
  }
  flops = sum(training_flops(config, mode, length) for mode in (Dilated(DILATION), Dense())) / 2
  links = {axis: n / ((4 if size[axis] > 16 else 2) * chip.link) for axis, n in sent.items()}
  return Update(tokens, flops * tokens / size["tensor"] / chip.products, sent, links)


def matrices(config: RATPlusConfig) -> int:
  """Entries of the matrices of all layers."""
  layers = jax.eval_shape(transformer.initializers(config)["layers"], jax.random.key(0))
  return sum(math.prod(leaf.shape) for name, leaf in layers.items() if not name.endswith(("_norm", "_bias")))


def table() -> str:
  """The 7B model on v5p, for the meshes above."""
  config, chip, rows = RATPlusConfig.preset("ratplus-7b"), CHIPS["v5p"], []
  for chips, mesh in MESHES.items():
    found = update(config, chip, mesh)
    cells = [f"{found.sent[axis] / 1e9:.1f} GB, {1e3 * found.links[axis]:.0f} ms" if found.sent[axis] else ""
             for axis in ("fsdp", "data", "tensor", "context")]
    rows.append([str(chips), f"`{','.join(f'{axis}:{n}' for axis, n in mesh.items())}`", f"{found.tokens:,.0f}",
                 f"{1e3 * found.products:,.0f} ms", *cells, f"{sum(found.links.values()) / found.products:.0%}"])
  return output.markdown_table(["chips", "mesh", "tokens", "products", "fsdp", "data", "tensor", "context",
                                "links / products"], rows)
