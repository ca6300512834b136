"""Which implementation is taken: the one that is named, or the fastest measured one that serves."""

from __future__ import annotations

import ast

import jax
import numpy as np
import pytest

import pallas_kernels
from conftest import ROOT
from pallas_kernels import dispatch
from pallas_kernels.dilated_attention import cudnn

X = np.zeros((1, 8, 2, 64), jax.numpy.bfloat16)


HOPPER = r"Hopper GPUs \(compute capability 9\.0\)"
AMPERE = r"Ampere GPUs \(compute capability 8\.0\) and newer"


@pytest.mark.parametrize(("operation", "call", "name", "of_whom"), [
    ("gated_scan", lambda **how: pallas_kernels.gated_scan(X, (X,), **how), "mosaic_gpu", HOPPER),
    ("decode_attention", lambda **how: pallas_kernels.decode_attention(
        X[:, 0], *2 * [X.swapaxes(1, 2)], np.ones((1, 8), bool), **how), "mosaic_gpu", HOPPER),
    ("dilated_attention", lambda **how: pallas_kernels.dilated_attention(X, X, X, dilation=4, **how), "cudnn",
     AMPERE),
])
def test_what_is_named_must_run_here(operation, call, name, of_whom):
  with pytest.raises(NotImplementedError, match=f"'{name}' of {operation} runs on {of_whom}, not on 'cpu'"):
    call(implementation=name)
  with pytest.raises(ValueError, match=f"'fast' is unknown; use None or, for {operation}, one of") as raised:
    call(implementation="fast")
  assert ("cudnn" in str(raised.value)) == (operation == "dilated_attention")


def test_the_device_and_the_arguments_are_both_said(monkeypatch):
  narrow = X[..., :12]
  with pytest.raises(NotImplementedError, match=rf"'cudnn' of dilated_attention runs on {AMPERE}, not on 'cpu', and"
                                                r" takes heads of a multiple of 8 up to 128 wide, these are 12\. Pass"):
    pallas_kernels.dilated_attention(narrow, narrow, narrow, dilation=4, implementation="cudnn")

  def absent():
    raise ImportError("no such module")

  scan = lambda: dispatch.resolve("gated_scan", "mosaic_gpu", {"mosaic_gpu": absent}, 1)
  with pytest.raises(NotImplementedError, match=rf"runs on {HOPPER}, not on 'cpu'\. Pass"):
    scan()
  monkeypatch.setattr(dispatch, "check_device", lambda implementation: None)
  with pytest.raises(ImportError, match="no such module"):  # where it should run, what is missing is said
    scan()


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


def test_a_jax_that_cannot_call_cudnn_is_named_and_done_without(monkeypatch):
  monkeypatch.setattr(dispatch, "check_device", lambda implementation: None)
  monkeypatch.setattr(dispatch, "FASTEST", {"cpu": {"dilated_attention": {"mosaic_gpu": 1, "cudnn": 1}}})
  monkeypatch.setattr(jax.ffi, "ffi_call", lambda target_name, result_shape_dtypes: None)
  cudnn._of_this_jax.cache_clear()
  try:
    for name in ("cudnn", "cudnn_masked", "mosaic_gpu"):
      with pytest.raises(NotImplementedError, match=r"needs jax\.ffi\.ffi_call with custom_call_api_version and"
                         rf" legacy_backend_config, which jax {jax.__version__} does not have; install a jax"):
        pallas_kernels.dilated_attention(X, X, X, dilation=4, implementation=name)
    ones = X + 1
    for name in (None, "xla"):
      assert (pallas_kernels.dilated_attention(ones, ones, ones, dilation=4, implementation=name) == 1).all()
  finally:
    cudnn._of_this_jax.cache_clear()


def test_none_scans_a_few_tokens_in_plain_jax(monkeypatch):
  """Whatever the batch: a kernel would fill a decode step's one token up to 128."""
  sizes = []
  monkeypatch.setattr(dispatch, "resolve", lambda *arguments: [sizes.append(arguments[3]), "xla"][1])
  for tokens in (1, 63, 64):
    x = np.zeros((4, tokens, 2, 8), np.float32)
    pallas_kernels.gated_scan(x, (x,))
  assert sizes == [0, 0, 4 * 64 * 16]


def test_mosaic_serves_hopper_alone(monkeypatch):
  of = lambda capability: [type("Device", (), {
      "platform": "gpu", "compute_capability": capability, "device_kind": "a GPU"})]
  served = {}
  for capability in ("7.5", "8.0", "9.0", "10.0"):
    monkeypatch.setattr(jax, "devices", lambda capability=capability: of(capability))
    served[capability] = [dispatch.check_device(name) is None for name in ("xla", "cudnn", "mosaic_gpu")]
  assert served == {"7.5": [True, False, False], "8.0": [True, True, False], "9.0": [True, True, True],
                    "10.0": [True, True, False]}


def test_none_takes_the_fastest_that_serves(monkeypatch):
  def taken(size, reason=None):
    return dispatch.resolve("gated_scan", None, {"xla": dispatch.serves_all, "mosaic_gpu": lambda: reason}, size)

  assert taken(10**9) == "xla"  # nothing is known of this device
  monkeypatch.setattr(dispatch, "FASTEST", {"cpu": {"gated_scan": {"mosaic_gpu": 100}}})
  assert [taken(99), taken(100), taken(100, "takes no such thing")] == ["xla", "mosaic_gpu", "xla"]
  monkeypatch.setattr(jax, "device_count", lambda: 2)
  assert taken(100) == "xla"
  mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
  inside = []
  jax.shard_map(lambda x: [inside.append(taken(100)), x][1], mesh=mesh, in_specs=jax.P("rows"),
                out_specs=jax.P("rows"))(np.zeros(1))
  assert inside == ["mosaic_gpu"]
