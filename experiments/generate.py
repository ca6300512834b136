"""Continues a text with a trained model, under any mode.

Command: python -m experiments.generate --checkpoint=runs/pretrain/checkpoints --prompt="import os" --mode=dilated:16
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, cast

import jax
import numpy as np
from absl import flags

import rat_jax
from experiments import common
from rat_jax import RATPlusLM
from rat_jax.paths import read_text

CHECKPOINT = common.define_path("checkpoint", "Folder of checkpoints, or of save_pretrained.", required=True)
DTYPE = common.define_dtype()
TOKENIZER = common.define_tokenizer()
MODES = common.define_modes(["dense"], "The mode; repeat the flag for several.")
PREFILL_MODE = common.define_prefill_mode()
PROMPT = flags.DEFINE_string("prompt", "def main():\n", "The text to continue.")
PROMPT_FILE = common.define_path("prompt_file", "A file with the text to continue, instead of --prompt.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Tokens to add at most.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 takes the likeliest token.", lower_bound=0.0)
TOP_P = flags.DEFINE_float("top_p", 0.95, "Sample among the likeliest tokens of this total probability.")


def main() -> None:
  if PROMPT_FILE.value:
    common.refuse(("prompt",), f"--prompt_file={PROMPT_FILE.value} is the text to continue; leave one of them out.")
  if TEMPERATURE.value == 0 and TOP_P.value != 1:
    common.refuse(("top_p",), "--temperature=0 takes the likeliest token and samples none; leave one of them out.")
  config, params, notes = common.load_model(CHECKPOINT.value)
  common.check_tokenizer(TOKENIZER.value, config, notes)
  config, end = dataclasses.replace(config, dtype=cast(Any, DTYPE.value or config.dtype)), TOKENIZER.value.eod_id
  text = read_text(PROMPT_FILE.value) if PROMPT_FILE.value else PROMPT.value
  prompt = TOKENIZER.value.encode(text)
  if not prompt:
    raise ValueError("the prompt is empty; give at least one token.")
  for mode in MODES.value:
    start = time.perf_counter()
    new = rat_jax.generate(RATPlusLM(config), params, np.array([prompt], np.int32), mode=mode,
                           prefill_mode=PREFILL_MODE.value, max_new_tokens=MAX_NEW_TOKENS.value,
                           temperature=TEMPERATURE.value, top_p=TOP_P.value, eos_id=end,
                           key=jax.random.key(common.SEED.value))
    ids = np.asarray(new)[0].tolist()
    continued = TOKENIZER.value.decode_after(prompt, ids[:ids.index(end)] if end in ids else ids)
    print(f"--- {mode} ({time.perf_counter() - start:.1f} s with compilation)\n{text}|{continued}\n")


if __name__ == "__main__":
  common.run(main)
