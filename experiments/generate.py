"""Continues a text with a trained model, under any mode.

Claim: a model that was trained densely writes under a mode that is named only here.
Command: python -m experiments.generate --checkpoint=runs/pretrain/checkpoints --prompt="import os" --mode=dilated:16
Result: a text for each mode; experiments/pages/language.md has two.
Cost: not timed; most of it is compiling, a program for each mode.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any, cast

import jax
import numpy as np
from absl import flags

import rat_jax
from experiments.shared import command, inputs, output, over_mesh
from rat_jax import RATPlusLM
from rat_jax.data import Tokenizer
from rat_jax.modes import Mode
from rat_jax.parallel import processes
from rat_jax.paths import read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(over_mesh.Settings):
  checkpoint: pathlib.Path
  dtype: str | None
  tokenizer: Tokenizer
  mode: tuple[Mode, ...]
  prefill_mode: Mode | None
  prompt: str
  prompt_file: pathlib.Path | None
  max_new_tokens: int
  temperature: float
  top_p: float


def define_flags() -> None:
  command.define_common_flags("generate")
  command.define_path("checkpoint", "Folder of checkpoints, or of save_pretrained.", required=True)
  over_mesh.define_flags()
  command.define_dtype()
  command.define_tokenizer()
  command.define_modes(["dense"], "The mode; repeat the flag for several.")
  command.define_prefill_mode()
  flags.DEFINE_string("prompt", "def main():\n", "The text to continue.")
  command.define_path("prompt_file", "A file with the text to continue, instead of --prompt.")
  flags.DEFINE_integer("max_new_tokens", 256, "Tokens to add at most.", lower_bound=1)
  flags.DEFINE_float("temperature", 0.7, "0 takes the likeliest token.", lower_bound=0.0)
  flags.DEFINE_float("top_p", 0.95, "Sample among the likeliest tokens of this total probability.")


def main(settings: Settings) -> None:
  if settings.prompt_file:
    settings.refuse(("prompt",), f"--prompt_file={settings.prompt_file} is the text to continue; leave one of them"
                    " out.")
  if settings.temperature == 0 and settings.top_p != 1:
    settings.refuse(("top_p",), "--temperature=0 takes the likeliest token and samples none; leave one of them out.")
  tokenizer = inputs.tokenizer_of(settings, settings.checkpoint)
  config, params, notes = inputs.load_model(settings.checkpoint, settings.made_mesh())
  inputs.check_tokenizer(tokenizer, config, notes)
  config, end = dataclasses.replace(config, dtype=cast(Any, settings.dtype or config.dtype)), tokenizer.eod_id
  text = read_text(settings.prompt_file) if settings.prompt_file else settings.prompt
  prompt = tokenizer.encode(text)
  if not prompt:
    raise ValueError("the prompt is empty; give at least one token.")
  inputs.check_length(settings.checkpoint, len(prompt) + settings.max_new_tokens,
                      f"a prompt of {len(prompt)} tokens with --max_new_tokens={settings.max_new_tokens}")
  for mode in settings.mode:
    start = time.perf_counter()
    new = rat_jax.generate(RATPlusLM(config), params, np.array([prompt], np.int32), mode=mode,
                           prefill_mode=settings.prefill_mode, max_new_tokens=settings.max_new_tokens,
                           temperature=settings.temperature, top_p=settings.top_p, eos_id=end,
                           key=jax.random.key(settings.seed))
    ids = processes.on_host(new)[0].tolist()
    continued = tokenizer.decode_after(prompt, ids[:ids.index(end)] if end in ids else ids)
    output.say(f"--- {mode} ({time.perf_counter() - start:.1f} s with compilation)\n{text}|{continued}\n")


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
