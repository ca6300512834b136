"""Which implementation is taken: the one that is forced or named, or the fastest measured one that serves."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from experiments.aot.chips import programs_for
from pallas_kernels import crossovers, implementation, table
from pallas_kernels.implementation import Implementation, Operation

X = np.zeros((1, 8, 2, 64), jnp.bfloat16)
HOPPER = r"Hopper GPUs \(compute capability 9\.0\)"
AMPERE = r"Ampere GPUs \(compute capability 8\.0\) and newer"
CALLS = {
    "gated_scan": lambda **how: pallas_kernels.gated_scan(X, (X,), **how),
    "decode_attention": lambda **how: pallas_kernels.decode_attention(
        X[:, 0], *2 * [X.swapaxes(1, 2)], np.ones((1, 8), bool), **how),
    "dilated_attention": lambda **how: pallas_kernels.dilated_attention(X, X, X, dilation=4, **how),
}
LAST = {"gated_scan": "mosaic_gpu", "decode_attention": "mosaic_gpu", "dilated_attention": "cudnn"}


@pytest.mark.parametrize("operation", CALLS)
def test_what_is_named_must_run_here(operation):
  call = CALLS[operation]
  of_whom = AMPERE if LAST[operation] == "cudnn" else HOPPER
  with pytest.raises(NotImplementedError, match=f"'{LAST[operation]}' of {operation} runs on {of_whom}, not on 'cpu'"):
    call(implementation=LAST[operation])
  if operation != "dilated_attention":
    with pytest.raises(NotImplementedError, match=rf"'cudnn' does not exist for {operation}; it has \('xla', "):
      call(implementation="cudnn")
  with pytest.raises(ValueError, match=f"'fast' is unknown; use None or, for {operation}, one of") as raised:
    call(implementation="fast")
  assert ("cudnn" in str(raised.value)) == (operation == "dilated_attention")


def test_the_device_and_the_arguments_are_both_said():
  narrow = X[..., :12]
  with pytest.raises(NotImplementedError, match=rf"'cudnn' of dilated_attention runs on {AMPERE}, not on 'cpu', and"
                                                r" takes heads of a multiple of 8 up to 128 wide, these are 12\. Pass"):
    pallas_kernels.dilated_attention(narrow, narrow, narrow, dilation=4, implementation="cudnn")


def test_what_is_not_installed_is_named_and_done_without(monkeypatch):
  monkeypatch.setitem(table.IMPLEMENTATIONS["gated_scan"], "mosaic_gpu", "pallas_kernels.absent")
  with pytest.raises(NotImplementedError, match="'mosaic_gpu' of gated_scan is no part of this installation"):
    CALLS["gated_scan"](implementation="mosaic_gpu")
  CALLS["gated_scan"]()


def test_a_jax_that_cannot_call_cudnn_is_named_and_done_without(monkeypatch):
  monkeypatch.setitem(crossovers.FASTEST, "cpu", {"dilated_attention": {"mosaic_gpu": 1, "cudnn": 1}})
  monkeypatch.setattr(jax.ffi, "ffi_call", lambda target_name, result_shape_dtypes: None)
  for name in ("cudnn", "cudnn_masked", "mosaic_gpu"):
    with programs_for("NVIDIA H200"), pytest.raises(
        NotImplementedError, match=r"needs jax\.ffi\.ffi_call with custom_call_api_version and"
        rf" legacy_backend_config, which jax {jax.__version__} does not have; install a jax"):
      jax.eval_shape(functools.partial(CALLS["dilated_attention"], implementation=name))
  ones = X + 1
  for name in (None, "xla"):
    assert (pallas_kernels.dilated_attention(ones, ones, ones, dilation=4, implementation=name) == 1).all()


def test_a_few_tokens_are_no_work_for_a_kernel():
  """Whatever the batch: a kernel would fill a decode step's one token up to 128."""
  size = pallas_kernels.scan.api.OPERATION.size
  x = {tokens: jax.ShapeDtypeStruct((4, tokens, 2, 8), jnp.float32) for tokens in (1, 63, 64)}
  assert [size(one, (one,), (), None) for one in x.values()] == [0, 0, 4 * 64 * 16]


class Probe:
  """An operation of one array with an implementation of its own, "kernel", that adds 1 where plain JAX adds nothing."""

  operation = Operation("probe", lambda x: ("B",), "B", lambda x: x.size)

  def __init__(self, monkeypatch, **how):
    modules = {"xla": Implementation(lambda x: x), "kernel": Implementation(lambda x: x + 1, independent="B", **how)}
    monkeypatch.setitem(table.IMPLEMENTATIONS, "probe", dict.fromkeys(modules, "a module"))
    load = implementation.load
    monkeypatch.setattr(implementation, "load", lambda operation, name: (
        modules[name] if operation == "probe" else load(operation, name)))

  def taken(self, x=np.zeros(128), name=None):
    return "kernel" if implementation.call(self.operation, name, x)[0] else "xla"


def test_none_takes_the_fastest_that_serves(monkeypatch):
  probe = Probe(monkeypatch, unsupported=lambda x: "takes no such thing" if x.dtype == np.int32 else None)
  assert probe.taken() == "xla"  # nothing is known of this device
  monkeypatch.setitem(crossovers.FASTEST, jax.devices()[0].device_kind, {"probe": {"kernel": 100}})
  assert [probe.taken(np.zeros(n)) for n in (99, 100)] == ["xla", "kernel"]
  assert probe.taken(np.zeros(100, np.int32)) == "xla"


@pytest.mark.parametrize(("kind", "taken"), [
    ("NVIDIA H100 80GB HBM3", "xla cudnn_masked mosaic_gpu mosaic_gpu"),
    ("NVIDIA A100-SXM4-40GB", "xla cudnn_masked cudnn_masked cudnn"),
    ("NVIDIA L4", "xla cudnn_masked cudnn_masked cudnn"),
    ("NVIDIA GeForce RTX 4090", "xla cudnn_masked cudnn_masked cudnn"),
    ("NVIDIA B200", "xla cudnn_masked cudnn_masked cudnn"),
    ("NVIDIA H100 PCIe", "xla cudnn_masked cudnn_masked cudnn"),
    ("Tesla T4", "xla xla xla xla"), ("a new GPU", "xla xla xla xla"), ("TPU v4", "xla xla xla xla"),
    ("cpu", "xla xla xla xla")])
def test_gpus_without_measured_sizes_take_what_cudnn_serves_at_the_h100s(monkeypatch, kind, taken):
  """By the number of tokens: 31, 32, 4095 and 4096. What needs Hopper is taken where it was measured alone."""
  modules = {name: Implementation(lambda q, k, v, s, name=name, **_: q[:1, :1, :1, :len(name)], runs_on=load.runs_on,
                                  independent=load.independent)
             for name in ("xla", "cudnn", "cudnn_masked", "mosaic_gpu")
             for load in [implementation.load("dilated_attention", name)]}
  monkeypatch.setattr(implementation, "load", lambda operation, name: modules[name])
  lengths = {len(name): name for name in modules}
  assert len(lengths) == len(modules)
  found = []
  for length in (31, 32, 4095, 4096):
    x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)
    call = functools.partial(pallas_kernels.dilated_attention, dilation=16)
    with programs_for(kind, "tpu" if "TPU" in kind else "cpu" if kind == "cpu" else "gpu"):
      found.append(lengths[jax.eval_shape(call, x, x, x).shape[-1]])
  assert " ".join(found) == taken


def test_force_is_a_name_for_all_inside(monkeypatch):
  probe = Probe(monkeypatch)
  with pallas_kernels.force("kernel"):
    assert probe.taken() == "kernel"
    assert probe.taken(name="xla") == "kernel"
    with pallas_kernels.force("xla"):
      assert probe.taken() == "xla"
      assert probe.taken(name="kernel") == "xla"
    assert probe.taken() == "kernel"
  assert probe.taken() == "xla"
  for name, reason in (("mosaic_gpu", "of gated_scan runs on"), ("cudnn", "does not exist for gated_scan")):
    with pallas_kernels.force(name), pytest.raises(NotImplementedError, match=f"'{name}' {reason}"):
      CALLS["gated_scan"]()
  with pytest.raises(ValueError, match="'fast' is unknown; use one of"):
    pallas_kernels.force("fast")


def test_what_was_compiled_outside_is_not_taken_inside(monkeypatch):
  probe = Probe(monkeypatch)
  f = jax.jit(lambda x: implementation.call(probe.operation, None, x))
  assert f(np.zeros(3))[0] == 0
  with pallas_kernels.force("kernel"):
    assert f(np.zeros(3))[0] == 1
  assert f(np.zeros(3))[0] == 0
