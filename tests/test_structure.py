"""How the library is built: what the code may not do, read from its syntax trees."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil

import pytest

import pallas_kernels
import rat_jax
from conftest import ROOT
from rat_jax.modes import MODES, BlockMode, Mode, SelectingMode

FILES = sorted(file for folder in ("rat_jax", "pallas_kernels") for file in (ROOT / folder).rglob("*.py"))
MODE_CLASSES = {one.__name__ for one in (*MODES.values(), Mode, SelectingMode, BlockMode)}
# Defaults of arguments, and the sparse half of ARL.
ALLOWED = {"Dense", "Dilated"}


def outside_modes():
  folder = ROOT / "rat_jax"
  return [file for file in FILES if file.is_relative_to(folder) and not file.is_relative_to(folder / "modes")
          and file != folder / "__init__.py"]


def type_checked_imports(tree):
  """The import statements that are there for type checkers alone."""
  return {id(node) for one in ast.walk(tree) if isinstance(one, ast.If) and ast.unparse(one.test) == "TYPE_CHECKING"
          for node in one.body}


def annotations(tree):
  """All nodes of annotations, which are text at run time."""
  found = set()
  for node in ast.walk(tree):
    for name in ("annotation", "returns"):
      if getattr(node, name, None) is not None:
        found |= {id(part) for part in ast.walk(getattr(node, name))}
  return found


def names_of_modes(tree):
  """The names of mode classes that code mentions, but for `Mode` in annotations and imports."""
  typed, checked = annotations(tree), type_checked_imports(tree)
  for node in ast.walk(tree):
    if isinstance(node, (ast.Name, ast.Attribute)) and id(node) not in typed:
      yield node.id if isinstance(node, ast.Name) else node.attr
    elif isinstance(node, ast.ImportFrom) and id(node) not in checked:
      yield from (alias.name for alias in node.names if alias.name != "Mode")


def questions_of_type(tree):
  """The second arguments of isinstance and issubclass, the cases of `match`, what type(...) is compared with."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
      yield node.args[1]
    elif isinstance(node, ast.MatchClass):
      yield node.cls
    elif isinstance(node, ast.Compare) and "type(" in ast.unparse(node):
      yield node


def comparisons_of_names(tree):
  """Comparisons with the `name` of something."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Compare):
      sides = [node.left, *node.comparators]
      if any(isinstance(side, ast.Attribute) and side.attr == "name" and "mode" in ast.unparse(side) for side in sides):
        yield ast.unparse(node)


def test_no_mode_is_named_outside_of_its_folder():
  """So a mode's file holds its idea: nothing else asks which one it is."""
  assert len(outside_modes()) > 40
  for file in outside_modes():
    tree = ast.parse(file.read_text())
    assert not MODE_CLASSES & set(names_of_modes(tree)) - ALLOWED, file
    for asked in questions_of_type(tree):
      named = {part.id for part in ast.walk(asked) if isinstance(part, ast.Name)}
      assert not named & MODE_CLASSES, (file, ast.unparse(asked))
    assert not list(comparisons_of_names(tree)), file


@pytest.mark.parametrize("source", ["isinstance(m, Quest)", "from rat_jax.modes import Quest", "type(mode) is Quest",
                                    "modes.Quest(1)", "match m:\n  case Quest(): pass", "issubclass(c, BlockMode)"])
def test_a_named_mode_is_seen(source):
  tree = ast.parse(source)
  in_questions = {part.id for one in questions_of_type(tree) for part in ast.walk(one) if isinstance(part, ast.Name)}
  assert (set(names_of_modes(tree)) | in_questions) & MODE_CLASSES


def test_a_compared_name_is_seen():
  assert list(comparisons_of_names(ast.parse("if mode.name == 'quest': pass")))


def test_no_function_hides_a_module():
  """An attribute of a package that is named as one of its modules is that module."""
  for package in (rat_jax, pallas_kernels):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
      parent, _, name = found.name.rpartition(".")
      attribute = getattr(importlib.import_module(parent), name, None)
      assert attribute is None or inspect.ismodule(attribute), found.name


def test_files_and_functions_are_short():
  """Files up to 400 lines; functions up to 60 without their docstring, the insides of the Hopper kernels excepted."""
  for file in [*FILES, *sorted((ROOT / "experiments").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]:
    text = file.read_text()
    assert len(text.splitlines()) <= 400, file
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and "mosaic_gpu" not in file.name:
        first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
        assert node.end_lineno - first.lineno < 60, (file, node.name)


def calls(tree, names):
  """The calls of methods and functions of these names, as (name, what it is a method of or "", call)."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
      yield node.func.attr, ast.unparse(node.func.value), node
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
      yield node.func.id, "", node


def test_arrays_that_are_made_of_a_shape_say_their_type():
  """Else it would be another where 64-bit types are enabled."""
  shapes = {"zeros": 1, "ones": 1, "empty": 1, "full": 2, "arange": 3}  # arguments before the type
  for file in FILES:
    for name, owner, call in calls(ast.parse(file.read_text(encoding="utf-8")), shapes):
      if owner == "jnp":
        assert len(call.args) > shapes[name] or "dtype" in {k.arg for k in call.keywords}, (file, ast.unparse(call))


def test_every_text_that_is_read_or_written_names_its_encoding():
  """Else it depends on the machine's locale. `read_text(path)` is rat_jax.paths', which does."""
  scripts = sorted((ROOT / "experiments").rglob("*.py"))
  assert len(scripts) > 20
  for file in (*FILES, *scripts):
    for name, owner, call in calls(ast.parse(file.read_text(encoding="utf-8")), {"read_text", "write_text", "open"}):
      said = {ast.unparse(one) for one in (*call.args, *(k.value for k in call.keywords))}
      binary = name == "open" and said & {"'rb'", "'wb'", "'ab'"}
      ours = name == "read_text" and owner == ""
      assert binary or ours or any("utf-8" in one for one in said), (file, ast.unparse(call))
