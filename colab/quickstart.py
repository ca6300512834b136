# ---
# jupyter:
#   # ruff: noqa: E402
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # RAT+ in JAX: train once, choose the attention at inference
#
# A small language model whose keys and values pass through a decaying memory (RAT+, arXiv 2602.18196) is trained
# on the source text of the Python standard library. The same parameters then run under several sparse attention
# modes that read a fraction of the keys, down to one in thirty-two. A plain attention model, trained on the same
# batches, shows what the memory is worth.

# %% [markdown]
# ## Install
#
# Put the address of the repository into `REPO_URL`, or upload an archive of it (rat_jax*.zip or .tar.gz) beside this
# notebook. Colab comes with an older jax than rat_jax needs, so this cell
# brings a newer one, for the accelerator that it finds, before anything imports jax. Where the notebook finds rat_jax
# with its sources, nothing is installed.

# %%
import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

REPO_URL = "https://github.com/OWNER/REPOSITORY"  # fill in, or upload an archive
ARCHIVES = sorted(glob.glob("rat_jax*.zip") + glob.glob("rat_jax*.tar.gz"))


def jax_extra():
  """The variant of jax that fits the accelerator of this machine."""
  if shutil.which("nvidia-smi"):
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = re.match(r"\d+", subprocess.run(query, capture_output=True, text=True).stdout)
    if driver:  # no number where the program is there and the card is not
      return "[cuda13]" if int(driver[0]) >= 580 else "[cuda12]"  # CUDA 13 needs driver 580 or newer
  named = any(os.environ.get(name) for name in ("COLAB_TPU_ADDR", "TPU_NAME", "TPU_ACCELERATOR_TYPE"))
  return "[tpu]" if named or glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*") else ""


def pip(*arguments):
  subprocess.run([sys.executable, "-m", "pip", "-qq", *arguments], check=True)


def numbers(version):
  return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def installed_sources():
  """The repository whose rat_jax is imported here; None where there is none, or only the package."""
  package = importlib.util.find_spec("rat_jax")
  if package is None or not package.origin:  # a mere folder of that name has no origin
    return None
  root = pathlib.Path(package.origin).parents[1]
  return root if (root / "experiments" / "pictures").is_dir() else None


def fetched_sources():
  """The repository, from an archive beside the notebook or from REPO_URL, in a folder of its own."""
  folder = pathlib.Path("rat_jax_sources")
  shutil.rmtree(folder, ignore_errors=True)
  if ARCHIVES:
    shutil.unpack_archive(ARCHIVES[-1], folder)
  else:
    subprocess.run(["git", "clone", "--quiet", "--depth=1", REPO_URL, str(folder)], check=True)
  return next(folder.glob("**/pyproject.toml")).parent.resolve()


root = installed_sources()
if root is not None:
  print("rat_jax is here already: nothing to install.")
elif "OWNER/REPOSITORY" in REPO_URL and not ARCHIVES:
  raise SystemExit("Put the address of the repository into REPO_URL, above, or upload an archive of it (rat_jax*.zip or"
                   " rat_jax*.tar.gz), and run this cell again.")
else:
  # jax's GPU plugins must have jax's own version: those that came with the older jax go first.
  pip("uninstall", "--yes", *(f"jax-cuda{cuda}-{part}" for cuda in (12, 13) for part in ("plugin", "pjrt")))
  root = fetched_sources()
  pip("install", "--upgrade", f"jax{jax_extra()}>=0.10.2", f"{root}[scripts]")
  importlib.invalidate_caches()
sys.path.insert(0, str(root))

if numbers(importlib.metadata.version("jax")) < (0, 10, 2):
  raise SystemExit(f"jax {importlib.metadata.version('jax')} is too old: rat_jax needs 0.10.2 or newer.")
for name in ("jax", "numpy"):
  if name in sys.modules and numbers(sys.modules[name].__version__) != numbers(importlib.metadata.version(name)):
    raise SystemExit(f"{name} was imported before it was upgraded. Runtime > Restart session, then run from the top.")
print("jax", importlib.metadata.version("jax"))

# %% [markdown]
# ## Device and settings
#
# `RAT_JAX_STEPS` (batches of training), `RAT_JAX_EVAL_WINDOWS` (held-out sequences that are scored) and
# `RAT_JAX_RESULTS` (the file that the numbers go to) are environment variables that shorten or redirect a run. As it
# stands, a run takes about four minutes on two CPU cores. An accelerator gets larger batches than a CPU.

# %%
import dataclasses
import json
import math
import tempfile
import time

import jax
import numpy as np
from IPython.display import display

import rat_jax
from experiments import pictures
from rat_jax import Dense, Dilated, RATPlusConfig, RATPlusLM, StreamingLLM
from rat_jax.data import BYTES, prepare_standard_library
from rat_jax.evaluate import loss_by_mode
from rat_jax.train import cross_entropy, init_train_state, make_optimizer, train

# %matplotlib inline
STEPS = int(os.environ.get("RAT_JAX_STEPS", "600"))
EVAL_WINDOWS = int(os.environ.get("RAT_JAX_EVAL_WINDOWS", "128"))
RESULTS = pathlib.Path(os.environ.get("RAT_JAX_RESULTS", "quickstart_results.json"))
LENGTH = 256
BATCH_SIZE = 8 if jax.default_backend() == "cpu" else 32
start = time.perf_counter()
print(jax.devices())

# %% [markdown]
# ## Text
#
# A token is a byte, so the loss is in bits per byte: 8 is guessing. Whole files are held out for the evaluation.

# %%
folder = pathlib.Path(tempfile.mkdtemp())
data = prepare_standard_library(folder)
print(f"{data['train'].sidecar.tokens:,} bytes to train on, {data['heldout'].sidecar.tokens:,} held out")

# %% [markdown]
# ## Train RAT+, and attention to compare
#
# Every batch makes two updates of RAT+: one under `Dilated(16)`, where a query reads itself and the last token of
# every block of sixteen, and one under `Dense()`. This is the paper's active recurrence learning: the memory learns
# to carry what dilation skips. The attention model has no memory, and the gate's parameters as MLP width instead; it
# makes two dense updates on the same batches.

# %%
config = RATPlusConfig(vocab_size=256, num_layers=3, embed_dim=64, num_heads=4, init_std=None)
attention_config = dataclasses.replace(config, memory=False, mlp_dim=config.mlp_dim + config.embed_dim // 2)
arms = {"RAT+": (config, (Dilated(16), Dense())), "attention": (attention_config, (Dense(), Dense()))}


def bits_by_mode(model, params, modes):
  """Held-out bits per byte under every mode."""
  batches = data["heldout"].epoch(batch_size=BATCH_SIZE, length=LENGTH, limit=EVAL_WINDOWS)
  return {mode: nats / math.log(2) for mode, nats in loss_by_mode(model, params, batches, modes).items()}


def train_arm(name, config, modes):
  """(model, parameters, bits per byte before training)."""
  model, log, begin = RATPlusLM(config), folder / f"{name}.jsonl", time.perf_counter()

  def batch_at(step):
    if step and step % max(10, STEPS // 60 * 10) == 0:
      last = json.loads(log.read_text().splitlines()[-1])["loss"][-1] / math.log(2)
      print(f"{name}: batch {step} of {STEPS}, {last:.2f} bits per byte, {time.perf_counter() - begin:.0f} s")
    return data["train"].batch(step, batch_size=BATCH_SIZE, length=LENGTH)

  params = model.init(jax.random.key(0), batch_at(0)["tokens"])["params"]
  untrained = bits_by_mode(model, params, [Dense()])[Dense()]
  optimizer = make_optimizer(6e-3, total_steps=STEPS, warmup_steps=STEPS // 10)
  state = init_train_state(model, params, optimizer)
  state = train(model, optimizer, state, batch_at, steps=STEPS, modes=modes, metrics_path=log)
  return model, state.params, untrained


trained = {name: train_arm(name, *arm) for name, arm in arms.items()}
for name, (_, params, untrained) in trained.items():
  print(f"{name}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters, {untrained:.2f} bits per byte untrained")

# %% [markdown]
# ## Switch modes
#
# A mode is an argument of the call, and the parameters stay as they are. Here is one held-out batch under three
# modes; `jit` compiles one program for each.

# %%
model, params, _ = trained["RAT+"]
batch = next(data["heldout"].epoch(batch_size=BATCH_SIZE, length=LENGTH))
apply = jax.jit(model.apply, static_argnames="mode")
for mode in (Dense(), Dilated(16), StreamingLLM(32, 4)):
  logits = apply({"params": params}, batch["tokens"], mode=mode)
  nats, count = cross_entropy(logits, batch["targets"])
  print(f"{mode!s:20} {nats / count / math.log(2):.3f} bits per byte")

# %% [markdown]
# ## Every mode, both models
#
# Held-out bits per byte, and how many keys the last query of a sequence reads. `Dilated(1)` is dense attention
# written otherwise, so its row must repeat the first. `window` adds the tokens before the query, `sinks` the first
# tokens of the sequence; `StreamingLLM` reads these two alone.

# %%
modes = [Dense(), *(Dilated(d) for d in (1, 4, 8, 16, 32)), Dilated(16, window=32, sinks=4), StreamingLLM(32, 4)]
keys = {mode: rat_jax.tokens_read(config, mode, LENGTH)[0] for mode in modes}  # every layer reads as many
bits = {name: bits_by_mode(model, params, modes) for name, (model, params, _) in trained.items()}

print(f"{'mode':32}{'keys per query':>14}" + "".join(f"{name:>12}" for name in bits))
for mode in modes:
  print(f"{mode!s:32}{keys[mode]:14}" + "".join(f"{by_mode[mode]:12.3f}" for by_mode in bits.values()))

# %% [markdown]
# ## Who sees whom
#
# `visible` is the definition of every mode: row t is a query, and a dark cell is a key that it reads.

# %%
display(pictures.masks(modes, length=64))

# %% [markdown]
# ## Quality against keys per query
#
# Fewer keys cost less to read, and lower is better. The line joins plain dilation, the hollow marks have a window.
#
# In our run on a CPU, reading 16 keys in place of 256 cost RAT+ 0.04 bits per byte and attention 1.9. A window serves
# attention too, as most of what predicts the next byte is near; RAT+ needs none. Attention never saw dilation in
# training, which RAT+ did: `make quickstart` in the repository also trains attention on the sparse branch.

# %%
points = {name: {} for name in bits}
for name, by_mode in bits.items():
  for mode, value in by_mode.items():
    plain = mode == Dense() or (isinstance(mode, Dilated) and not mode.window)
    points[name].setdefault("dense, dilated" if plain else str(mode), []).append((keys[mode], value))
display(pictures.against_keys(points, "held-out bits per byte", "The mode is chosen at inference"))

# %% [markdown]
# ## Generate
#
# A held-out text, continued under two modes by the same random numbers.

# %%
model, params, _ = trained["RAT+"]
prompt = np.asarray(data["heldout"].tokens[:LENGTH // 2], np.int32)[None]
print(f"--- prompt\n{BYTES.decode(prompt[0])}")
for mode in (Dense(), Dilated(16)):
  new = rat_jax.generate(model, params, prompt, mode=mode, max_new_tokens=LENGTH // 2, temperature=0.7, top_p=0.95,
                         key=jax.random.key(0))
  print(f"\n--- {mode}\n{BYTES.decode_after(prompt[0], np.asarray(new)[0])}")

# %% [markdown]
# ## Keep the numbers

# %%
results = {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "steps": STEPS, "batch_size": BATCH_SIZE, "length": LENGTH, "eval_windows": EVAL_WINDOWS,
    "seconds": time.perf_counter() - start,
    "parameters": {name: sum(x.size for x in jax.tree.leaves(params)) for name, (_, params, _) in trained.items()},
    "keys_per_query": {str(mode): count for mode, count in keys.items()},
    "untrained_bits_per_byte": {name: untrained for name, (_, _, untrained) in trained.items()},
    "bits_per_byte": {name: {str(mode): value for mode, value in by_mode.items()} for name, by_mode in bits.items()},
}
RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
print(f"{results['seconds']:.0f} s in all; the numbers are in {RESULTS}.")
