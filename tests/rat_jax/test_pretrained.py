"""Models as folders: what `load_pretrained` gives, and where it needs nothing but the core install."""

from __future__ import annotations

import re
import tomllib

import chex
import jax
import numpy as np
import pytest

import rat_jax
from conftest import ROOT
from rat_jax import RATPlusConfig
from rat_jax.convert import mapping
from rat_jax.leaves import named_leaves, shapes_of

CONFIG = RATPlusConfig(8, 1, 8, 2, param_dtype="bfloat16")


def test_leaves_are_on_the_device_unless_they_are_placed(tmp_path):
  """So a loop of steps does not copy the model to the device in every step."""
  params = mapping.tree(((name, np.full(shape, i, jax.numpy.bfloat16))
                         for i, (name, shape) in enumerate(shapes_of(CONFIG).items())), mapping.as_is)
  rat_jax.save_pretrained(tmp_path / "model", CONFIG, params)
  config, loaded = rat_jax.load_pretrained(tmp_path / "model")
  assert config == CONFIG
  chex.assert_trees_all_equal(loaded, params)
  for name, leaf in named_leaves(loaded).items():
    assert isinstance(leaf, jax.Array), name
    assert leaf.devices() == {jax.devices()[0]}, name
  _, placed = rat_jax.load_pretrained(tmp_path / "model", place=lambda name, leaf: f"{name} {type(leaf).__name__}")
  assert list(named_leaves(placed).values()) == [f"{name} ndarray" for name in named_leaves(loaded)]


def filled(value=1.0):
  return mapping.tree(((name, np.full(shape, value, jax.numpy.bfloat16)) for name, shape in shapes_of(CONFIG).items()),
                      mapping.as_is)


def test_a_configuration_with_a_byte_order_mark_is_read(tmp_path):
  rat_jax.save_pretrained(tmp_path, CONFIG, filled())
  path = tmp_path / "config.json"
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  assert rat_jax.load_pretrained(tmp_path)[0] == CONFIG


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parameters_that_are_not_finite_are_not_written(value, tmp_path, monkeypatch):
  monkeypatch.setattr("rat_jax.leaves._PIECE", 5)  # so that it is in the last of several pieces
  params = filled()
  params["embedding"][7, 7] = value
  with pytest.raises(FloatingPointError, match=r"^.*/model is not written: embedding is not finite\.$"):
    rat_jax.save_pretrained(tmp_path / "model", CONFIG, params)
  assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_is_not_written(tmp_path):
  with pytest.raises(ValueError, match=r"^the parameters: embedding/0=1\.5 is no array but a float; give arrays\.$"):
    rat_jax.save_pretrained(tmp_path / "model", CONFIG, filled() | {"embedding": [1.5]})
  for size in (0, -1, True, 2.5):
    with pytest.raises(ValueError, match=f"^max_file_bytes={re.escape(str(size))}; use an integer of at least 1\\.$"):
      rat_jax.save_pretrained(tmp_path / "model", CONFIG, filled(), max_file_bytes=size)
  assert list(tmp_path.iterdir()) == []


def test_what_reads_weights_is_a_core_dependency():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert [one for one in project["dependencies"] if one.startswith("safetensors")]
  assert not [one for extra in project["optional-dependencies"].values() for one in extra if "safetensors" in one]
  assert "safetensors==" in (ROOT / "requirements.txt").read_text()
