"""The code of README and docs runs as it stands."""

from __future__ import annotations

import re

import gguf_model
import jax
import numpy as np
import pytest

import rat_jax
from conftest import ROOT
from rat_jax import RATPlusConfig, RATPlusLM

PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
         if "```python" in path.read_text(encoding="utf-8")]


def blocks(page):
  """(line, code) of every block of Python."""
  text = page.read_text(encoding="utf-8")
  return [(text.count("\n", 0, found.start(1)) + 1, found[1])
          for found in re.finditer(r"```python\n(.*?)```", text, re.S)]


@pytest.fixture
def clone(tmp_path, monkeypatch):
  """A folder like a clone in which the models of the documentation lie in runs/, small ones in the place of large."""
  config = RATPlusConfig(256, 1, 16, 2)
  params = RATPlusLM(config).init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
  for page in PAGES:
    for folder in set(re.findall(r'load_pretrained\("(runs/[^"]+)"', page.read_text(encoding="utf-8"))):
      if not (tmp_path / folder).exists():
        rat_jax.save_pretrained(tmp_path / folder, config, params)
    for file in set(re.findall(r'convert\.load\("([^"]+)\.gguf"', page.read_text(encoding="utf-8"))):
      (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
      _, of_tokenizer = gguf_model.tokenizer_of(["The capital of France is"], "smollm")
      gguf_model.write(tmp_path / f"{file}.gguf", "llama", *gguf_model.model_of("llama", vocab_size=330),
                       more=of_tokenizer)
  (tmp_path / "experiments").symlink_to(ROOT / "experiments")
  monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("clone")
def test_every_block_runs(page):
  """In their order: one may use what those before it made."""
  names = {}
  assert blocks(page)
  for line, code in blocks(page):
    exec(compile("\n" * (line - 1) + code, page.name, "exec"), names)
