"""What a Pallas kernel for TPUs copies and computes, counted from its grid, its index maps and its own program.

A block is copied when its index changes from one step of the grid to the next. A kernel's program is run on its
scalars alone: what `pl.when` and loops say of a step is followed, arrays are only counted. Where a kernel reads a
number of a table, it is one that a case gives, else larger than any other: nothing is skipped that a table might skip.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.aot.chips import Chip

STEP = 0.35e-6  # seconds that a step of a grid takes beside its work (jax's guide to Pallas on TPUs)
_TURNS = 64     # of a loop that are followed one by one; of a longer one all are taken for its first
_SCALARS: Mapping[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "rem": np.fmod, "max": np.maximum, "min": np.minimum,
    "and": np.bitwise_and, "or": np.bitwise_or, "not": np.logical_not, "eq": np.equal, "ne": np.not_equal,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "neg": np.negative,
    "div": lambda a, b: np.trunc(a / b).astype(np.int64),
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "select_n": lambda which, *cases: np.where(which, cases[-1], cases[0])}
_FREE = {"broadcast_in_dim", "reshape", "squeeze", "get", "swap", "slice", "concatenate", "transpose", "iota",
         "convert_element_type", "program_id", "num_programs", "multiple_of", "dma_wait"}
_OF_STEP = object()  # a number that depends on the step of the grid, and is not known


@dataclasses.dataclass
class Work:
  """Of a kernel: operations of products, numbers that other operations make, bytes that it copies by itself."""

  products: float = 0.0
  elements: float = 0.0
  copied: float = 0.0

  def add(self, other: Work, times: float = 1.0) -> None:
    self.products += times * other.products
    self.elements += times * other.elements
    self.copied += times * other.copied


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel of a program.

  Attributes:
    steps: of its grid.
    moved: bytes between HBM and VMEM.
    products, elements: operations of matrix products; numbers that other operations make.
    vmem: bytes of its blocks and its scratch, without what the compiler keeps of a step.
    parallel: steps that may run at once, of which the cores of a device take one each.
  """

  name: str
  steps: int
  moved: float
  products: float
  elements: float
  vmem: float
  parallel: int

  def seconds(self, chip: Chip) -> dict[str, float]:
    """What its parts take alone, at a chip's figures; "steps" is what they take beside their work."""
    cores = min(self.parallel, chip.cores)
    idle = chip.cores / cores
    return {"products": self.products / chip.products * chip.devices * idle,
            "memory": self.moved / chip.bandwidth * chip.devices, "vectors": self.elements / chip.vector * idle,
            "steps": self.steps * STEP / cores}


def predicted(kernels: Sequence[Kernel], chip: Chip) -> float:
  """Seconds of kernels one after another: of each its longest part, and its steps."""
  total = 0.0
  for kernel in kernels:
    parts = kernel.seconds(chip)
    total += parts.pop("steps") + max(parts.values())
  return total


@dataclasses.dataclass(frozen=True)
class Data:
  """What a kernel's work is counted for, where it depends on data.

  Attributes:
    table: what is read where a kernel reads a number of a table.
    holds: the share of cases in which a condition on arrays holds; None: always what is more work.
  """

  table: int = 2**30
  holds: float | None = None


def kernels_of(f: Callable[..., Any], *arguments: Any, data: Mapping[str, Data] | None = None) -> list[Kernel]:
  """The kernels that a function of arrays, or their types, calls; those in loops once for each turn.

  `data` is by a kernel's name.
  """
  return kernels_in(jax.make_jaxpr(f)(*arguments).jaxpr, data)


def kernels_in(jaxpr: Any, data: Mapping[str, Data] | None = None) -> list[Kernel]:
  """`kernels_of` a program that was traced."""
  calls = list(_calls(jaxpr))
  found: dict[int, Kernel] = {}
  for eqn in calls:
    if id(eqn) not in found:
      found[id(eqn)] = kernel_of(eqn, data or {})
  return [found[id(eqn)] for eqn in calls]


def _calls(jaxpr: Any) -> Iterator[Any]:
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "pallas_call":
      yield eqn
    else:
      turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
      inside = [one for param in eqn.params.values() for one in _jaxprs(param)]
      yield from (one for _ in range(turns) for of in inside for one in _calls(of))


def _jaxprs(param: Any) -> Iterator[Any]:
  for one in param if isinstance(param, (tuple, list)) else (param,):
    one = getattr(one, "jaxpr", one)
    if hasattr(one, "eqns"):
      yield one


def kernel_of(eqn: Any, data_of: Mapping[str, Data]) -> Kernel:
  """Of an equation `pallas_call`."""
  mapping, body = eqn.params["grid_mapping"], eqn.params["jaxpr"]
  name = str(eqn.params.get("name") or getattr(eqn.params.get("name_and_src_info"), "name", "kernel"))
  grid, data = tuple(mapping.grid), data_of.get(name, Data())
  points = np.indices(grid).reshape(len(grid), -1)
  moved = vmem = 0.0
  for block in mapping.block_mappings:
    indices = _Run(dict(enumerate(points)), grid, data).index(block.index_map_jaxpr, points)
    of_block, in_vmem = _moved(block, indices)
    moved, vmem = moved + of_block, vmem + in_vmem
  work = _over_grid(body, grid, data)
  scratch = sum(math.prod(one.shape) * one.dtype.itemsize for one in mapping.scratch_avals
                if "sem" not in str(one.dtype))
  parallel = math.prod(n for n, kind in zip(grid, _semantics(eqn.params["compiler_params"]), strict=False)
                       if "parallel" in str(kind).lower())
  return Kernel(name, points.shape[1], moved + work.copied, work.products, work.elements, vmem + scratch, parallel)


def _semantics(params: Any) -> Sequence[Any]:
  """Of the axes of a grid, as the kernel says; jax 0.12 says it otherwise."""
  params = params.get("mosaic_tpu", params) if isinstance(params, Mapping) else params
  found: Sequence[Any] = getattr(params, "dimension_semantics", None) or ()
  return found


def _moved(block: Any, indices: np.ndarray) -> tuple[float, float]:
  """(bytes copied, bytes in VMEM) of a block that the pipeline copies, at [axes, steps]; 0 of what stays in HBM."""
  aval = getattr(block, "array_aval", None) or block.array_shape_dtype
  if "any" in str(getattr(block.transformed_block_aval, "memory_space", "")).lower():
    return 0.0, 0.0
  sizes = np.minimum([getattr(one, "block_size", 1) for one in block.block_shape], aval.shape)
  changes = np.append(True, (indices[:, 1:] != indices[:, :-1]).any(axis=0))
  # Of a block at an array's end what is beyond it is not copied.
  left = np.array(aval.shape)[:, None] - indices[:, changes] * sizes[:, None]
  inside = np.where(left > 0, np.minimum(sizes[:, None], left), sizes[:, None])  # a number of a table may be too large
  itemsize, buffers = aval.dtype.itemsize, getattr(block.pipeline_mode, "buffer_count", 2)
  return float(inside.prod(axis=0).sum()) * itemsize, buffers * float(sizes.prod()) * itemsize


def _over_grid(body: Any, grid: Sequence[int], data: Data) -> Work:
  """The work of all steps, of which those are alike that differ along no axis on which branches or loops depend."""
  total = Work()
  asked = [axis for axis in sorted(_axes_asked(body)) if _differs_along(axis, body, grid, data)]
  times = math.prod(n for axis, n in enumerate(grid) if axis not in asked)
  for point in itertools.product(*(range(grid[axis]) for axis in asked)):
    run = _Run({axis: np.int64(i) for axis, i in zip(asked, point, strict=True)}, grid, data)
    run.body(body)
    total.add(run.work, times)
  return total


def _differs_along(axis: int, body: Any, grid: Sequence[int], data: Data) -> bool:
  """Whether branches or loops depend on an axis, at the first steps of the others or at their last ones."""
  for others in ([0] * len(grid), [n - 1 for n in grid]):
    run = _Run({i: np.int64(at) for i, at in enumerate(others) if i != axis}, grid, data)
    run.body(body)
    if run.guessed:
      return True
  return False


def _axes_asked(jaxpr: Any) -> set[int]:
  found = {eqn.params["axis"] for eqn in jaxpr.eqns if eqn.primitive.name == "program_id"}
  for eqn in jaxpr.eqns:
    for param in eqn.params.values():
      for inner in _jaxprs(param):
        found |= _axes_asked(inner)
  return found


class _Run:
  """Runs a program on its scalars.

  `programs` are the numbers of the grid's step by axis, or arrays of all steps; what is left out is not known.
  `guessed` says whether a branch or a loop depended on a number of the step that is not known.
  """

  def __init__(self, programs: Mapping[int, Any], grid: Sequence[int], data: Data):
    self.programs, self.grid, self.data = programs, grid, data
    self.work, self.guessed = Work(), False

  def body(self, jaxpr: Any) -> None:
    """Of a kernel."""
    self._run(jaxpr, [], [None] * len(jaxpr.invars))

  def index(self, index_map: Any, points: np.ndarray) -> np.ndarray:
    """[axes, steps] of an index map, whose first arguments are the numbers of a step."""
    jaxpr, consts = _opened(index_map)
    results = self._run(jaxpr, consts, [*points, *[None] * (len(jaxpr.invars) - len(points))])
    return np.stack([np.broadcast_to(x, points.shape[1]) for x in results])

  def _run(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(atom: Any) -> Any:
      return np.asarray(atom.val) if hasattr(atom, "val") else values.get(atom)

    for eqn in jaxpr.eqns:
      results = self._step(eqn, [read(atom) for atom in eqn.invars])
      values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def _step(self, eqn: Any, given: list[Any]) -> list[Any]:
    name, nothing = eqn.primitive.name, [None] * len(eqn.outvars)
    if name == "program_id":
      return [self.programs.get(eqn.params["axis"], _OF_STEP)]
    if name == "num_programs":
      return [np.int64(self.grid[eqn.params["axis"]])]
    if name == "cond":
      return self._cond(eqn, given)
    if name == "while":
      return self._while(eqn, given)
    if name == "scan":
      return self._scan(eqn, given)
    if name == "dot_general":
      a = eqn.invars[0].aval
      (contracted, _), _ = eqn.params["dimension_numbers"]
      self.work.products += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(a.shape[i] for i in contracted)
      return nothing
    if name == "dma_start":
      self.work.copied += _copied(eqn)
      return nothing
    inner = [one for param in eqn.params.values() for one in _jaxprs(param)]
    if inner:
      closed = next(param for param in eqn.params.values() if any(True for _ in _jaxprs(param)))
      return self._run(*_opened(closed), given)
    sizes = [math.prod(atom.aval.shape) for atom in (*eqn.invars, *eqn.outvars)
             if getattr(atom.aval, "shape", ()) and "Ref" not in type(atom.aval).__name__]
    if name not in _FREE:
      self.work.elements += max(sizes, default=0)
    if eqn.outvars and not getattr(eqn.outvars[0].aval, "shape", ()):
      if name in ("get", "load"):
        return [np.int64(self.data.table)]
      if name in ("convert_element_type", "multiple_of"):
        return [given[0]]
      known = [x for x in given if x is not None and x is not _OF_STEP]
      if name == "and" and not all(known):  # whatever the others are
        return [np.bool_(False)]
      if any(x is _OF_STEP for x in given):
        return [_OF_STEP]
      if name in _SCALARS and all(x is not None for x in given):
        return [_SCALARS[name](*given)]
      return nothing
    return nothing

  def _apart(self, jaxpr: Any, given: Sequence[Any]) -> tuple[Work, list[Any]]:
    run = _Run(self.programs, self.grid, self.data)
    results = run._run(*_opened(jaxpr), given)
    self.guessed |= run.guessed
    return run.work, results

  def _cond(self, eqn: Any, given: list[Any]) -> list[Any]:
    which, *rest = given
    if which is not None and which is not _OF_STEP:
      work, results = self._apart(eqn.params["branches"][int(which)], rest)
      self.work.add(work)
      return results
    branches = [self._apart(branch, rest) for branch in eqn.params["branches"]]
    self.guessed |= which is _OF_STEP
    if which is _OF_STEP or self.data.holds is None or len(branches) != 2:
      self.work.add(max((work for work, _ in branches), key=lambda work: work.products + work.elements + work.copied))
    else:
      self.work.add(branches[0][0], 1 - self.data.holds)
      self.work.add(branches[1][0], self.data.holds)
    return [None] * len(eqn.outvars)

  def _while(self, eqn: Any, given: list[Any]) -> list[Any]:
    split = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    of_cond, of_body, carried = given[:split[0]], given[split[0]:split[1]], given[split[1]:]
    while True:
      goes_on = self._apart(eqn.params["cond_jaxpr"], [*of_cond, *carried])[1][0]
      self.guessed |= goes_on is _OF_STEP
      if goes_on is None or goes_on is _OF_STEP or not goes_on:
        return carried
      work, carried = self._apart(eqn.params["body_jaxpr"], [*of_body, *carried])
      self.work.add(work)

  def _scan(self, eqn: Any, given: list[Any]) -> list[Any]:
    (count, carry), length = _parts_of_scan(eqn.params), eqn.params["length"]
    consts, carried = given[:count], given[count:count + carry]
    # A counter is what a loop's turns can differ by.
    turns = length if length <= _TURNS else 1
    for _ in range(turns):
      of_turn = [None] * (len(given) - count - len(carried))
      work, results = self._apart(eqn.params["jaxpr"], [*consts, *carried, *of_turn])
      self.work.add(work, length / turns)
      carried = results[:len(carried)]
    return [*(carried if turns == length else [None] * len(carried)), *[None] * (len(eqn.outvars) - len(carried))]


def _opened(closed: Any) -> tuple[Any, list[np.ndarray]]:
  """(program, its constants)."""
  return getattr(closed, "jaxpr", closed), [np.asarray(x) for x in getattr(closed, "consts", ())]


def _parts_of_scan(params: Mapping[str, Any]) -> tuple[int, int]:
  """How many arguments of a scan are constants, and how many are carried; jax 0.12 says it otherwise."""
  if "num_consts" in params:
    return params["num_consts"], params["num_carry"]
  consts, carried, _ = (_leaves(part) for part in params["ft_in"].elts)
  return consts, carried


def _leaves(tree: Any) -> int:
  parts = getattr(tree, "elts", tree)
  return sum(map(_leaves, parts)) if isinstance(parts, tuple) else 1


def _copied(eqn: Any) -> float:
  """Bytes of an asynchronous copy, of which both ends are parts of arrays."""
  ends = jax.tree.unflatten(eqn.params["tree"], eqn.invars)
  parts = [part for end in ends[:2] for part in getattr(end, "transforms", ()) if hasattr(part, "indices")]
  itemsize = next(atom.aval.dtype.itemsize for atom in eqn.invars if atom.aval.ndim)
  return float(math.prod(getattr(index, "size", 1) for index in parts[0].indices) * itemsize)
