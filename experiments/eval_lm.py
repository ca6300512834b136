"""Held-out bits per token and byte of a trained model under any list of modes, beside what each reads and stores.

A byte's bits are a token's times the tokens per byte of the whole held-out file, so tokenizers can be compared.
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
from rat_jax.plan import layer_modes

CHECKPOINT = common.define_path("checkpoint", "Folder of checkpoints, or of save_pretrained.", required=True)
DATA = common.define_path("data", "Prepared folder, text file or folder. Default: the standard library's text.")
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
  config, params, notes = common.load_model(CHECKPOINT.value)
  check_prompt(config.num_layers)
  folder = common.workdir("eval_lm")
  data = common.corpus(DATA.value, folder / "data")["heldout"]
  common.check_data(data, config, notes)
  batches = data.epoch(batch_size=BATCH_SIZE.value, length=LENGTH.value, limit=WINDOWS.value)
  losses = loss_by_mode(RATPlusLM(config), params, batches, MODES.value, PROMPT_LENGTH.value)
  rows, result = [], {}
  for mode, nats in losses.items():
    keys = float(np.mean(rat_jax.tokens_read(config, mode, LENGTH.value, PROMPT_LENGTH.value)))
    size = rat_jax.cache_bytes(config, mode, 1, LENGTH.value, PROMPT_LENGTH.value)
    bits, of_byte = nats / math.log(2), common.bits_per_byte(nats, data.sidecar)
    result[str(mode)] = {"bits_per_token": bits, "bits_per_byte": of_byte, "keys_per_query": keys, "cache_bytes": size}
    rows.append([str(mode), f"{keys:g}", f"{size:,}", f"{bits:.4f}", "" if of_byte is None else f"{of_byte:.4f}"])
  table = common.markdown_table(["mode", "keys per query", "cache bytes", "bits per token", "bits per byte"], rows)
  print(table)
  (folder / "table.md").write_text(table + "\n", encoding="utf-8")
  common.write_json(folder / "results.json", {"checkpoint": CHECKPOINT.value, "notes": notes, "length": LENGTH.value,
                                              "prompt_length": PROMPT_LENGTH.value,
                                              "windows": min(WINDOWS.value, data.windows(LENGTH.value)),
                                              "device": common.device(), "modes": result})


def check_prompt(num_layers: int) -> None:
  """Raises ValueError for a mode that starts when a prompt has ended, where no prompt is given."""
  for mode in MODES.value if PROMPT_LENGTH.value is None else []:
    reasons = [one.after_prompt for one in layer_modes(mode, num_layers) if one.after_prompt]
    if reasons:
      raise ValueError(f"--mode={mode} without --prompt_length: {reasons[0]}; give one, such as"
                       f" --prompt_length={max(1, LENGTH.value // 2)}.")


if __name__ == "__main__":
  common.run(main)
