"""Meshes by their text, and the table of what they cut."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import rat_jax
from parallel import golden
from rat_jax import Dense, Quest, RATPlusConfig, RATPlusLM
from rat_jax.caches.cache import empty_cache
from rat_jax.parallel import AXES, make_mesh, rules, shardings
from rat_jax.parallel.mesh import sizes_of

P = jax.P


def mesh_of(**sizes):
  """A mesh of devices that need not be here."""
  return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, (AxisType.Auto,) * 4)


@pytest.mark.parametrize(("text", "sizes"), [
    (None, (1, 8, 1, 1)), ("data:2,fsdp:4", (2, 4, 1, 1)), ("context:8", (1, 1, 1, 8)),
    (" tensor : 2 , data:4", (4, 1, 2, 1)), ("data:2,fsdp:2,tensor:2,context:1", (2, 2, 2, 1))])
def test_texts(text, sizes):
  assert sizes_of(text, 8) == sizes


@pytest.mark.parametrize(("text", "message"), [
    ("model:8", "the axis 'model' is unknown; use data, fsdp, tensor, context, such as data:2,fsdp:4"),
    ("data:2,data:4", "the axis data is repeated; give every axis once"),
    ("data", "'data' is no axis, colon and size"), ("data:", "data has the size ''; give a count of 1 or more"),
    ("data:2 fsdp:4", "'data:2 fsdp:4' is no axis"), ("fsdp=8", "'fsdp=8' is no axis"),
    ("data:0", "data has the size '0'; give a count of 1 or more"),
    ("data:-1", "data has the size '-1'"), ("data:two", "data has the size 'two'"), ("data:²", "data has the size '²'"),
    ("", "has an empty part"), ("fsdp:8,", "has an empty part"), (8, "8; give a text such as data:2,fsdp:4"),
    ("data:2,fsdp:2", "is of 4 devices, and there are 8; give sizes whose product is 8, such as data:4 or fsdp:4"),
    ("data:3", "is of 3 devices, and there are 8; give sizes whose product is 8, such as data:8 instead")])
def test_texts_that_say_no_mesh(text, message):
  with pytest.raises(ValueError, match=f"^mesh=.*{message}"):
    sizes_of(text, 8)


def test_one_device():
  mesh = make_mesh(devices=jax.devices()[:1])
  assert mesh.axis_names == AXES
  assert set(mesh.shape.values()) == {1}
  assert set(mesh.axis_types) == {AxisType.Auto}


CONFIG = RATPlusConfig(64, 2, 32, 8, num_kv_heads=2, mlp_dim=48, gate_bias=-3.0, qk_norm=True, tie_embeddings=False)


def cut(config, **sizes):
  """{name: its PartitionSpec} of a model's parameters."""
  shapes = jax.eval_shape(RATPlusLM(config).init, jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
  found = shardings(shapes, mesh_of(**sizes))
  return {rules.name_of(path): one.spec for path, one in jax.tree.leaves_with_path(found)}


def test_parameters_on_all_axes():
  assert cut(CONFIG, data=2, fsdp=4, tensor=2, context=2) == {
      "embedding": P("tensor", "fsdp"), "head": P("tensor", "fsdp"), "final_norm": P(None),
      "query": P(None, "fsdp", "tensor", None), "key": P(None, "fsdp", "tensor", None),
      "value": P(None, "fsdp", "tensor", None), "memory_gate": P(None, "fsdp", "tensor", None),
      "memory_gate_bias": P(None, "tensor", None), "output_gate": P(None, "fsdp", "tensor", None),
      "query_norm": P(None, "tensor", None), "key_norm": P(None, "tensor", None),
      "out": P(None, "tensor", None, "fsdp"), "mlp_in": P(None, "fsdp", "tensor"), "mlp_out": P(None, "tensor", "fsdp"),
      "attention_norm": P(None, None), "mlp_norm": P(None, None)}


def test_fewer_key_value_heads_than_devices_and_an_odd_vocabulary_stay_whole():
  found = cut(RATPlusConfig(61, 2, 32, 8, num_kv_heads=2, mlp_dim=48), tensor=8, fsdp=2)
  assert found["query"] == P(None, "fsdp", "tensor", None)
  assert found["key"] == P(None, "fsdp", None, None)
  assert found["embedding"] == P(None, "fsdp")


def test_an_optimizers_moments_lie_as_the_parameters_do():
  model = RATPlusLM(CONFIG)
  optimizer = rat_jax.make_optimizer(1e-3, total_steps=2)
  state = jax.eval_shape(lambda: rat_jax.init_train_state(
      model, model.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"], optimizer))
  found = shardings(state, mesh_of(fsdp=2, tensor=2))
  of = {}
  for path, one in jax.tree.leaves_with_path(found):
    of.setdefault(rules.name_of(path), set()).add(one.spec)
  assert of["query"] == {P(None, "fsdp", "tensor", None)}
  assert of["step"] == of["count"] == {P()}


@pytest.mark.parametrize("mode", [Dense(), Quest(0.5, block=4)])
def test_caches(mode):
  cache = jax.eval_shape(lambda: empty_cache(CONFIG, mode, 4, 32))
  found = shardings(cache, mesh_of(data=2, fsdp=2, tensor=2, context=2))
  assert found.runs[0].keys.spec == P(None, ("data", "fsdp"), "tensor", "context", None)
  assert found.state[0].spec == P(None, ("data", "fsdp"), "tensor", None)
  assert found.lengths.spec == P(("data", "fsdp"))


@pytest.mark.parametrize(("name", "shape", "sizes", "message"), [
    ("query", (2, 32, 6, 4), {"tensor": 4},
     r"query has 6 query heads \(num_heads\).*tensor:4 pieces.*divides 6: .1, 2, 3, 6"),
    ("key", (2, 32, 3, 4), {"tensor": 4}, r"key has 3 key/value heads \(num_kv_heads\)"),
    ("tokens", (6, 8), {"data": 2, "fsdp": 2}, r"tokens has 6 rows.*data:2\*fsdp:2 pieces"),
    ("embedding", (64, 30), {"fsdp": 4}, r"embedding has 30 channels \(embed_dim\)"),
    ("mlp_in", (2, 32, 50), {"tensor": 4}, r"mlp_in has 50 channels \(mlp_dim\)"),
    ("dropout", (2, 2), {}, "dropout: no such array is known; the table has embedding, head"),
    ("tokens", (2, 2, 2), {}, "tokens has shape")])
def test_what_does_not_fit_is_named(name, shape, sizes, message):
  with pytest.raises(ValueError, match=message):
    rules.spec(name, shape, mesh_of(**sizes), strict=True)


@pytest.mark.parametrize("preset", golden.PRESETS)
def test_shardings_of_the_presets_are_those_of_the_files(preset):
  """After a wanted change: PYTHONPATH=tests python -m parallel.golden."""
  assert golden.text_of(preset) == (golden.FOLDER / f"{preset}.txt").read_text(encoding="utf-8")
