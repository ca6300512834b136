"""What needs torch: the RAT+ authors' files, and OLMo 2 as `transformers` runs it."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import mmap
import os
import pickle
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import rat_jax
from conftest import FIXTURES
from rat_jax import Dense, Dilated, RATPlusLM
from rat_jax.convert import export_olmo2, load_olmo2, load_ratplus, to_ratplus_state_dict
from rat_jax.convert.ratplus import read_ratplus
from rat_jax.convert.tensors import TorchTensors

torch = pytest.importorskip("torch", reason="torch reads .pth files; make test-torch installs it")
FOLDER = FIXTURES / "ratplus"
NAMES = ["ckpt_ratplus_fused", "ckpt_ratplus_fgate", "ckpt_attention"]


def contents_of(path):
  """One of their files as it is, by torch alone."""
  with torch.serialization.safe_globals([(collections.OrderedDict, "easydict.EasyDict")]):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_their_files(name):
  config, params = load_ratplus(FOLDER / f"{name}.pth")
  assert config.memory == ("ratplus" in name)
  with np.load(FOLDER / f"{name}_expected.npz") as file:
    expected = dict(file)
  for label, ((d, w, s), *_) in zip(expected["config_names"], expected["configs"].tolist(), strict=True):
    mode = Dense() if d == 1 else Dilated(d, window=w, sinks=s)
    with jax.default_matmul_precision("highest"):
      logits = RATPlusLM(config).apply({"params": params}, expected["tokens"], mode=mode)
    np.testing.assert_allclose(logits, expected[f"logits/{label}"], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_converted_by_the_script_and_back(name, tmp_path):
  run = subprocess.run([sys.executable, "-m", "experiments.convert", "--from=ratplus", f"--source={FOLDER / name}.pth",
                        f"--output={tmp_path}/model"], env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True,
                       text=True, check=False)
  assert run.returncode == 0, run.stderr
  config, params = rat_jax.load_pretrained(tmp_path / "model")
  read, expected = load_ratplus(FOLDER / f"{name}.pth")
  assert config == read
  chex.assert_trees_all_equal(params, expected)
  task = contents_of(FOLDER / f"{name}.pth")["task"]
  theirs = {own.removeprefix("_orig_mod."): value.numpy() for own, value in task.items()}
  gates = {own: theirs.pop(own) for own in list(theirs) if "fgate_proj" in own}
  for own, gate in gates.items():  # which is written as the last rows of in_proj
    fused = own.replace("fgate_proj", "in_proj")
    theirs[fused] = np.concatenate([theirs[fused], gate])
  ours = to_ratplus_state_dict(params, config)
  assert ours.keys() == theirs.keys()
  for own, value in theirs.items():
    np.testing.assert_array_equal(ours[own], value)
  torch.save({"task": {own: torch.from_numpy(value) for own, value in ours.items()}}, tmp_path / "back.pth")
  chex.assert_trees_all_equal(load_ratplus(tmp_path / "back.pth", config)[1], params)
  card = (tmp_path / "model" / "README.md").read_text()
  assert hashlib.sha256((FOLDER / f"{name}.pth").read_bytes()).hexdigest() in card
  trained = json.loads(card.split("* trained by the authors: ")[1].split("\n")[0])
  sparse = 8 if config.memory else 1
  assert trained.items() >= {
      "batches": 4, "data.train.tokenized_file_path": "fineweb_edu_100B/llama-train.bin", "data.seq_len": 32,
      "data.global_batch_size": 4, "optim.optimizer.lr": 0.002, "model.backbone.seq_cell.dilation_size": sparse,
      "model.backbone.seq_cell.joint_train": config.memory}.items()
  assert "trainer.pretrained_path" not in trained  # null in the file


@pytest.mark.parametrize("private", [True, False])
def test_a_file_is_not_written_through_its_parameters(tmp_path, monkeypatch, private):
  path = tmp_path / "model.pth"
  path.write_bytes((FOLDER / "ckpt_attention.pth").read_bytes())
  before, load = path.read_bytes(), torch.load

  def only_shared(*args, **kwargs):  # as where a private mapping does not fit the memory
    if torch.serialization.get_default_mmap_options() == mmap.MAP_PRIVATE:
      raise RuntimeError("unable to mmap 4096 bytes")
    return load(*args, **kwargs)

  if not private:
    monkeypatch.setattr(torch, "load", only_shared)
  _, params = load_ratplus(path)
  for leaf in jax.tree.leaves(params):
    leaf[...] = 7.0
  del params, leaf
  assert path.read_bytes() == before


class Runs:
  """What a hostile file holds."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
  good = (FOLDER / "ckpt_attention.pth").read_bytes()
  cases = {"cut.pth": (good[:len(good) // 2], "is it truncated, or no file that torch.save wrote"),
           "text.pth": (b"hello", "is it truncated, or no file that torch.save wrote"),
           "pickle.pth": (pickle.dumps({"task": {}}), "is a pickle, or in the old format of torch"),
           "empty.pth": (b"", "is it truncated, or no file that torch.save wrote")}
  for name, (content, message) in cases.items():
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
      load_ratplus(tmp_path / name)
  torch.save({"task": {}, "more": Runs(tmp_path / "ran")}, tmp_path / "code.pth")
  with pytest.raises(ValueError, match="unpickling that would run its code"):
    load_ratplus(tmp_path / "code.pth")
  assert not (tmp_path / "ran").exists()
  torch.save({"task": torch.ones(2)}, tmp_path / "task.pth")
  with pytest.raises(ValueError, match="holds a Tensor as its task; a checkpoint is a dict with the weights"):
    load_ratplus(tmp_path / "task.pth")
  for path, message in ((tmp_path / "none.pth", r"does not exist; give a \.pth file"), (tmp_path, "is a folder; give")):
    with pytest.raises(FileNotFoundError, match=message):
      load_ratplus(path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
  config, params = load_ratplus(FOLDER / "ckpt_ratplus_fused.pth")
  weights = {name: torch.from_numpy(value) for name, value in to_ratplus_state_dict(params, config).items()}
  torch.save({"task": weights}, tmp_path / "bare.pth")
  with pytest.raises(ValueError, match="leaves differ in all"):
    to_ratplus_state_dict(params, dataclasses.replace(config, num_layers=1))
  with pytest.raises(ValueError, match="holds no config; give one"):
    load_ratplus(tmp_path / "bare.pth")
  assert read_ratplus(tmp_path / "bare.pth", config)[2] == {}
  chex.assert_trees_all_equal(load_ratplus(tmp_path / "bare.pth", config)[1], params)
  torch.save({name: value.bfloat16() for name, value in weights.items()}, tmp_path / "bare.pth")  # weights alone
  halves = load_ratplus(tmp_path / "bare.pth", dataclasses.replace(config, param_dtype="bfloat16"))[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=1e-2), halves, params)
  with pytest.raises(ValueError, match=r"lack 'backbone\.layers\.2\."):
    load_ratplus(tmp_path / "bare.pth", dataclasses.replace(config, num_layers=3))
  torch.save({"task": weights | {"extra": torch.zeros(3)}}, tmp_path / "more.pth")
  with pytest.raises(ValueError, match=r"no place for: \['extra'\]"):
    load_ratplus(tmp_path / "more.pth", config)
  torch.save({"task": weights, "config": {"model": {}}}, tmp_path / "config.pth")
  with pytest.raises(ValueError, match=r"lacks 'model\.head\.vocab_size'; give one"):
    load_ratplus(tmp_path / "config.pth")


@pytest.mark.parametrize(("change", "message"), [
    (lambda x: x.to(torch.int8), "'head' is int8"),
    (lambda x: x > 0, "'head' is bool"),
    (lambda x: x.to(torch.complex64), "'head' is complex64"),
    (lambda x: x.to(torch.float8_e4m3fn), "'head' is float8_e4m3fn"),
    (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "'head' is qint8"),
    (lambda x: x.to_sparse(), "'head' is float32, sparse_coo"),
    (lambda x: x.to("meta"), "'head' is float32, strided, on the device meta"),
    (lambda x: x.numpy(), "'head' is no tensor but a ndarray")])
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_weights_are_refused(change, message):
  good = torch.arange(6.0).reshape(2, 3)
  with pytest.raises(ValueError, match=message):
    TorchTensors({"embedding": good, "head": change(good)}, "model.pth")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_trained_tensors_are_read(dtype):
  parameter = torch.nn.Parameter(torch.arange(6.0, dtype=getattr(torch, dtype)).reshape(2, 3))
  read = TorchTensors({"head": parameter}, "model.pth").read("head", slice(1, 2))
  assert str(read.dtype) == dtype
  np.testing.assert_array_equal(read.astype(np.float32), [[3.0, 4.0, 5.0]])


@pytest.mark.parametrize(("where", "key", "value", "message"), [
    ("model.backbone.hidden_cell", "act_fn", "silu", r"act_fn='silu', which is not supported; RAT\+ has 'gelu'"),
    ("model.embedding.pe", "_name_", "empty", r"pe\._name_='empty', which is not supported"),
    ("model.backbone.seq_cell", "_name_", "rnn", r"seq_cell\._name_='rnn', which is not supported"),
    ("model.backbone.seq_cell", "d_head", 4, r"pe\.dim=8, which is not supported; RAT\+ has 4"),
    ("model.backbone", "num_layers", "2", r"makes no model: num_layers='2'"),
    ("model", "backbone", "sequence", r"lacks 'model\.backbone\.num_layers'"),
    ("trainer", "dtype", "float16", "makes no model: dtype='float16'")])
def test_configs_of_other_layers_are_refused(tmp_path, where, key, value, message):
  found = contents_of(FOLDER / "ckpt_ratplus_fused.pth")
  functools.reduce(lambda at, part: at[part], where.split("."), found["config"])[key] = value
  torch.save({"task": found["task"], "config": found["config"]}, tmp_path / "model.pth")
  with pytest.raises(ValueError, match=message):
    load_ratplus(tmp_path / "model.pth")


def test_a_config_beside_the_files_own(tmp_path):
  path = FOLDER / "ckpt_ratplus_fused.pth"
  config, params = load_ratplus(path)
  halves = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
  assert load_ratplus(path, halves)[0] == halves
  with pytest.raises(ValueError, match=r"is not the one that is given: tie_embeddings: True, False; leave it out"):
    load_ratplus(path, dataclasses.replace(config, tie_embeddings=False))
  found = contents_of(path)
  theirs, layer = found["config"], found["config"]["model"]["backbone"]["seq_cell"]
  theirs["trainer"]["dtype"] = "bfloat16"
  theirs["data"] = {"seq_len": torch.ones(3)}
  task = {name.removeprefix("_orig_mod.").replace("layers.", "layers._orig_mod."): value
          for name, value in found["task"].items()}
  torch.save({"task": task, "config": theirs}, tmp_path / "model.pth")
  again, read = load_ratplus(tmp_path / "model.pth")
  assert again == dataclasses.replace(config, dtype="bfloat16")
  trained = read_ratplus(tmp_path / "model.pth")[2]  # of what is there, and is a setting
  assert {name.split(".")[0] for name in trained} == {"wandb", "trainer", "optim", "model"}
  chex.assert_trees_all_equal(read, params)
  layer["_name_"] = "ratplus16local"  # an older file
  del layer["apply_re"]
  torch.save({"task": task, "config": theirs}, tmp_path / "model.pth")
  with pytest.raises(ValueError, match="_name_='ratplus16local'"):
    load_ratplus(tmp_path / "model.pth")
  assert load_ratplus(tmp_path / "model.pth", config)[0] == config
  torch.save({"task": task | {"embedding.wte._orig_mod.weight": task["embedding.wte.weight"]}}, tmp_path / "model.pth")
  with pytest.raises(ValueError, match=r"hold 'embedding\.wte\.weight' twice"):
    load_ratplus(tmp_path / "model.pth", config)


@pytest.mark.parametrize(("kv_heads", "tied", "dtype", "shard", "older"), [
    (4, False, "float32", "1GB", False), (2, False, "float32", "40KB", True), (1, True, "float32", "40KB", False),
    (4, True, "bfloat16", "1GB", True), (2, False, "bfloat16", "20KB", False)])
def test_olmo2_of_transformers_in_and_out(tmp_path, kv_heads, tied, dtype, shard, older):
  compare_with_transformers(tmp_path, 3, 4, kv_heads, 8, tied, dtype, shard, older)
  assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (shard != "1GB")


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(layers=st.integers(1, 4), heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3), (3, 3)]),
       head_dim=st.sampled_from([4, 16]), tied=st.booleans(), dtype=st.sampled_from(["float32", "bfloat16"]),
       shard=st.sampled_from(["1GB", "15KB"]), older=st.booleans())
def test_any_olmo2_of_transformers(tmp_path_factory, layers, heads, head_dim, tied, dtype, shard, older):
  compare_with_transformers(tmp_path_factory.mktemp("olmo2"), layers, *heads, head_dim, tied, dtype, shard, older)


def compare_with_transformers(folder, layers, heads, kv_heads, head_dim, tied, dtype, shard, older):
  """A random model as `transformers` writes and runs it: the same logits by us, and by it of what we write."""
  transformers = pytest.importorskip("transformers", reason="make test-torch installs transformers")
  torch.manual_seed(kv_heads)
  theirs = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(
      vocab_size=61, hidden_size=heads * head_dim, intermediate_size=48, num_hidden_layers=layers,
      num_attention_heads=heads, num_key_value_heads=kv_heads, rms_norm_eps=1e-5,
      rope_parameters={"rope_theta": 20000.0, "rope_type": "default"}, tie_word_embeddings=tied,
      attn_implementation="eager", bos_token_id=None, eos_token_id=60, pad_token_id=2))
  with torch.no_grad():
    for name, parameter in theirs.named_parameters():  # as drawn, norms are ones and logits all alike
      parameter.copy_(torch.rand(parameter.shape) + 0.5 if "norm" in name else torch.randn(parameter.shape) * 0.15)
  theirs.to(getattr(torch, dtype)).save_pretrained(folder / "theirs", max_shard_size=shard)
  if older:  # as released: the base alone, under its older name
    path = folder / "theirs" / "config.json"
    written = json.loads(path.read_text())
    del written["rope_parameters"]
    path.write_text(json.dumps(written | {"rope_theta": 20000.0, "torch_dtype": written.pop("dtype")}))
  tokens = np.random.default_rng(0).integers(0, 61, (2, 30))

  def logits_of(of):  # read again: .to(bfloat16) rounds the rotary frequencies too
    model = transformers.AutoModelForCausalLM.from_pretrained(of, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
      return model(torch.from_numpy(tokens)).logits.numpy()

  config, params = load_olmo2(folder / "theirs", memory=False)
  assert (config.param_dtype, config.rope_base, config.num_kv_heads) == (dtype, 20000.0, kv_heads)
  exact = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
  ours = dataclasses.replace(config, dtype="float32", param_dtype="float32")
  with jax.default_matmul_precision("highest"):
    logits = RATPlusLM(ours).apply({"params": exact}, tokens)
  expected = logits_of(folder / "theirs")
  np.testing.assert_allclose(logits, expected, atol=1e-4)
  export_olmo2(folder / "ours", config, params, source=folder / "theirs", max_file_bytes=20_000)
  again = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours")
  assert again.dtype == getattr(torch, dtype)
  assert (again.config.eos_token_id, again.generation_config.eos_token_id, again.config.pad_token_id) == (60, 60, 2)
  np.testing.assert_array_equal(logits_of(folder / "ours"), expected)
