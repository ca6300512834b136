# ---
# jupyter:
#   # ruff: noqa: E402
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # rat_jax on a TPU: are the kernels right, and how fast are they?
#
# The kernels for TPUs were tested in an interpreter and compiled for v5e, v5p, v6e and TPU7x, but nobody has timed
# them. On one chip this notebook compares them with plain JAX, times them beside what was predicted, and prints the
# line that settles when they are taken. It should take less than 15 minutes.

# %% [markdown]
# ## Install
#
# Put the address of the repository into `REPO_URL`. Where rat_jax is here with its sources, nothing is installed.

# %%
import importlib.util
import os
import pathlib
import subprocess
import sys

REPO_URL = "https://github.com/OWNER/REPOSITORY"  # fill in
package = importlib.util.find_spec("rat_jax")
root = pathlib.Path(package.origin).parents[1] if package and package.origin else pathlib.Path("none")
if not (root / "experiments").is_dir():  # not the sources, but perhaps what an earlier run of this cell installed
  root = pathlib.Path("rat_jax_sources")
if not (root / "experiments").is_dir():
  if "OWNER/REPOSITORY" in REPO_URL:
    raise SystemExit("Put the address of the repository into REPO_URL, above, and run this cell again.")
  subprocess.run(["git", "clone", "--quiet", "--depth=1", REPO_URL, str(root)], check=True)
  subprocess.run([sys.executable, "-m", "pip", "-qq", "install", "--upgrade", f"{root}[tpu,scripts]"], check=True)
  if "jax" in sys.modules:
    raise SystemExit("jax was imported before it was upgraded. Runtime > Restart session, then run from the top.")
sys.path.insert(0, str(root.resolve()))

# %% [markdown]
# ## The device
#
# `RAT_JAX_SHORT=1` makes the notebook a rehearsal: on any device, in Pallas' interpreter, with small shapes. Its times
# mean nothing then.

# %%
import contextlib

import jax

import rat_jax
from experiments.aot import chips, kernel_cases
from experiments.aot.interpreted import kernels as interpreted

SHORT = os.environ.get("RAT_JAX_SHORT") == "1"
KIND = jax.devices()[0].device_kind
chip = chips.CHIPS["v5e"] if SHORT else chips.chip_of_device(jax.devices()[0])
if chip is None:
  raise SystemExit(f"{KIND} is no TPU that the kernels are for. In Colab choose Runtime > Change runtime type > TPU.")
print(jax.__version__, jax.devices())
stack = contextlib.ExitStack()
if SHORT:
  stack.enter_context(interpreted())

# %% [markdown]
# ## Are they right?
#
# Results and gradients of every kernel in float32 and bfloat16, against plain JAX. If all pass, a file says so. From
# then on `implementation=None` takes the kernels whose place on this kind of device is predicted. `make test-tpu` in
# the repository tests many more shapes, against float64.

# %%
if SHORT:
  import tempfile

  from pallas_kernels import check
  from pallas_kernels.scan.arg_specs import ArgSpec

  os.environ.setdefault("RAT_JAX_CACHE", tempfile.mkdtemp())  # what passes here says nothing about the kernels
  check.SPECS = {"gated_scan": (ArgSpec(1, 130, 1, 128, "float32", "float32"),)}
found = rat_jax.check_device()
print(found)
if not found.passed:
  raise SystemExit("A kernel is wrong on this device: plain JAX is taken. Please report what is printed above.")

# %% [markdown]
# ## How fast are they?
#
# Milliseconds of every kernel, what was predicted for this chip, the floor that inputs, results and products set
# alone, and plain JAX. A case that does not fit this chip's memory is left out.

# %%
if SHORT:
  kernel_cases.CASES = tuple(kernel_cases.KernelCase(name, spec) for name, spec in (
      ("memory, short", kernel_cases.Scan(1, 256, 1)),
      ("decode, short", kernel_cases.Decode(2, 128, 2, 2, block=16, chosen=2)),
      ("prompt, short", kernel_cases.Sparse(1, 128, 1, 1, block=32, chosen=2))))
cells, seconds = [], {}
for case in kernel_cases.CASES:
  cells.append(case.counted())
  try:
    seconds[case.label] = kernel_cases.timed(case)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
  print(case.label, "does not fit" if case.label not in seconds else f"{1e3 * seconds[case.label][0]:.3g} ms")
print(kernel_cases.measured_table(cells, seconds, chip))

# %% [markdown]
# ## From which sizes on?
#
# The last line is this device's entry for `pallas_kernels/crossovers.py`: from which size on each kernel was faster
# than plain JAX. Please send it with the table above; it replaces a prediction.

# %%
from absl import flags

from experiments import bench_ops
from experiments.shared.command import settings_of

if not SHORT:  # in this process, which has the chip to itself
  if "crossovers" not in flags.FLAGS:  # else this cell runs again
    bench_ops.define_flags()
  flags.FLAGS(["bench_ops", "--crossovers", "--rounds=3"])
  bench_ops.main(settings_of(bench_ops.Settings))
stack.close()
