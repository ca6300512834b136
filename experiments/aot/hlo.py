"""The text of a compiled program: how often each instruction runs, what it reads and writes, what it sends.

XLA's own count takes a loop for one turn of it. Here a loop counts as often as its condition says, and of a
`conditional` every branch counts for its share of the turns, as the updates of a training step take turns.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
          "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\](\{[^}]*\})?")
_ELSEWHERE = re.compile(r"S\([1-9]")  # of a layout: an array in a memory on the chip
# What moves nothing by itself, or whose parts are counted.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "call-start",
         "call-done", "async-start", "async-update", "async-done", "after-all", "partition-id", "replica-id", "iota",
         "opt-barrier", "copy-done", "slice-done", "all-gather-done", "all-reduce-done", "collective-permute-done",
         "custom-call-done"}


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a program: `result` is its type as text, `operands` are names, `rest` the attributes."""

  name: str
  kind: str
  result: str
  operands: tuple[str, ...]
  rest: str
  is_root: bool

  def called(self, attribute: str) -> list[str]:
    """The computations that an attribute names."""
    found = re.search(attribute + r"=\{?(%[^,}\s]+(?:, ?%[^,}\s]+)*)", self.rest)
    return [name.strip().lstrip("%") for name in found[1].split(",")] if found else []


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Sent:
  """A collective: its kind, the bytes of its largest side, the groups of devices, how often it runs.

  `moved` are bytes that it reads from a device's memory and writes to it; `name` is where it comes from in the
  program's source; `arrays` the shapes of its results.
  """

  kind: str
  size: float
  moved: float
  groups: np.ndarray  # [groups, devices of one]; of a permutation [pairs, 2]
  times: float
  name: str
  arrays: tuple[tuple[int, ...], ...]


class Program:
  """A compiled program's text, parsed."""

  def __init__(self, text: str):
    self._computations: dict[str, Computation] = {}
    entry = ""
    for header, lines in _computations(re.sub(r"/\*.*?\*/", "", text)):
      name = header.removeprefix("ENTRY ").lstrip("%").split(" ")[0]
      entry = name if header.startswith("ENTRY") else entry
      self._computations[name] = {one.name: one for one in map(_instruction, lines) if one}
    self.times: Mapping[str, float] = self._count(entry)

  def _count(self, entry: str) -> Mapping[str, float]:
    """How often each computation runs, but those inside fusions."""
    times: dict[str, float] = collections.defaultdict(float)

    def visit(name: str, weight: float) -> None:
      times[name] += weight
      for one in self._computations[name].values():
        if one.kind == "while":
          turns = self._turns(one.called("condition")[0])
          visit(one.called("body")[0], weight * turns)
        elif one.kind == "conditional":
          branches = one.called("branch_computations") or one.called("(?:true|false)_computation")
          for branch in branches:
            visit(branch, weight / len(branches))
        elif one.kind in ("call", "call-start", "async-start"):
          for called in one.called("to_apply") + one.called("calls"):
            visit(called, weight)

    visit(entry, 1.0)
    return times

  def _turns(self, condition: str) -> int:
    """How often a loop of JAX turns: it counts from 0 up to the one constant that its condition compares with."""
    constants = [int(found[1]) for one in self._computations[condition].values() if one.kind == "constant"
                 and (found := re.match(r"(\d+)", one.operands[0] if one.operands else ""))]
    return max(constants, default=1)

  def _running(self) -> Iterator[tuple[float, Computation, Instruction]]:
    for name, times in self.times.items():
      for one in self._computations[name].values():
        yield times, self._computations[name], one

  def sent(self) -> list[Sent]:
    """All collectives.

    One that goes on while others run is a chain of fusions, some of them inside inner loops.
    """
    found: dict[str, Sent] = {}
    for times, inside, one in self._running():
      within = [(inside, one)]
      if one.kind == "fusion":  # a reduce-scatter of a TPU is a fusion of an all-reduce and a slice
        within = [(self._computations[name], inner) for name in one.called("calls")
                  for inner in self._computations[name].values()]
      for around, inner in within:
        kind = inner.kind.removesuffix("-start")
        if kind not in COLLECTIVES:
          continue
        given, result = [around[name].result for name in inner.operands if name in around], inner.result
        started = inner.kind.endswith("-start")  # its result holds what it is given too
        sides = [_sizes(result) / (2 if started else 1), sum(map(_sizes, given))]
        if one.kind == "fusion" and kind == "all-reduce" and _sizes(one.result) < sides[0]:
          kind, result = "reduce-scatter", one.result
        moved = _in_memory(result) + (0.0 if started else sum(map(_in_memory, given)))
        source = re.search(r'op_name="([^"]*)"', inner.rest) or re.search(r'op_name="([^"]*)"', one.rest)
        chain = re.search(r'(?:chain_id|async_collective_name)="[^"]+"', inner.rest)
        key = chain[0] if chain else inner.name
        made = Sent(kind, max(sides), moved, _groups(inner.rest), times, source[1] if source else "",
                    tuple(shape for _, shape, _ in _arrays(inner.result)))
        found[key] = min(found.get(key, made), made, key=lambda one: one.times)
    return list(found.values())

  def moved(self) -> float:
    """Bytes that all instructions read from the device's memory and write to it."""
    computed = sum(times * self._bytes(inside, one) for times, inside, one in self._running()
                   if one.kind not in _FREE and not _is_collective(one))
    return computed + sum(one.times * one.moved for one in self.sent())

  def moved_by_kernels(self) -> float:
    """Of these bytes, those of the arguments and results of Pallas kernels."""
    return sum(times * self._bytes(inside, one) for times, inside, one in self._running()
               if 'custom_call_target="tpu_custom_call"' in one.rest)

  def _bytes(self, inside: Computation, one: Instruction) -> float:
    operands = [_in_memory(inside[name].result) if name in inside else 0.0 for name in one.operands]
    result = _in_memory(one.result)
    if one.kind in ("dynamic-slice", "gather", "slice"):
      return 2 * result if operands[0] else result
    if one.kind in ("dynamic-update-slice", "scatter"):
      return 2 * operands[-1 if one.kind == "scatter" else 1]
    if one.kind.endswith("-start"):  # of a copy: the result holds the operand too
      return max(operands, default=0.0)
    if one.kind != "fusion":
      return sum(operands) + result
    fused = self._computations[one.called("calls")[0]]
    total = sum(min(size, self._read(fused, _parameter(fused, number).name)) for number, size in enumerate(operands))
    root = next(inner for inner in fused.values() if inner.is_root)
    roots = [fused[name] for name in root.operands] if root.kind == "tuple" else [root]
    written = sum(_written(fused, inner) for inner in roots)
    return total + min(result, written)

  def _read(self, fused: Computation, name: str) -> float:
    """Bytes that a fusion reads of an operand: of what it only takes slices or rows of, these.

    What it only hands on, or gives to a collective, it does not read itself.
    """
    total = 0.0
    for user in (one for one in fused.values() if name in one.operands):
      if user.kind == "bitcast":
        total += self._read(fused, user.name)
      elif user.kind == "fusion":
        inner = self._computations[user.called("calls")[0]]
        total += sum(self._read(inner, _parameter(inner, number).name)
                     for number, operand in enumerate(user.operands) if operand == name)
      elif user.kind in ("dynamic-slice", "gather") and user.operands[0] == name:
        total += _sizes(user.result)
      elif not ((user.kind == "dynamic-update-slice" and user.operands[0] == name) or user.kind == "tuple"
                or _is_collective(user)):
        return np.inf
    return total


def _parameter(fused: Computation, number: int) -> Instruction:
  return next(one for one in fused.values() if one.kind == "parameter" and one.operands[0] == str(number))


def _is_collective(one: Instruction) -> bool:
  return one.kind.removesuffix("-start") in COLLECTIVES


def _written(fused: Computation, one: Instruction) -> float:
  """Bytes that a fusion writes of a result. What is handed on, or is a collective's, is not written by the fusion."""
  if one.kind == "parameter" or _is_collective(one):
    return 0.0
  source = fused.get(one.operands[0]) if one.operands else None
  if source and (one.kind == "bitcast" or (one.kind == "dynamic-slice" and _is_collective(source))):
    return _written(fused, source)
  if one.kind == "dynamic-update-slice" and one.operands[1] in fused:
    return _sizes(fused[one.operands[1]].result)
  return _sizes(one.result)


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
  header, lines = "", list[str]()
  for line in text.splitlines():
    if re.match(r"(ENTRY )?%\S+ \(.*\{$", line):
      header, lines = line, []
    elif line.startswith("}") and header:
      yield header, lines
      header = ""
    elif header:
      lines.append(line)


def _instruction(line: str) -> Instruction | None:
  found = re.match(r"\s+(ROOT )?%(\S+) = ", line)
  if not found:
    return None
  after = line[found.end():]
  end = _closing(after, 0) + 1 if after.startswith("(") else after.index(" ")
  result, after = after[:end], after[end:].lstrip()
  kind, _, after = after.partition("(")
  end = _closing("(" + after, 0) - 1
  operands = tuple(part.split(" ")[-1].lstrip("%") for part in after[:end].split(", ")) if end else ()
  return Instruction(found[2], kind, result, operands, after[end + 1:], bool(found[1]))


def _closing(text: str, start: int) -> int:
  """Where the parenthesis at `start` closes."""
  depth = 0
  for i in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if depth == 0:
      return i
  return len(text)


_Array = tuple[str, tuple[int, ...], str]  # type, shape, layout


def _arrays(result: str) -> list[_Array]:
  return [(kind, tuple(map(int, filter(None, shape.split(",")))), layout) for kind, shape, layout in
          _ARRAY.findall(result)]


def _size(array: _Array) -> float:
  return float(np.prod(array[1])) * _BYTES[array[0]]


def _sizes(result: str) -> float:
  return sum(map(_size, _arrays(result)))


def _in_memory(result: str) -> float:
  return sum(_size(array) for array in _arrays(result) if not _ELSEWHERE.search(array[2]))


def _groups(rest: str) -> np.ndarray:
  """The groups of devices, by their place in the mesh, in any of the ways in which they are written."""
  if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", rest):
    return _lists(pairs[1])
  if listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
    return _lists(listed[1])
  if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
    shape, dims, order = (_numbers(part) for part in iota.groups())
    numbers = np.arange(np.prod(dims)).reshape(dims)
    return (numbers.transpose(order) if order else numbers).reshape(shape)
  if mesh := re.search(r"replica_groups=mesh\[(.*?)\],?\s*(?:device_ids=\((.*?\)?)\)\s*)?\{(.*?)\}", rest):
    sizes = [int(size) for size in re.findall(r"=(\d+)", mesh[1])]
    names, over = re.findall(r"'(\w+)'", mesh[1]), re.findall(r"'(\w+)'", mesh[3])
    numbers = np.arange(np.prod(sizes))
    if listed := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", mesh[2] or ""):
      numbers = numbers.reshape(_numbers(listed[1]))
      numbers = numbers.transpose(_numbers(listed[2])) if listed[2] else numbers
    axes = [names.index(name) for name in over]
    last = np.moveaxis(numbers.reshape(sizes), axes, range(-len(axes), 0))
    return last.reshape(-1, int(np.prod([sizes[axis] for axis in axes])))
  return np.zeros((1, 1), int)


def _lists(text: str) -> np.ndarray:
  return np.array([_numbers(part) for part in re.findall(r"\{([\d,]*)\}", text)])


def _numbers(text: str | None) -> Sequence[int]:
  return [int(part) for part in (text or "").split(",") if part.strip()]
