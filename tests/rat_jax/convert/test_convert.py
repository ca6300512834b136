"""OLMo 2 and our own folders: numbers against the recorded ones, round trips, broken files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from safetensors.numpy import load_file, save_file

import rat_jax
from conftest import FIXTURES, examples, run_python
from rat_jax import RATPlusConfig, RATPlusLM, batch as batches, transformer
from rat_jax.convert import export_olmo2, load_olmo2, tensors

OLMO2 = FIXTURES / "olmo2_tiny"


@pytest.fixture(scope="module")
def expected():
  with np.load(OLMO2 / "expected.npz") as file:
    return dict(file)


@pytest.fixture(scope="module")
def small():
  config = RATPlusConfig(61, 1, 16, 2)
  return config, RATPlusLM(config).init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]


def logits_of(config, params, tokens):
  with jax.default_matmul_precision("highest"):
    return np.asarray(RATPlusLM(config).apply({"params": params}, tokens))


def trees_equal(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32)), a, b)


def test_olmo2_as_released(expected):
  config, params = load_olmo2(OLMO2, memory=False)
  assert (config.memory, config.rope_base, config.num_kv_heads, config.dtype) == (False, 500000.0, 4, "float32")
  np.testing.assert_allclose(logits_of(config, params, expected["tokens"]), expected["logits"], atol=1e-4)
  with jax.default_matmul_precision("highest"):
    new = rat_jax.generate(RATPlusLM(config), params, expected["greedy_prompt"], max_new_tokens=8)
  np.testing.assert_array_equal(new, expected["greedy_tokens"])


def test_hidden_states_of_olmo2(expected):
  """Theirs are the embeddings, the stream after the first layer, and after the last one and the final norm."""
  config, params = load_olmo2(OLMO2, memory=False)
  tokens = expected["tokens"]
  np.testing.assert_array_equal(params["embedding"][tokens], expected["hidden_0"])
  first = params | {"layers": jax.tree.map(lambda leaf: leaf[:1], params["layers"])}
  batch = batches.of_call(tokens)
  with jax.default_matmul_precision("highest"):
    one, last = (transformer.hidden_states(
        dataclasses.replace(config, num_layers=count), transformer.Forward(rat_jax.Dense()), some, batch)
        for count, some in ((1, first), (2, params)))
  np.testing.assert_allclose(one, expected["hidden_1"], atol=1e-4)
  normed = transformer.rms_norm(last, params["final_norm"], config.norm_eps)
  np.testing.assert_allclose(normed, expected["hidden_2"], atol=1e-4)


def test_a_memory_starts_as_the_identity(expected):
  config, params = load_olmo2(OLMO2)
  assert config.gate_bias == -12.0
  np.testing.assert_allclose(logits_of(config, params, expected["tokens"]), expected["logits"], atol=1e-3)
  config, params = load_olmo2(OLMO2, gate_bias=0.0)
  assert np.abs(logits_of(config, params, expected["tokens"]) - expected["logits"]).max() > 0.1


def test_olmo2_out_again(tmp_path, expected):
  config, params = load_olmo2(OLMO2)
  for limit, files in ((10**9, 1), (100_000, 6)):
    folder = tmp_path / str(limit)
    export_olmo2(folder, config, params, max_file_bytes=limit)
    assert len(list(folder.glob("*.safetensors"))) == files
    read = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    theirs = load_file(OLMO2 / "model.safetensors")
    assert read.keys() == theirs.keys()
    for name, value in theirs.items():
      np.testing.assert_array_equal(read[name], value)
    again, back = load_olmo2(folder)
    assert again == config
    trees_equal(back, params)
  with pytest.raises(ValueError, match="exists and is not empty"):
    export_olmo2(folder, config, params)
  with pytest.raises(ValueError, match=r"mlp='gelu' is not OLMo 2"):
    export_olmo2(tmp_path / "new", RATPlusConfig(61, 1, 16, 2), {})
  assert not (tmp_path / "new").exists()


def test_an_export_is_checked_and_takes_the_tokens_of_its_source(tmp_path):
  config, params = load_olmo2(OLMO2)
  export_olmo2(tmp_path / "plain", config, params)
  written = json.loads((tmp_path / "plain" / "config.json").read_text())
  assert {written[f"{name}_token_id"] for name in ("bos", "eos", "pad")} == {None}
  source = tmp_path / "source"
  shutil.copytree(OLMO2, source)
  for name in ("generation_config.json", "tokenizer.json"):
    (source / name).write_text(name)
  export_olmo2(tmp_path / "full", config, params, source=source)
  written = json.loads((tmp_path / "full" / "config.json").read_text())
  assert [written[name] for name in ("eos_token_id", "pad_token_id", "max_position_embeddings")] == [100, 1, 256]
  assert (tmp_path / "full" / "tokenizer.json").read_text() == "tokenizer.json"
  assert load_olmo2(tmp_path / "full")[0] == config

  wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
  for changes, leaves, message in (({"num_layers": 3}, params, r"is \(2, 64\), the config wants \(3, 64\)"),
                                  ({"vocab_size": 50}, params, r"embedding is \(101, 64\), the config wants"),
                                  ({}, wide, "float64, the config has param_dtype='float32'"),
                                  ({"param_dtype": "bfloat16"}, params, "float32, the config has param_dtype='bfl"),
                                  ({"rope_base": 10000.0}, params, "another model than the parameters: rope_base")):
    with pytest.raises(ValueError, match=message):
      export_olmo2(tmp_path / "new", dataclasses.replace(config, **changes), leaves, source=source)
  assert not (tmp_path / "new").exists()


@examples(3)
@given(layers=st.integers(1, 3), heads=st.sampled_from([(2, 1), (4, 2), (3, 3)]), tied=st.booleans(),
       dtype=st.sampled_from(["float32", "bfloat16"]), memory=st.booleans())
@pytest.mark.slow
def test_any_olmo2_goes_out_and_in(tmp_path_factory, layers, heads, tied, dtype, memory):
  n, kv = heads
  config = RATPlusConfig(31, layers, 8 * n, n, num_kv_heads=kv, mlp_dim=20, mlp="swiglu", memory=memory,
                         gate_bias=-12.0 if memory else None, output_gate=False, norm_placement="post", qk_norm=True,
                         tie_embeddings=tied, dtype=dtype, param_dtype=dtype)
  params = RATPlusLM(config).init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
  folder = tmp_path_factory.mktemp("olmo2") / "model"
  export_olmo2(folder, config, params, max_file_bytes=2000)
  again, back = load_olmo2(folder, memory=memory)
  assert again == config
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(back)} == {dtype}
  trees_equal(back, params)


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c.pop("hidden_size"), r"lacks \['hidden_size'\]"),
    (lambda c: c.update(model_type="llama"), "model_type='llama' is not 'olmo2'; rat_jax.convert.load reads it"),
    (lambda c: c.update(rope_theta=10000.0), "one rotary base is needed"),
    (lambda c: c.update(num_hidden_layers=3), r"lack 'model\.layers\.2\."),
    (lambda c: c.update(num_hidden_layers=1), r"has no place for: \['model\.layers\.1\."),
    (lambda c: c.update(intermediate_size=150), r"'model\.layers\.0\.mlp\.gate_proj\.weight' has shape \(160, 64\)"),
    (lambda c: c.update(rope_scaling={"factor": 8.0, "type": "longrope"}), "rope_type='longrope' is not supported; li"),
    (lambda c: c.update(rope_scaling={"rope_type": "default", "factor": 2.0}), "rope_scaling: factor=2.0 without a ro"),
    (lambda c: c.update(rope_scaling={"rope_type": "default", "rope_theta": 1.0}), "one rotary base is needed"),
    (lambda c: c.update(rope_scaling="linear"), r"config\.json: rope_scaling='linear'; give {\"rope_theta\": base}"),
    (lambda c: c.update(rope_theta="abc"), r"config\.json: rope_theta='abc' and .* is needed, a number"),
    (lambda c: c.update(rope_theta=[1]), r"config\.json: rope_theta=\[1\] and"),
    (lambda c: c.update(rope_parameters=[1]), r"config\.json: rope_parameters=\[1\]; give"),
    (lambda c: c["rope_parameters"].update(partial_rotary_factor=0.5), "rope_parameters: partial_rotary_factor=0.5 is"),
    (lambda c: c.update(partial_rotary_factor=0.5), r"config\.json: partial_rotary_factor=0.5 is"),
    (lambda c: c.update(rope_parameters={"type": "dynamic", "factor": 2}),
     "rope_parameters: rope_type='dynamic' is not"),
    (lambda c: c.update(architectures=["Olmo3ForCausalLM"]), r"architectures=\['Olmo3ForCausalLM'\] is not supported"),
    (lambda c: c.update(quantization_config={"bits": 4}), "quantization_config={'bits': 4} is not supported"),
    (lambda c: c.update(tie_word_embeddings=True), "tie_word_embeddings=True, but 'lm_head.weight' differs"),
    (lambda c: c.update(dtype="bfloat16"), r"says bfloat16, but '.*' is float32, which would be rounded"),
    (lambda c: c.update(num_hidden_layers=10**30), r"the config has 10{30} layers, and the weights hold 25 tensors"),
    (lambda c: c.update(rms_norm_eps=10**400), r"config\.json makes no model: norm_eps=10{400}; use a finite number"),
    (lambda c: c.update(dtype=[1]), r"config\.json: dtype=\[1\] is not supported; use what the files hold"),
    (lambda c: c.update(hidden_size="64"), r"config\.json makes no model: embed_dim='64'"),
])
def test_configs_that_contradict_the_weights_are_refused(tmp_path, change, message):
  shutil.copytree(OLMO2, tmp_path / "model")
  config = json.loads((OLMO2 / "config.json").read_text())
  change(config)
  (tmp_path / "model" / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=message):
    load_olmo2(tmp_path / "model")


@pytest.mark.parametrize("change", [
    {"rope_scaling": {"rope_type": "default"}}, {"rope_scaling": {"type": "default", "rope_theta": 500000}},
    {"rope_scaling": {}, "rope_parameters": None}, {"rope_theta": None},
    {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500000}},
])
def test_scaling_by_default_is_none(tmp_path, change):
  shutil.copytree(OLMO2, tmp_path / "model")
  path = tmp_path / "model" / "config.json"
  path.write_text("\ufeff" + json.dumps(json.loads(path.read_text()) | change), "utf-8")  # with a byte order mark
  assert load_olmo2(tmp_path / "model")[0] == load_olmo2(OLMO2)[0]


def test_broken_folders_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
    load_olmo2(tmp_path)
  folder = tmp_path / "model"
  config, params = load_olmo2(OLMO2)
  export_olmo2(folder, config, params, max_file_bytes=100_000)
  parts = sorted(folder.glob("*.safetensors"))
  kept = parts[1].read_bytes()
  parts[1].write_bytes(kept[:len(kept) // 2])
  with pytest.raises(ValueError, match=r"model-00002-of-00006\.safetensors is no whole safetensors file"):
    load_olmo2(folder)
  parts[1].unlink()
  with pytest.raises(FileNotFoundError, match=r"names model-00002-of-00006\.safetensors, which is not there"):
    load_olmo2(folder)
  parts[1].write_bytes(kept)
  index = folder / "model.safetensors.index.json"
  named = json.loads(index.read_text())
  index.write_text(json.dumps(named | {"weight_map": named["weight_map"] | {"extra": parts[0].name}}))
  with pytest.raises(ValueError, match=r"names \['extra'\], which its files do not hold"):
    load_olmo2(folder)
  without = {name: file for name, file in named["weight_map"].items() if name != "model.norm.weight"}
  index.write_text(json.dumps({"weight_map": without}))
  with pytest.raises(ValueError, match=r"holds 'model\.norm\.weight', which model\.safetensors\.index\.json does not"):
    load_olmo2(folder)
  for file in (5, [1], f"../model/{parts[0].name}", f"..\\{parts[0].name}"):
    index.write_text(json.dumps({"weight_map": {**named["weight_map"], "lm_head.weight": file}}))
    with pytest.raises(ValueError, match=r"for 'lm_head\.weight'; give the name of a file beside it"):
      load_olmo2(folder)
  index.unlink()
  (folder / "model.safetensors").mkdir()
  with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor"):
    load_olmo2(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_our_own_goes_out_and_in(tmp_path, dtype):
  config = RATPlusConfig(61, 2, 16, 2, param_dtype=dtype)
  params = RATPlusLM(config).init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
  for limit in (10**9, 3000):
    folder = tmp_path / f"{limit}"
    rat_jax.save_pretrained(folder, config, params, about={"source": "a test", "steps": 3}, max_file_bytes=limit)
    again, back = rat_jax.load_pretrained(folder, place=lambda name, leaf: (name, jnp.asarray(leaf)))
    assert again == config
    assert back["layers"]["query"][0] == "layers/query"
    back = jax.tree.map(lambda placed: placed[1], back, is_leaf=lambda x: isinstance(x, tuple))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    trees_equal(back, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {jnp.dtype(dtype)}
    assert "* source: a test\n* steps: 3\n" in (folder / "README.md").read_text()
  whole = params | {"final_norm": np.ones(16, np.int32)}
  with pytest.raises(ValueError, match="final_norm is int32, the config has param_dtype"):
    rat_jax.save_pretrained(tmp_path / "new", config, whole)
  with pytest.raises(ValueError, match="'final_norm' is int32; weights are of"):
    rat_jax.pretrained.write_pretrained(tmp_path / "new", config, [("final_norm", whole["final_norm"])])
  other = dataclasses.replace(config, num_layers=3)
  with pytest.raises(ValueError, match=r"layers/attention_norm is \(2, 16\), the config wants \(3, 16\)"):
    rat_jax.save_pretrained(tmp_path / "new", other, params)
  assert not (tmp_path / "new").exists()
  (folder / "config.json").write_text(other.to_json())
  with pytest.raises(ValueError, match="the config wants"):
    rat_jax.load_pretrained(folder)


def test_configs_of_others_are_refused(tmp_path, small):
  with pytest.raises(ValueError, match=r"config\.json is of the Hugging Face package; convert the folder first"):
    rat_jax.load_pretrained(OLMO2)
  config, params = small
  rat_jax.save_pretrained(tmp_path / "model", config, params)
  path = tmp_path / "model" / "config.json"
  for text, message in ((b"\xff\xfe", "is not JSON"), (b"[" * 10**5, "is not JSON"),
                        (b"[" + b"1" * 5000 + b"]", "is not JSON"),
                        (b"[]", "holds a list; give a folder that save_pretrained wrote"),
                        (b'{"size": 3}', r"the configuration has unknown fields \['size'\]"),
                        (dataclasses.replace(config, param_dtype="bfloat16").to_json().encode(),
                         "embedding is float32, the config has param_dtype='bfloat16'")):
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message) as found:
      rat_jax.load_pretrained(tmp_path / "model")
    assert str(tmp_path / "model") in str(found.value)
  path.write_text(config.to_json())
  weights = tmp_path / "model" / "model.safetensors"
  save_file({name: leaf.astype(np.float64) for name, leaf in load_file(weights).items()}, weights)
  with pytest.raises(ValueError, match="float64, the config has param_dtype='float32'"):
    rat_jax.load_pretrained(tmp_path / "model")


def test_leaves_are_placed_on_many_devices_as_they_come(tmp_path):
  """OLMo 2 and a folder of our own, sharded over four devices: the same arrays, a leaf at a time."""
  run_python("tests/rat_jax/convert/placed_leaves.py", str(OLMO2), str(tmp_path / "saved"), devices=4)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, small):
  config, params = small

  def full(*_, **__):
    raise OSError("no space left")

  monkeypatch.setattr("rat_jax.convert.tensors._Files.close", full)
  with pytest.raises(OSError, match="no space"):
    rat_jax.save_pretrained(tmp_path / "model", config, params)
  assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_told(tmp_path):
  array = np.ones(10**6, np.float32)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # of the files that this process writes
  try:
    with pytest.raises(OSError, match="File too large"), tensors.new_folder(tmp_path / "model") as made:
      tensors.write_safetensors(made, [("a", array)], count=1, metadata={}, max_file_bytes=10**9)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert not list(tmp_path.iterdir())


def test_folders_that_are_there_and_empty_are_written_into(tmp_path, monkeypatch, small):
  config, params = small
  for name in ("empty", "current", "linked"):
    (tmp_path / name).mkdir()
  (tmp_path / "link").symlink_to("linked")
  (tmp_path / "dangling").symlink_to("target")
  (tmp_path / "file").write_text("")
  monkeypatch.chdir(tmp_path / "current")
  kept = (tmp_path / "empty").stat().st_ino  # a mount point cannot be replaced
  for folder in (tmp_path / "empty", ".", tmp_path / "link", tmp_path / "dangling"):
    rat_jax.save_pretrained(folder, config, params)
    assert rat_jax.load_pretrained(folder)[0] == config
  assert (tmp_path / "empty").stat().st_ino == kept
  assert (tmp_path / "link").is_symlink()
  assert (tmp_path / "current" / "README.md").read_text().startswith("# current\n")
  names = ["README.md", "config.json", "model.safetensors"]
  for name in ("empty", "current", "linked", "target"):
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == names
  for name in ("file", "empty"):
    with pytest.raises(ValueError, match=f"{name} exists and is not empty"):
      rat_jax.save_pretrained(tmp_path / name, config, params)

  rename = pathlib.Path.rename

  def no_config(path, target):
    if path.name == "config.json":
      raise OSError("no space left")
    return rename(path, target)

  (tmp_path / "other").mkdir()
  monkeypatch.setattr(pathlib.Path, "rename", no_config)
  with pytest.raises(OSError, match="no space"):
    rat_jax.save_pretrained(tmp_path / "other", config, params)
  assert not list((tmp_path / "other").iterdir())


def test_our_files_are_the_packages(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": rng.normal(size=5).astype(jnp.bfloat16),
            "c": np.array(2.5, np.float32)}
  tensors.write_safetensors(tmp_path, arrays.items(), count=3, metadata={"x": "y"}, max_file_bytes=10**6)
  save_file(arrays, tmp_path / "theirs.safetensors", metadata={"x": "y"})
  ours, theirs = (load_file(tmp_path / name) for name in ("model.safetensors", "theirs.safetensors"))
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    np.testing.assert_array_equal(ours[name], value)
    assert ours[name].dtype == value.dtype
