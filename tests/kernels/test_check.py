"""`check_device`, and what is taken of predicted places: nothing on a device that is here and was not checked."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import numpy as np
import pytest

import pallas_kernels
import rat_jax
from experiments.aot.chips import programs_for
from kernels import copies
from kernels.test_implementation import Probe
from pallas_kernels import check, crossovers, implementation, table
from pallas_kernels.attention.softmax import NOTHING
from pallas_kernels.scan.arg_specs import ArgSpec as Scan

KIND = "cpu"


@pytest.fixture
def copied(monkeypatch, tmp_path):
  """A copy of plain JAX is the kernel of one operation, at a predicted place; its checks leave files in a folder."""
  monkeypatch.setenv("RAT_JAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(check, "SPECS", {"gated_scan": (Scan(1, 9, 1, 8, "float32", "float32", reset=True),)})
  monkeypatch.setitem(table.IMPLEMENTATIONS["gated_scan"], "copied", "kernels.copies.scan")
  monkeypatch.setitem(crossovers.PREDICTED, KIND, {"gated_scan": {"copied": 0}})
  implementation._say_once.cache_clear()
  return tmp_path / "cache"


def taken():
  """Whether the copy is, of None; and what is said."""
  arguments, rest = Scan(1, 9, 1, 8, "float32", "float32", reset=True).draw()
  copies.TAKEN.clear()
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    check.gated_scan(*arguments, **rest)
  return bool(copies.TAKEN), [str(one.message) for one in said]


def test_a_check_that_passes_leaves_a_file_and_lets_kernels_be_taken(copied):
  took, said = taken()
  assert not took
  assert said == ["operations take plain JAX on 'cpu': its kernels were not checked, or did not pass; call"
                  " rat_jax.check_device(), which should take less than two minutes and leaves a file."]
  assert taken() == (False, [])  # said once
  found = rat_jax.check_device()
  assert found.passed
  assert found.errors == {("gated_scan", "copied", "float32"): 0.0}
  assert [found.file] == list(copied.iterdir())
  assert f"{KIND}: passed in" in str(found)
  assert "gated_scan copied float32: 0.0e+00 of 1e-04" in str(found)
  assert taken() == (True, [])


def test_a_kernel_that_is_wrong_fails(copied, monkeypatch):
  load = check.load

  def wrong(operation, name):
    found = load(operation, name)
    if name != "copied":
      return found
    run = lambda *arguments, **rest: jax.tree.map(lambda x: 1.001 * x, found.run(*arguments, **rest))
    return dataclasses.replace(found, run=run)

  assert rat_jax.check_device().passed
  monkeypatch.setattr(implementation, "load", wrong)
  found = rat_jax.check_device()
  assert not found.passed
  assert found.errors["gated_scan", "copied", "float32"] == pytest.approx(1e-3, rel=0.1)
  assert "FAILED: plain JAX is taken" in str(found)
  assert found.file is None
  assert list(copied.iterdir()) == []  # that of an earlier check has gone
  assert not taken()[0]


def test_a_kernel_that_does_not_compile_fails_and_the_others_are_compared(copied, monkeypatch):
  load = check.load

  def broken(operation, name):
    found = load(operation, name)
    return dataclasses.replace(found, run=lambda *_, **__: 1 / 0) if name == "copied" else found

  monkeypatch.setattr(implementation, "load", broken)
  found = rat_jax.check_device()
  assert found.errors == {("gated_scan", "copied", "float32"): float("inf")}
  assert "gated_scan copied float32: failed: ZeroDivisionError: division by zero" in str(found)


def test_what_says_nothing_is_refused(copied, monkeypatch):
  with pallas_kernels.force("xla"), pytest.raises(ValueError, match=r"inside pallas_kernels\.force"):
    rat_jax.check_device()
  monkeypatch.setattr(check, "SPECS", {})
  found = rat_jax.check_device()
  assert not found.passed
  assert "no kernel runs here, nothing was compared" in str(found)


@pytest.mark.parametrize(("ours", "theirs", "error"), [
    ([NOTHING, 5], [NOTHING, 1], 4), ([NOTHING, 1], [0, 1], np.inf), ([np.nan, 1], [1, 1], np.inf),
    ([1, 1], [np.nan, 1], np.inf), ([0, 1e-9], [0, 0], np.inf), ([0, 0], [0, 0], 0),
    ([3, 4, 0, 0], [3, 4, 0, 0.5], 0.125), ([1, 0, 0, 0], [1, 0.02, 0, 0], 0.02)])
def test_errors(ours, theirs, error):
  ours, theirs = (np.float64(np.float32(x)) for x in (ours, theirs))
  assert check._error([ours], [theirs]) == pytest.approx(error, rel=1e-3)


def test_a_folder_that_cannot_be_written_is_said_and_the_process_goes_on(copied):
  copied.write_text("a file", encoding="utf-8")
  with pytest.warns(UserWarning, match="it counts for this process alone. Set RAT_JAX_CACHE"):
    found = rat_jax.check_device()
  assert found.passed
  assert found.file is None
  assert taken() == (True, [])


def test_programs_for_a_device_that_is_elsewhere_take_what_is_predicted(monkeypatch):
  probe = Probe(monkeypatch)
  monkeypatch.setitem(crossovers.PREDICTED, "TPU v5", {"probe": {"kernel": 100}})
  with programs_for("TPU v5", "tpu"):
    sizes = [jax.ShapeDtypeStruct((n,), "float32") for n in (99, 100)]
    shapes = [jax.make_jaxpr(lambda x: implementation.call(probe.operation, None, x))(x) for x in sizes]
  assert ["add" in str(one) for one in shapes] == [False, True]
