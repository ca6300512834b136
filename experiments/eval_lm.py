"""Held-out bits per token and byte of a trained model under any list of modes, beside what each reads and stores.

Claim: RAT+ keeps its quality when a sixteenth of the keys is read, and attention does not.
Command: python -m experiments.eval_lm --checkpoint=runs/pretrain/checkpoints --mode=dense --mode=dilated:16
Result: bits per byte of 99 million parameters: RAT+ 1.076 dense and 1.219 at D=16, attention 1.007 and 4.412.
Cost: not timed; one pass over --windows sequences for each mode.
A byte's bits are a token's times the tokens per byte of the whole held-out file, so tokenizers can be compared.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib

import numpy as np
from absl import flags

import rat_jax
from experiments.shared import command, device, inputs, output, over_mesh
from rat_jax import RATPlusLM, parallel
from rat_jax.evaluate import loss_by_mode
from rat_jax.modes import Mode
from rat_jax.parallel import processes
from rat_jax.plan import layer_modes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(over_mesh.Settings):
  checkpoint: pathlib.Path
  data: pathlib.Path | None
  mode: tuple[Mode, ...]
  length: int
  batch_size: int
  prompt_length: int | None
  windows: int


def define_flags() -> None:
  command.define_common_flags("eval_lm")
  command.define_path("checkpoint", "Folder of checkpoints, or of save_pretrained.", required=True)
  over_mesh.define_flags()
  command.define_path("data", "Prepared folder, text file or folder. Default: the standard library's text.")
  command.define_modes(
      ["dense", "dilated:4", "dilated:8", "dilated:16", "dilated:32", "dilated:64",
       "dilated:16,window=32,sinks=4", "streaming_llm:32"], "A mode; repeat the flag for several.")
  flags.DEFINE_integer("length", 1024, "Tokens in a sequence.", lower_bound=1)
  flags.DEFINE_integer("batch_size", 16, "Sequences at a time.", lower_bound=1)
  flags.DEFINE_integer(
      "prompt_length", None, "So many first tokens are a prompt; what comes after is scored, as decode steps. Needed by"
      " SnapKV.", lower_bound=1)
  flags.DEFINE_integer("windows", 512, "Held-out sequences that are scored.", lower_bound=1)


def main(settings: Settings) -> None:
  mesh = settings.made_mesh()
  inputs.check_length(settings.checkpoint, settings.length, f"--length={settings.length}")
  config, params, notes = inputs.load_model(settings.checkpoint, mesh)
  check_prompt(settings, config.num_layers)
  folder, length, prompt_length = output.made(settings.workdir), settings.length, settings.prompt_length
  data = inputs.corpus(settings.data, folder / "data")["heldout"]
  inputs.check_data(data, config, notes)
  batches = data.epoch(batch_size=settings.batch_size, length=length, limit=settings.windows)
  if mesh is not None:
    batches = (parallel.shard(batch, mesh) for batch in batches)
  losses = loss_by_mode(RATPlusLM(config), params, batches, settings.mode, prompt_length)
  if not processes.is_first():
    return
  rows, result = [], {}
  for mode, nats in losses.items():
    keys = float(np.mean(rat_jax.tokens_read(config, mode, length, prompt_length)))
    size = rat_jax.cache_bytes(config, mode, 1, length, prompt_length)
    bits, of_byte = nats / math.log(2), inputs.bits_per_byte(nats, data.sidecar)
    result[str(mode)] = {"bits_per_token": bits, "bits_per_byte": of_byte, "keys_per_query": keys, "cache_bytes": size}
    rows.append([str(mode), f"{keys:g}", f"{size:,}", f"{bits:.4f}", "" if of_byte is None else f"{of_byte:.4f}"])
  table = output.markdown_table(["mode", "keys per query", "cache bytes", "bits per token", "bits per byte"], rows)
  print(table)
  (folder / "table.md").write_text(table + "\n", encoding="utf-8")
  output.write_json(folder / "results.json", {"checkpoint": str(settings.checkpoint), "notes": notes, "length": length,
                                              "prompt_length": prompt_length,
                                              "windows": min(settings.windows, data.windows(length)),
                                              "device": device.name(), "modes": result})


def check_prompt(settings: Settings, num_layers: int) -> None:
  """Raises ValueError for a mode that starts when a prompt has ended, where no prompt is given."""
  for mode in settings.mode if settings.prompt_length is None else ():
    reasons = [one.after_prompt for one in layer_modes(mode, num_layers) if one.after_prompt]
    if reasons:
      raise ValueError(f"--mode={mode} without --prompt_length: {reasons[0]}; give one, such as"
                       f" --prompt_length={max(1, settings.length // 2)}.")


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
