"""A released model here and in transformers: a prompt and decode steps of one row, timed in one run on one device.

Claim: it decodes densely at least as fast as transformers, and faster under Quest and Dilated.
Command: python -m experiments.bench_released --checkpoint=MODEL.gguf --transformers
Result: milliseconds of a prompt and of a step by implementation, mode and type.
Cost: minutes; most of it is compiling.
--transformers needs the packages torch and transformers, and times them as they are and compiled with a static cache.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import rat_jax
from experiments.needles import seeds
from experiments.shared import command, device, inputs, output
from rat_jax import RATPlusConfig, RATPlusLM
from rat_jax.axes import Params
from rat_jax.modes import Mode

Timed = tuple[str, str, float, float]  # who, type, seconds of a prompt and of a step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(command.Settings):
  checkpoint: pathlib.Path
  mode: tuple[Mode, ...]
  dtype: tuple[str, ...]
  context: int
  decoded: int
  rounds: int
  transformers: bool
  family: str


def define_flags() -> None:
  command.define_common_flags("bench_released")
  command.define_path("checkpoint", "A released model: a folder, or a GGUF file.", required=True)
  command.define_modes(["dense", "quest:0.0625,block=16", "dilated:16"], "A mode; repeat the flag for several.")
  flags.DEFINE_list("dtype", ["float32", "bfloat16"], "Types of parameters and products.")
  flags.DEFINE_integer("context", 4096, "Tokens of the prompt.", lower_bound=1)
  flags.DEFINE_integer("decoded", 32, "Steps that are timed together.", lower_bound=1)
  flags.DEFINE_integer("rounds", 3, "Times that each is timed; the median counts.", lower_bound=1)
  flags.DEFINE_bool("transformers", False, "Time transformers too.")
  flags.DEFINE_string("family", "llama", "The family as which transformers reads it.")


def main(settings: Settings) -> None:
  unknown = sorted(set(settings.dtype) - {"float32", "bfloat16"})
  if unknown or not settings.dtype:
    raise ValueError(f"--dtype={','.join(settings.dtype)}: {unknown} are unknown; use float32, bfloat16 or both.")
  seeds.share_device()
  total = settings.context + settings.decoded
  inputs.check_length(settings.checkpoint, total, f"--context={settings.context} with --decoded={settings.decoded}")
  config, params, _ = inputs.load_model(settings.checkpoint)
  tokens = np.random.default_rng(settings.seed).integers(0, config.vocab_size, (1, settings.context))
  found: list[Timed] = []
  for dtype in settings.dtype:
    of_type = dataclasses.replace(config, dtype=cast(Any, dtype), param_dtype=cast(Any, dtype))
    cast_params = jax.tree.map(lambda leaf, to=dtype: jnp.asarray(leaf, to), params)
    for one in (*ours(settings, of_type, cast_params, tokens), *theirs(settings, of_type, cast_params, tokens)):
      found.append(one)
      output.say(f"{one[0]}, {one[1]}: {1e3 * one[2]:.1f} ms the prompt, {1e3 * one[3]:.2f} ms a step")
  header = ["implementation", "type", f"prompt of {settings.context}, ms", "step, ms", "tokens/s"]
  text = output.markdown_table(header, [[who, dtype, f"{1e3 * prompt:.1f}", f"{1e3 * step:.2f}", f"{1 / step:.1f}"]
                                        for who, dtype, prompt, step in found])
  folder = output.made(settings.workdir)
  print(f"\n{settings.checkpoint.name} on {device.name()}\n\n{text}")
  (folder / "table.md").write_text(text + "\n", encoding="utf-8")
  output.write_json(folder / "results.json", {"device": device.name(), "context": settings.context, "timed": found})


def ours(settings: Settings, config: RATPlusConfig, params: Params, tokens: np.ndarray) -> Iterator[Timed]:
  """Every mode."""
  model, total = RATPlusLM(config), settings.context + settings.decoded + 1

  @functools.partial(jax.jit, donate_argnums=2, compiler_options=rat_jax.compiler_options())
  def step(params, token, cache):
    logits, cache = rat_jax.decode_step(model, params, token, cache)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

  for mode in settings.mode:
    def prompt(mode=mode):
      return jax.block_until_ready(rat_jax.prefill(model, params, tokens, mode=mode, max_length=total))

    def steps(begun):
      logits, cache = begun
      token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
      for _ in range(settings.decoded):
        token, cache = step(params, token, cache)
      jax.block_until_ready(token)

    yield f"rat_jax, {mode}", config.param_dtype, *_timed(settings, prompt, steps)


def theirs(settings: Settings, config: RATPlusConfig, params: Params, tokens: np.ndarray) -> Iterator[Timed]:
  """transformers, as it is and compiled; nothing unless it is asked for."""
  if not settings.transformers:
    return
  try:
    import torch
    import transformers
  except ImportError as error:
    raise ImportError(f"--transformers needs {error.name}; pip install torch transformers, or leave it out.") from error
  where = "cuda" if jax.default_backend() == "gpu" else "cpu"
  with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
    path = pathlib.Path(folder) / "model"
    rat_jax.convert.export(path, config, params, family=settings.family)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, config.param_dtype), attn_implementation="sdpa").to(where).eval()
    given = torch.tensor(tokens, device=where)
    total = settings.context + settings.decoded + 1
    compiled = torch.compile(model.forward, mode="reduce-overhead" if where == "cuda" else None)
    for name, forward, fixed in (("transformers", model.forward, False), ("transformers, compiled", compiled, True)):
      def wait():
        if where == "cuda":
          torch.cuda.synchronize()

      def prompt(fixed=fixed):
        cache = (transformers.StaticCache(config=model.config, max_cache_len=total) if fixed
                 else transformers.DynamicCache(config=model.config))
        at = torch.arange(settings.context, device=where)
        out = model(given, past_key_values=cache, use_cache=True, cache_position=at, logits_to_keep=1)
        wait()
        return out.logits[:, -1].argmax(-1, keepdim=True), cache

      def steps(begun, forward=forward):
        token, cache = begun
        for i in range(settings.decoded):
          at = torch.tensor([settings.context + i], device=where)
          out = forward(token, past_key_values=cache, use_cache=True, cache_position=at, position_ids=at[None])
          token = out.logits[:, -1].argmax(-1, keepdim=True).clone()
        wait()

      yield name, config.param_dtype, *_timed(settings, prompt, steps)


def _timed(settings: Settings, prompt: Callable[[], Any], steps: Callable[[Any], None]) -> tuple[float, float]:
  """(seconds of a prompt, of one step): medians, once both have run."""
  steps(prompt())
  found = []
  for _ in range(settings.rounds):
    begun = time.perf_counter()
    made = prompt()
    between = time.perf_counter()
    steps(made)
    found.append((between - begun, (time.perf_counter() - between) / settings.decoded))
  of_prompt, of_step = np.median(found, axis=0)
  return float(of_prompt), float(of_step)


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
