"""No private name of jax is used but in one file: a new release may move them."""

from __future__ import annotations

import ast

import pytest

from conftest import ROOT


def names_of_jax(tree):
  """The dotted names of jax that a file uses, by whatever names it imported them."""
  imported = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom):
      imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    elif isinstance(node, ast.Import):
      for alias in node.names:
        name = alias.asname or alias.name.partition(".")[0]
        imported[name] = alias.name if alias.asname else name
        yield alias.name
  yield from imported.values()
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      root, *rest = ast.unparse(node).split(".")
      yield ".".join([imported.get(root, ""), *rest])


def is_private(name):
  first, *rest = name.split(".")
  return first in ("jax", "jaxlib") and any(part.startswith("_") and not part.startswith("__") for part in rest)


@pytest.mark.parametrize("source", ["from jax._src import cudnn", "from jax import _src", "import jax._src.core",
                                    "import jax.numpy as jnp; jnp._x", "import jax; jax.lax._x(1)",
                                    "from jax.experimental import pallas as pl; pl._x.y"])
def test_a_private_name_is_seen(source):
  assert any(map(is_private, names_of_jax(ast.parse(source))))


def test_one_file_uses_private_names_of_jax():
  """Neither `jax._src` nor a private attribute of a module of jax: a new release may move those."""
  allowed = ROOT / "tests" / "gpu_interpreter.py"
  files = [file for folder in ("rat_jax", "pallas_kernels", "experiments", "colab", "tests")
           for file in (ROOT / folder).rglob("*.py")]
  assert allowed in files
  private = [(file, name) for file in files if file != allowed
             for name in names_of_jax(ast.parse(file.read_text())) if is_private(name)]
  assert not private
