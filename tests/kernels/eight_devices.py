"""An added implementation in a process of eight devices: on one of them, in `jax.shard_map`, and over a mesh.

Run by `test_added.py`, with an operation's name. Every call is compared with plain JAX on one device, in values and
gradients.
"""

from __future__ import annotations

import contextlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

import pallas_kernels
from conftest import GRADIENT, OPERATION, assert_close
from kernels import copies, suite
from pallas_kernels import crossovers, table
from pallas_kernels.decode.arg_specs import ArgSpec as Decode
from pallas_kernels.dilated.arg_specs import ArgSpec as Dilated
from pallas_kernels.pattern import Pattern
from pallas_kernels.scan.arg_specs import ArgSpec as Scan
from pallas_kernels.sparse.arg_specs import ArgSpec as Sparse

P = jax.P
FOLDERS = {"gated_scan": "scan", "dilated_attention": "dilated", "decode_attention": "decode",
           "sparse_attention": "sparse"}
SPECS = {
    "gated_scan": [Scan(4, 70, 2, 8, "float32", "float32", reset=True)],
    "dilated_attention": [Dilated(4, 20, 4, 2, 8, "float32", Pattern(4, 3, 2)),
                          Dilated(4, 20, 4, 2, 8, "float32", Pattern(4, 3, 2), packed=True)],
    "decode_attention": [Decode(4, 12, 4, 2, 8, "float32", own=True, layers=2),
                         Decode(4, 12, 4, 2, 8, "float32", block=4, chosen=2, apart=True)],
    "sparse_attention": [Sparse(4, 24, 4, 2, 8, "float32", block=4, chosen=2, rule=Pattern(None, 2, 1)),
                         Sparse(4, 24, 4, 2, 8, "float32", block=4, chosen=2, apart=False)],
}
# How rat_jax might cut the arguments: rows over data and fsdp, heads over tensor.
AXES = {"B": ("data", "fsdp"), "N": "tensor", "K": "tensor", "C": "tensor"}


class Call:
  """One call of an operation: its arguments, and what plain JAX makes of them on one device."""

  def __init__(self, operation, spec):
    self.case = suite.CASES[operation]
    self.arguments, self.rest = spec.draw()
    canonical, _ = self.case.canonical(self.arguments, self.rest)
    self.shapes = tuple(x.shape for x in jax.tree.leaves(canonical))
    self.weights = jax.tree.map(lambda x: np.random.default_rng(7).standard_normal(x.shape).astype(np.float32),
                                self.case.reference(*self.arguments, **self.rest))
    self.letters = self.case.operation.axes(*canonical)
    self.expected = jax.jit(self.both("xla"))(self.arguments, self.arrays)

  @property
  def arrays(self):
    """What of the rest are arrays."""
    return {name: x for name, x in self.rest.items() if isinstance(x, jax.Array)}

  def both(self, name):
    """The function from arguments and the rest's arrays to (values, gradients)."""
    still = {key: x for key, x in self.rest.items() if key not in self.arrays}

    def loss(arguments, arrays):
      values = self.case.run(*arguments, **arrays, **still, implementation=name)
      nothing = lambda x, w: jnp.sum(jnp.where(x < -1e20, 0, x) * w)
      return sum(map(nothing, jax.tree.leaves(values), jax.tree.leaves(self.weights))), values

    def f(arguments, arrays):
      gradients, values = jax.grad(loss, has_aux=True)(arguments, arrays)
      return values, gradients

    return f

  def run_eagerly(self, placed):
    """The values of the copy, outside any program."""
    still = {key: x for key, x in self.rest.items() if key not in self.arrays}
    return self.case.run(*placed[0], **placed[1], **still, implementation="copied")

  def place(self, mesh, cuts):
    """(arguments, the rest's arrays) on a mesh, cut along the letters of `cuts`."""
    spec = lambda of: P(*(cuts.get(letter) for letter in of))
    canonical, _ = self.case.canonical(self.arguments, self.rest)
    of = {id(x): letters for x, letters in zip(*map(jax.tree.leaves, (canonical, self.letters)), strict=True)}
    put = lambda x: jax.device_put(x, NamedSharding(mesh, spec(of.get(id(x), ""))))
    return jax.tree.map(put, (self.arguments, self.arrays))

  def check(self, found):
    for bound, ours, theirs in zip((OPERATION, GRADIENT), found, self.expected, strict=True):
      for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert_close(one, other, bound)


@contextlib.contextmanager
def taken(is_taken=True):
  """That the copy is taken inside, or is not; a list of the shapes that it was given."""
  jax.clear_caches()  # what was traced before would not call it again
  copies.TAKEN.clear()
  yield copies.TAKEN
  assert bool(copies.TAKEN) == is_taken


def ways():
  """The three ways to take it: named, forced, and as the fastest on this kind of device."""
  yield "copied", contextlib.nullcontext()
  yield None, pallas_kernels.force("copied")
  yield None, fastest()


@contextlib.contextmanager
def fastest(least=0):
  """A processor is said to run the copy fastest, from a size on."""
  crossovers.FASTEST["cpu"] = {operation: {"copied": least} for operation in SPECS}
  try:
    yield
  finally:
    del crossovers.FASTEST["cpu"]


def on_one_device(call):
  """Arrays on one of eight devices: the program is for that one, and nothing is cut."""
  arguments, arrays = jax.device_put((call.arguments, call.arrays), jax.devices()[3])
  for name, way in ways():
    with way, taken() as shapes:
      call.check(jax.jit(call.both(name))(arguments, arrays))
    assert shapes[-1] == call.shapes


def local_shapes(call, counts):
  """The shapes of the call's arguments with so many pieces of the axes of these letters."""
  cut = lambda shape, of: tuple(n // counts.get(letter, 1) for n, letter in zip(shape, of, strict=False))
  return tuple((*cut(shape, of), *shape[len(of):])
               for shape, of in zip(call.shapes, jax.tree.leaves(call.letters), strict=True))


def over_a_mesh(call, kind):
  """Arrays on a mesh of 2 x 2 x 2: every device has its rows and heads, in a program and outside one."""
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
  placed = call.place(mesh, AXES)
  for name, way in ways():
    with way, taken() as shapes:
      call.check(jax.jit(call.both(name))(*placed))
    assert shapes[-1] == local_shapes(call, {"B": 4, "N": 2, "K": 2, "C": 2}), shapes
  with taken() as shapes:
    call.check((call.run_eagerly(placed), call.expected[1]))
  assert shapes[-1] == local_shapes(call, {"B": 4, "N": 2, "K": 2, "C": 2})


def by_the_size_of_a_share(call):
  """The crossover is one device's: what each of eight has to do counts."""
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
  placed = call.place(mesh, AXES)
  arguments, options = call.case.canonical(call.arguments, call.rest)
  leaves, tree = jax.tree.flatten(arguments)
  shapes = local_shapes(call, {"B": 4, "N": 2, "K": 2, "C": 2})
  share = [jax.ShapeDtypeStruct(shape, jnp.result_type(x)) for shape, x in zip(shapes, leaves, strict=True)]
  size = call.case.operation.size(*jax.tree.unflatten(tree, share), **options)
  for least in (size, size + 1):
    with fastest(least), taken(least == size):
      call.check(jax.jit(call.both(None))(*placed))


def as_the_arrays_are_cut(call):
  """What the arrays say comes before what the mesh's axes are called."""
  for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 4), ("tensor", "other"), axis_types=(kind,) * 2)
    placed = call.place(mesh, {"B": "other"})
    with taken() as shapes:
      call.check((call.run_eagerly(placed), call.expected[1]))
    assert shapes[-1] == local_shapes(call, {"B": 4})


def what_does_not_divide_or_is_not_known(call):
  """Key/value heads that an axis does not divide are shared; all stays whole under a name that means nothing, where
  None takes plain JAX, which the compiler may split."""
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  placed = call.place(mesh, {"B": "data"})
  with taken() as shapes:
    call.check(jax.jit(call.both("copied"))(*placed))
  assert shapes[-1] == local_shapes(call, {"B": 2, "N": 4, "K": 2})
  mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
  placed = call.place(mesh, {})
  with taken() as shapes:
    call.check(jax.jit(call.both("copied"))(*placed))
  assert shapes[-1] == call.shapes
  with fastest(), taken(False):
    call.check(jax.jit(call.both(None))(*placed))


def inside_shard_map(call):
  """Where the user has cut the arguments, over all axes or over some of them."""
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  placed = call.place(mesh, {"B": "data"})
  spec = lambda letters: P(*("data" if letter == "B" else None for letter in letters))
  canonical, _ = call.case.canonical(call.arguments, call.rest)
  of = {id(x): spec(letters) for x, letters in zip(*map(jax.tree.leaves, (canonical, call.letters)), strict=True)}
  specs = jax.tree.map(lambda x: of.get(id(x), P()), (call.arguments, call.arrays))
  out = jax.tree.map(lambda letters, part: jax.tree.map(lambda _: spec(letters), part), call.case.operation.results,
                     call.weights)
  still = {key: x for key, x in call.rest.items() if key not in call.arrays}
  for axes, counts in (({"data", "tensor"}, {"B": 4}), ({"data"}, {"B": 4, "N": 2, "K": 2, "C": 2})):
    for name, way in ways():
      f = lambda arguments, arrays, name=name: call.case.run(*arguments, **arrays, **still, implementation=name)
      split = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, axis_names=axes, check_vma=False)
      with way, taken() as shapes:
        call.check((jax.jit(split)(*placed), call.expected[1]))
      assert shapes[-1] == local_shapes(call, counts), (shapes, counts)


def main(operation):
  assert jax.device_count() == 8
  table.IMPLEMENTATIONS[operation]["copied"] = f"kernels.copies.{FOLDERS[operation]}"
  for spec in SPECS[operation]:
    call = Call(operation, spec)
    on_one_device(call)
    for kind in (AxisType.Auto, AxisType.Explicit):
      over_a_mesh(call, kind)
    by_the_size_of_a_share(call)
    as_the_arrays_are_cut(call)
    what_does_not_divide_or_is_not_known(call)
    inside_shard_map(call)


if __name__ == "__main__":
  main(sys.argv[1])
