"""What the tests share: the authors' fixtures as our objects, small models, and the tolerances."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest
from hypothesis import settings

from experiments.aot.chips import programs_for
from rat_jax import Dense, Dilated, PerLayer, RATPlusConfig, RATPlusLM
from rat_jax.convert import from_ratplus_state_dict

# The interpreter of GPU kernels blocks one thread of XLA's pool for each warpgroup; with a thread for each of a few
# processors it would wait for ever. XLA reads this when its first array is made.
os.environ.setdefault("NPROC", "16")

# The tests compile many small programs and run each a few times. On a GPU they are about what is compiled. XLA compiles
# such programs fastest in one piece. The older of its two emitters of fusions takes half the time; jax 0.12 knows that
# emitter no more, and stops at unknown flags.
_ON_CPU = os.environ.get("JAX_PLATFORMS") == "cpu"
_QUICK_TO_COMPILE = " --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_multi_thread_eigen=false"
if jax.__version_info__ < (0, 11):
  _QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_disable_most_optimizations", _ON_CPU)
if _ON_CPU:
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + _QUICK_TO_COMPILE

# For tests that compile programs for TPUs, of which none is needed.
tpu_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="there is no compiler for TPUs;"
                                  " `make test-slow-tpu` installs it")

# Every compiled program holds memory maps, of which Linux allows a process 65530; XLA aborts when they are used up.
_MOST_MAPS = 30000
_TESTS_BETWEEN_COUNTS = 12  # which hold some 10000 at the most
_tests_done = itertools.count(1)


@pytest.fixture(autouse=True)
def _bounded_number_of_programs():
  yield
  if next(_tests_done) % _TESTS_BETWEEN_COUNTS == 0 and _memory_maps() > _MOST_MAPS:
    jax.clear_caches()


def _memory_maps():
  """How many this process holds; 0 where the system does not say."""
  maps = pathlib.Path("/proc/self/maps")
  return maps.read_bytes().count(b"\n") if maps.exists() else 0


def examples(few):
  """Settings of hypothesis: `few` examples, each of which compiles; EXAMPLES says another number."""
  return settings(deadline=None, max_examples=int(os.environ.get("EXAMPLES", few)))


def first_quick(count, cases):
  """Cases for `parametrize`: the first `count` of them run in `make test`, the others in `make test-ci`."""
  return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if i < count else pytest.mark.slow)
          for i, case in enumerate(cases)]


@pytest.fixture
def true_float32():
  """Products of float32 arrays are float32, also on devices that would rather round."""
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture
def on_h200():
  """Programs are for an H200."""
  with programs_for("NVIDIA H200"):
    yield


ROOT = pathlib.Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"

# Our own paths against each other: the largest difference, as a share of the tensor's largest entry.
OPERATION = 1e-5          # float32, one operation
WHOLE_MODEL = 1e-4        # float32, logits
GRADIENT = 1e-4           # float32, per tensor
BFLOAT16 = 2e-2
# The argmax of bfloat16 logits must agree where the two largest differ by more than this share.
BFLOAT16_MARGIN = 4e-2


def assert_close(actual, expected, relative, message=""):
  """Max abs difference <= relative x the largest entry of `expected`."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, (actual.shape, expected.shape, message)
  assert np.isfinite(actual).all(), f"not finite: {message}"
  error, scale = np.abs(actual - expected).max(initial=0.0), np.abs(expected).max(initial=0.0)
  assert error <= relative * max(scale, 1e-30), f"{message}: error {error:.3g}, largest entry {scale:.3g}"


def assert_logits_close(actual, expected, dtype, message=""):
  """The tolerance of whole-model logits in a compute type; in bfloat16 also the argmax beyond the margin."""
  assert_close(actual, expected, WHOLE_MODEL if dtype == "float32" else BFLOAT16, message)
  if dtype == "bfloat16":
    actual, expected = np.asarray(actual), np.asarray(expected)
    second, first = np.moveaxis(np.sort(expected, axis=-1)[..., -2:], -1, 0)
    clear = first - second > BFLOAT16_MARGIN * np.abs(expected).max()
    assert (actual.argmax(-1) == expected.argmax(-1))[clear].all(), message


_PROGRAMS = tempfile.TemporaryDirectory()  # compiled by one process, for the next


def run_python(*arguments, devices=1, check=True, optimize=False, kill_at=None):
  """Python in a process of its own, from the root: what it prints, or, unchecked, its errors.

  With `kill_at` it is killed as soon as that path exists, and must not have come to its end.
  """
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
                              "JAX_COMPILATION_CACHE_DIR": _PROGRAMS.name,
                              "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                              "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(not optimize)),
                              "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
                                           f"{'' if optimize else _QUICK_TO_COMPILE}"}
  with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE, text=True) as process:
    if kill_at:
      while process.poll() is None and not kill_at.exists():
        time.sleep(0.001)
      process.kill()
    printed, errors = process.communicate()
  if check:
    assert process.returncode == (-signal.SIGKILL if kill_at else 0), errors[-2000:]
    return printed
  return errors


@contextlib.contextmanager
def compilations():
  """A list that gains an entry for every program that is compiled inside."""
  compiled = []

  def listen(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


# {what: the worst error that was seen}; tests/kernels fill it.
WORST: dict[tuple[str, ...], float] = {}


def pytest_terminal_summary(terminalreporter):
  for of, error in sorted(WORST.items()):
    terminalreporter.write_line(" | ".join([*of, f"{error:.1e}"]))


class Fixture:
  """One of the authors' .npz files: its arrays, and the weights as our config, model and parameters."""

  def __init__(self, name):
    self.arrays = dict(np.load(FIXTURES / "ratplus" / f"{name}.npz", allow_pickle=False))

  def __getitem__(self, key):
    return self.arrays[key]

  def names(self, key):
    return [str(name) for name in self.arrays[key]]

  def state_dict(self, prefix="params"):
    return {k.removeprefix(prefix + "/"): v for k, v in self.arrays.items() if k.startswith(prefix + "/")}

  @property
  def config(self):
    weights = self.state_dict()
    vocab, width = weights["embedding.wte.weight"].shape
    layers = sum(name.endswith("in_proj.weight") for name in weights)
    return RATPlusConfig(vocab_size=vocab, num_layers=layers, embed_dim=width, num_heads=int(self["num_heads"]),
                         memory=bool(self["memory"]))

  @property
  def model(self):
    return RATPlusLM(self.config)

  def params(self, prefix="params"):
    return jax.tree.map(np.asarray, from_ratplus_state_dict(self.state_dict(prefix), self.config))

  def modes(self):
    """{configuration: mode}, from the authors' (D, W, S0) per layer."""
    return {name: mode_of(layers) for name, layers in zip(self.names("config_names"), self["configs"], strict=True)}


def mode_of(layers):
  """The mode of the authors' (D, W, S0) per layer; D = -1 is no dilation."""
  modes = [Dilated(None if d == -1 else int(d), int(w), int(s)) for d, w, s in layers]
  modes = [Dense() if mode == Dilated(1) else mode for mode in modes]
  return modes[0] if len(set(modes)) == 1 else PerLayer(tuple(modes))


@pytest.fixture(scope="session")
def authors():
  """Loads one of the authors' files by name, once."""
  loaded = {}

  def load(name):
    if name not in loaded:
      loaded[name] = Fixture(name)
    return loaded[name]

  return load
