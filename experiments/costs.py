"""What a preset weighs, and what each mode reads and stores of it at several lengths. Runs no model.

Claim: what a mode reads and stores follows from its parameters alone.
Command: python -m experiments.costs --preset=ratplus-7b
A retrofit: python -m experiments.costs --preset=olmo2-7b --memory
Result: a table by length and mode.
Cost: seconds, on any machine.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import rat_jax
from experiments.shared import command, output
from rat_jax import RATPlusConfig, RATPlusLM
from rat_jax.convert.added_memory import GATE_BIAS
from rat_jax.modes import Mode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(command.Settings):
  preset: str
  memory: bool | None
  length: tuple[int, ...]
  mode: tuple[Mode, ...]


def define_flags() -> None:
  command.define_common_flags("costs")
  flags.DEFINE_string("preset", "ratplus-7b", "The model (RATPlusConfig.preset).")
  flags.DEFINE_bool("memory", None, "With a memory or without one. Default: as the preset is.")
  flags.DEFINE_multi_integer("length", [4096, 32768, 131072], "Tokens of a row; repeat the flag for several.")
  command.define_modes(
      ["dense", "dilated:16", "dilated:64", "dilated:16,window=256,sinks=4", "streaming_llm:1024", "quest:0.0625",
       "moba:0.0625", "snapkv:0.0625", "dilated_topk:64,8"], "A mode; repeat the flag for several.")


def main(settings: Settings) -> None:
  config = RATPlusConfig.preset(settings.preset)
  if settings.memory is not None:
    gate_bias = GATE_BIAS if settings.memory and not config.memory else config.gate_bias  # a retrofit has a bias
    config = dataclasses.replace(config, memory=settings.memory, gate_bias=gate_bias)
  rows: list[list[str]] = []
  result: dict[str, dict[int, dict[str, float]]] = {}
  for mode in settings.mode:
    cells, result[str(mode)] = [], {}
    for length in settings.length:
      keys = float(np.mean(rat_jax.tokens_read(config, mode, length, prompt_length=length - 1)))
      size = rat_jax.cache_bytes(config, mode, 1, length, prompt_length=length)
      result[str(mode)][length] = {"keys_per_query": keys, "cache_bytes": size}
      cells.append(f"{keys:,.0f} / {size / 2**20:,.0f} MiB")
    rows.append([str(mode), *cells])
  table = output.markdown_table(["mode", *(f"T = {length:,}" for length in settings.length)], rows)
  drawn = jax.eval_shape(RATPlusLM(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  size = sum(leaf.size for leaf in jax.tree.leaves(drawn))
  print(f"{settings.preset}, {'with' if config.memory else 'without'} memory: {size / 1e9:.2f}B parameters,"
        f" {2 * size / 1e9:.1f} GB in bfloat16. One row, {config.dtype}: keys that the first step after a prompt reads"
        " / cache bytes\n")
  print(table)
  folder = output.made(settings.workdir)
  (folder / "table.md").write_text(table + "\n", encoding="utf-8")
  output.write_json(folder / "results.json", {"preset": settings.preset, "memory": config.memory, "modes": result})


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
