"""The device of a program: that of its arguments' mesh, of the mesh in context, or the first; and what runs on it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.aot.chips import programs_for
from pallas_kernels import devices
from pallas_kernels.devices import Device


@pytest.mark.parametrize(("kind", "platform", "expected"), [
    ("NVIDIA H200", "gpu", dict(capability=9.0)), ("NVIDIA H100 80GB HBM3", "gpu", dict(capability=9.0)),
    ("NVIDIA A100-SXM4-40GB", "gpu", dict(capability=8.0)), ("Tesla T4", "gpu", dict(capability=7.5)),
    ("NVIDIA GeForce RTX 4090", "gpu", dict(capability=8.9)),
    ("NVIDIA B200", "gpu", dict(capability=10.0)), ("NVIDIA L4", "cuda", dict(capability=8.9)),
    ("a new GPU", "gpu", {}), ("TPU v5 lite", "tpu", dict(generation=5)), ("TPU v6 lite", "tpu", dict(generation=6)),
    ("TPU7x", "tpu", dict(generation=7)), ("cpu", "cpu", {})])
def test_a_device_by_its_kind(kind, platform, expected):
  with programs_for(kind, platform):
    found = devices.device_of(np.zeros(1))
  assert found == Device("gpu" if platform == "cuda" else platform, kind, **expected)


@pytest.mark.parametrize(("kind", "served"), [
    ("Tesla T4", "xla"), ("NVIDIA A100-SXM4-40GB", "xla cudnn"), ("NVIDIA H200", "xla cudnn mosaic_gpu"),
    ("NVIDIA B200", "xla cudnn"), ("a new GPU", "xla")])
def test_mosaic_serves_hopper_alone(kind, served):
  of = {"xla": devices.ANY, "cudnn": devices.AMPERE, "mosaic_gpu": devices.HOPPER}
  with programs_for(kind):
    device = devices.device_of()
  assert " ".join(name for name, which in of.items() if which.unsupported(device) is None) == served


def test_the_capability_of_a_present_device_is_its_own(monkeypatch):
  present = type("Device", (), {"platform": "gpu", "device_kind": "a new GPU"})
  for told, expected in (("9.0", 9.0), ("10.3", 10.3), ("gfx942", None)):
    present.compute_capability = told
    monkeypatch.setattr(jax, "devices", lambda: [present])
    assert devices.device_of(np.zeros(1)) == Device("gpu", "a new GPU", expected)


def test_an_arrays_mesh_comes_before_the_one_in_context():
  """In a program too; what was made inside has no mesh, and the context's counts."""
  tpu = jax.sharding.AbstractDevice("TPU v6 lite", num_cores=None, platform="tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=tpu)
  x = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, jax.P()))
  found = []

  def f(x):
    found.extend([devices.device_of(np.zeros(2), x), devices.device_of(jnp.zeros(2))])
    return x

  with programs_for("NVIDIA H200"):
    jax.jit(f).trace(x)
  jax.jit(f).trace(x)
  assert [device.kind for device in found] == ["TPU v6 lite", "NVIDIA H200", "TPU v6 lite", "cpu"]
  assert devices.platform_of() == "cpu"
