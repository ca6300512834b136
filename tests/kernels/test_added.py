"""An implementation is added by a file of its own and one line of the table: a copy of plain JAX under another name."""

from __future__ import annotations

import jax
import pytest

import pallas_kernels
from conftest import first_quick, run_python
from kernels import copies, suite
from pallas_kernels import crossovers, table

ADDED = {"gated_scan": "scan", "dilated_attention": "dilated", "decode_attention": "decode",
         "sparse_attention": "sparse"}


@pytest.fixture
def add(monkeypatch):
  return lambda operation: monkeypatch.setitem(table.IMPLEMENTATIONS[operation], "copied",
                                               f"kernels.copies.{ADDED[operation]}")


@pytest.mark.usefixtures("true_float32")
@pytest.mark.parametrize("operation", ADDED)
def test_the_suite_runs_on_it(operation, add):
  add(operation)
  spec = list(suite.CASES[operation].small.values())[2]
  assert not suite.check_refusal(operation, "copied", spec)
  suite.check_numbers(operation, "copied", spec)
  suite.check_poison(operation, "copied", spec)


@pytest.mark.parametrize("operation", first_quick(1, ADDED))
def test_it_is_taken_as_others_are(operation, add, monkeypatch):
  case = suite.CASES[operation]
  arguments, rest = case.small["bfloat16" if "bfloat16" in case.small else "one input"].draw()
  taken = lambda name: (copies.TAKEN.clear(), case.run(*arguments, **rest, implementation=name), copies.TAKEN)[2]
  with pytest.raises(ValueError, match="'copied' is unknown"):
    taken("copied")
  add(operation)
  assert taken("copied")
  assert not taken(None)
  with pallas_kernels.force("copied"):
    assert taken(None)
  monkeypatch.setitem(crossovers.FASTEST, jax.devices()[0].device_kind, {operation: {"copied": 1}})
  assert taken(None)
  other = suite.CASES["gated_scan" if operation != "gated_scan" else "dilated_attention"]
  arguments, rest = next(iter(other.small.values())).draw()
  with pytest.raises(NotImplementedError, match=f"'copied' does not exist for {other.operation.name}; it has"):
    other.run(*arguments, **rest, implementation="copied")


@pytest.mark.slow
@pytest.mark.parametrize("operation", [
    "gated_scan", *(pytest.param(one, marks=pytest.mark.mesh) for one in ADDED if one != "gated_scan")])
def test_on_eight_devices(operation):
  """On one of them, in `jax.shard_map`, and over a mesh: values and gradients of plain JAX, and the copy taken."""
  run_python("-m", "kernels.eight_devices", operation, devices=8)
