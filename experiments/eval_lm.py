"""Held-out bits per byte of a trained model under any list of modes, beside what each reads and stores.

Command: python -m experiments.eval_lm --checkpoint=runs/pretrain/checkpoints --mode=dense --mode=dilated:16
"""

from __future__ import annotations

import math

import numpy as np
from absl import flags

import rat_jax
from experiments import common
from rat_jax import RATPlusLM
from rat_jax.evaluate import loss_by_mode

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of checkpoints, or of save_pretrained.",
                                 required=True)
DATA = flags.DEFINE_string("data", None, "Prepared folder, text file or folder. Default: the standard library's text.")
MODES = common.define_modes(
    ["dense", "dilated:4", "dilated:8", "dilated:16", "dilated:32", "dilated:64",
             "dilated:16,window=32,sinks=4", "streaming_llm:32"], "A mode; repeat the flag for several.")
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens in a sequence.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Sequences at a time.", lower_bound=1)
PROMPT_LENGTH = flags.DEFINE_integer(
    "prompt_length", None, "So many first tokens are a prompt; what comes after is scored, as decode steps. Needed by"
    " SnapKV.", lower_bound=1)
WINDOWS = flags.DEFINE_integer("windows", 512, "Held-out sequences that are scored.", lower_bound=1)


def main() -> None:
  folder = common.workdir("eval_lm")
  config, params, notes = common.load_model(CHECKPOINT.value)
  data = common.corpus(DATA.value, folder / "data")["heldout"]
  common.check_data(data, config, notes)
  batches = data.epoch(batch_size=BATCH_SIZE.value, length=LENGTH.value, limit=WINDOWS.value)
  losses = loss_by_mode(RATPlusLM(config), params, batches, MODES.value, PROMPT_LENGTH.value)
  unit = "byte" if data.sidecar.tokenizer == "bytes" else "token"
  rows, result = [], {}
  for mode, nats in losses.items():
    keys = float(np.mean(rat_jax.tokens_read(config, mode, LENGTH.value, PROMPT_LENGTH.value)))
    size = rat_jax.cache_bytes(config, mode, 1, LENGTH.value, PROMPT_LENGTH.value)
    result[str(mode)] = {"bits_per_token": nats / math.log(2), "keys_per_query": keys, "cache_bytes": size}
    rows.append([str(mode), f"{keys:g}", f"{size:,}", f"{nats / math.log(2):.4f}"])
  table = common.markdown_table(["mode", "keys per query", "cache bytes", f"bits per {unit}"], rows)
  print(table)
  (folder / "table.md").write_text(table + "\n")
  common.write_json(folder / "results.json", {"checkpoint": CHECKPOINT.value, "notes": notes, "length": LENGTH.value,
                                              "prompt_length": PROMPT_LENGTH.value,
                                              "windows": WINDOWS.value, "device": common.device(), "modes": result})


if __name__ == "__main__":
  common.run(main)
