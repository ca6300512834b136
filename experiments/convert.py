"""Other people's checkpoints to a folder of our own, a leaf at a time: no more than one is held in memory.

Commands: python -m experiments.convert --from=ratplus --source=model.pth --output=runs/ratplus-7b
          python -m experiments.convert --from=olmo2 --source=OLMo-2-1124-7B --output=runs/olmo2-7b-memory
          python -m experiments.convert --from=checkpoints --source=runs/pretrain/checkpoints --output=runs/mine
Then: config, params = rat_jax.load_pretrained("runs/ratplus-7b"). --nomemory leaves OLMo 2 as it was released.
"""

from __future__ import annotations

import hashlib
import json
import pathlib

from absl import flags

from experiments import common
from rat_jax import RATPlusConfig, save_pretrained
from rat_jax.convert.olmo2 import read_olmo2
from rat_jax.convert.ratplus import read_ratplus
from rat_jax.pretrained import write_pretrained
from rat_jax.train import Checkpoints

FROM = flags.DEFINE_enum("from", None, ["ratplus", "olmo2", "checkpoints"], "Whose it is.", required=True)
SOURCE = flags.DEFINE_string("source", None, "A .pth file (ratplus), or a folder.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "A new folder.", required=True)
CONFIG = flags.DEFINE_string("config", None, "JSON file of a RATPlusConfig, or a preset's name, for a .pth file"
                             " without one.")
MEMORY = flags.DEFINE_bool("memory", True, "Give OLMo 2 a memory, which starts as the identity.")
GATE_BIAS = flags.DEFINE_float("gate_bias", -12.0, "Where that memory's gates start.")


def main() -> None:
  source = pathlib.Path(SOURCE.value)
  if FROM.value == "ratplus":
    config, leaves = read_ratplus(source, _config())
  elif FROM.value == "checkpoints":
    config, params, notes = Checkpoints(source).load_params()
    save_pretrained(OUTPUT.value, config, params, about={"source": str(source), "trained": json.dumps(notes)})
    return
  else:
    config, leaves = read_olmo2(source, MEMORY.value, GATE_BIAS.value)
  about = {"source": str(source), "sha256": _digest(source)}
  write_pretrained(OUTPUT.value, config, leaves, about=about)
  print(f"{OUTPUT.value}: {config.num_layers} layers of width {config.embed_dim},"
        f" {'with' if config.memory else 'without'} memory, {config.param_dtype}")


def _config() -> RATPlusConfig | None:
  if CONFIG.value is None:
    return None
  path = pathlib.Path(CONFIG.value)
  return RATPlusConfig.from_json(path.read_text()) if path.is_file() else RATPlusConfig.preset(CONFIG.value)


def _digest(source: pathlib.Path) -> str:
  """SHA-256 of the file, or of the folder's weights in the order of their names."""
  digest = hashlib.sha256()
  for path in [source] if source.is_file() else sorted(source.glob("*.safetensors")):
    with path.open("rb") as file:
      while block := file.read(1 << 24):
        digest.update(block)
  return digest.hexdigest()


if __name__ == "__main__":
  common.run(main)
