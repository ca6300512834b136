"""The scripts that train, and `prepare_data` and `eval_lm` beside them: what is resumed, and what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil

import jax
import numpy as np
import pytest

import rat_jax
from conftest import run_python
from experiments import pretrain
from experiments.shared import inputs, training
from rat_jax import RATPlusConfig, RATPlusLM
from rat_jax.data import prepare
from tests.experiments.command_line import settings


@pytest.fixture
def texts(tmp_path):
  """Two folders of forty texts of equal lengths, which differ in one character of each."""
  for folder, mark in (("one", "."), ("other", "!")):
    (tmp_path / folder).mkdir()
    for i in range(10, 50):
      (tmp_path / folder / f"{i}.txt").write_text(f"Line {i} of a small text{mark}\n" * 10)
  return tmp_path


@pytest.mark.parametrize("given, message", [
    (["--batch_size=6", "--accumulation=4"], "--accumulation=4 does not divide --batch_size=6; cut a batch into equal"),
    (["--mode=snapkv:80"], "--mode=snapkv:80: SnapKV compresses when the prompt ends, and what is trained on has no"
     " prompt; train under another mode."),
    (["--mode=dense", "--mode=per_layer:[dense;snapkv:80]"], "SnapKV compresses when the prompt ends, and what is"),
    (["--documents_apart", "--mode=quest:0.25"], "--documents_apart with --mode=quest:0.25, whose choice would span"),
    (["--mode=dense", "--combine=sum"], "--combine: --mode=dense alone makes one update of a batch; leave it out."),
    (["--preset=none"], "preset 'none' is unknown; use one of"),
    (["--preset=tiny", "--layers=2", "--mlp=gelu"], "--layers, --mlp: --preset=tiny has its own sizes; leave it out."),
    (["--width=15", "--heads=4"], "num_heads=4 does not divide embed_dim=15")])
def test_what_cannot_be_trained_is_said_before_text_is_read(given, message, tmp_path, monkeypatch):
  def never(*_):
    raise AssertionError("text was read")

  monkeypatch.setattr(inputs, "corpus", never)
  with pytest.raises(ValueError, match=re.escape(message)):
    pretrain.main(settings(pretrain, f"--workdir={tmp_path}/run", *given))
  assert not list(tmp_path.iterdir())


def test_what_does_not_fit_the_model_or_the_text_writes_nothing(texts):
  data = prepare(texts / "one", texts / "data")["train"]
  config = RATPlusConfig(256, 1, 16, 2)
  prepared = sorted(texts.rglob("*"))
  for given, message in ((["--mode=per_layer:[dense;dense]"], "modes has 2 entries and the model num_layers=1"),
                         (["--mode=dense", "--length=100000"], "tokens, too few for one window of length=100000")):
    with pytest.raises(ValueError, match=message):
      training.fit(settings(pretrain, f"--workdir={texts}/run", *given), config, None, data, "test")
  assert sorted(texts.rglob("*")) == prepared


TOY = ["--layers=1", "--width=16", "--heads=2", "--batch_size=2", "--length=32", "--mode=dense", "--save_every=0"]


@pytest.mark.slow
@pytest.mark.scripts
def test_a_run_goes_on_with_its_own_text_alone(texts):
  """Known by what is in it, wherever it lies. A line of metrics that a kill broke is named, and ends nothing."""
  for folder in ("one", "other"):
    run_python("-m", "experiments.prepare_data", f"--source={texts / folder}", f"--workdir={texts}/data-{folder}")
  shutil.move(texts / "data-one", texts / "moved")
  shutil.move(texts / "one", texts / "gone")
  pretrain = ["-m", "experiments.pretrain", *TOY, f"--workdir={texts}/run"]
  run_python(*pretrain, f"--data={texts}/moved", "--steps=4")
  metrics = texts / "run" / "metrics.jsonl"
  kept = lambda: sorted((path, path.stat().st_mtime_ns) for path in (texts / "run").rglob("*"))
  before = kept()
  said = run_python(*pretrain, f"--data={texts}/data-other", "--steps=8", check=False)
  assert "error: the checkpoint in" in said
  assert "is of a run with data_sha256='" in said
  assert kept() == before
  with metrics.open("a") as file:
    file.write('{"step": 3, "lo')
  run_python("-m", "experiments.prepare_data", f"--source={texts / 'gone'}", f"--workdir={texts}/again")
  assert json.loads((texts / "again" / "train.json").read_text())["source"] == str(texts / "gone")
  said = run_python(*pretrain, f"--data={texts}/again", "--steps=12")
  assert "resuming from step 4 in" in said
  assert ("--steps=12 where the run had 4: the learning rate of the next batch is 0.00075, it would have been 1e-06"
          in said)
  assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(12))


@pytest.mark.slow
def test_a_run_that_has_come_that_far_says_that_nothing_is_trained(texts):
  pretrain = ["-m", "experiments.pretrain", *TOY, f"--workdir={texts}/run", f"--data={texts}/one"]
  run_python(*pretrain, "--steps=2")
  metrics = (texts / "run" / "metrics.jsonl").read_text()
  for steps in (1, 2):
    said = run_python(*pretrain, f"--steps={steps}").splitlines()
    assert said == [f"nothing to train: the run in {texts}/run is at step 2",
                    f"checkpoint: {texts}/run/checkpoints; losses: {texts}/run/training.png"]
  assert (texts / "run" / "metrics.jsonl").read_text() == metrics
  (texts / "run" / "metrics.jsonl").unlink()
  assert run_python(*pretrain, "--steps=2").splitlines()[1] == (
      f"checkpoint: {texts}/run/checkpoints; no picture of losses, for {texts}/run/metrics.jsonl is gone")


@pytest.mark.slow
def test_bits_are_per_token_and_per_byte(texts):
  config = RATPlusConfig(256, 1, 16, 2)
  params = RATPlusLM(config).init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
  rat_jax.save_pretrained(texts / "model", config, params)
  evaluate = ["-m", "experiments.eval_lm", f"--checkpoint={texts}/model", f"--data={texts}/one", "--length=32",
              f"--workdir={texts}/eval"]
  said = run_python(*evaluate, "--mode=per_layer:[snapkv:12,obs_window=4]", check=False)
  assert said.endswith("error: --mode=per_layer:[snapkv:12,obs_window=4] without --prompt_length: SnapKV compresses"
                       " when the prompt ends; give one, such as --prompt_length=16.\n")
  assert not (texts / "eval").exists()
  table = run_python(*evaluate, "--mode=dense", "--mode=snapkv:12,obs_window=4", "--prompt_length=16")
  assert "| bits per token | bits per byte |" in table
  sidecar = json.loads((texts / "eval" / "data" / "heldout.json").read_text())
  assert sidecar["bytes"] == sidecar["tokens"] - sidecar["documents"]
  result = json.loads((texts / "eval" / "results.json").read_text())
  assert result["windows"] == (sidecar["tokens"] - 1) // 32 < 512
  for figures in result["modes"].values():
    assert figures["bits_per_token"] == pytest.approx(math.log2(256), rel=0.05)  # it knows nothing yet
    assert figures["bits_per_byte"] == pytest.approx(figures["bits_per_token"] * sidecar["tokens"] / sidecar["bytes"])


@pytest.mark.slow
def test_what_would_change_nothing_or_lies_elsewhere_is_refused(texts):
  config = RATPlusConfig(256, 1, 16, 2)
  params = RATPlusLM(config).init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
  rat_jax.save_pretrained(texts / "model", config, params)
  there = sorted(texts.iterdir())
  for script, given, message in (
      ("prepare_data", ["--heldout=0.1", "--skip=x"], "error: --heldout, --skip: the standard library's text is cut and"
       " chosen in one way; give a --source too, or leave it out."),
      ("prepare_data", [f"--source={texts}/one/10.txt", "--pattern=*.txt"],
       f"error: --pattern: --source={texts}/one/10.txt is a single file; give a folder, or leave it out."),
      ("prepare_data", ["--workdir=gs://b/run"], "--workdir='gs://b/run' is a URL"),
      ("pretrain", ["--data=s3://b/text"], "--data='s3://b/text' is a URL"),
      ("adapt", ["--checkpoint=none"], "none does not exist; give the folder that a training saved to"),
      ("convert", ["--from=olmo2", "--source=x", "--output=gs://b/m"], "--output='gs://b/m' is a URL"),
      ("pretrain", ["steps=5"], "error: unexpected argument 'steps=5'; every setting is a flag, so write --steps=5."),
      ("eval_niah", ["--checkpoint=none", "--ruler=x"], "error: --ruler: without --text there are no words; give that"),
      ("eval_niah", ["--checkpoint=none", "--text", "--spacing=8", "--table=paper"], "error: --spacing: they are of"),
      ("retrofit", [f"--checkpoint={texts}/model", f"--data={texts}/one", f"--workdir={texts}/run"],
       f"error: --checkpoint={texts}/model has a memory that was trained; train it on with experiments.adapt")):
    said = run_python("-m", f"experiments.{script}", *given, check=False)
    assert message in said, (script, given, said)
    assert len(said.splitlines()) <= 2, said
  assert sorted(texts.iterdir()) == there


@pytest.mark.slow
def test_flags_that_would_change_nothing_are_refused(tmp_path):
  for script, given, message in (
      ("generate", ["--checkpoint=none", "--prompt=x", "--prompt_file=y"],
       "error: --prompt: --prompt_file=y is the text to continue; leave one of them out.\n"),
      ("generate", ["--checkpoint=none", "--temperature=0", "--top_p=0.5"],
       "error: --top_p: --temperature=0 takes the likeliest token and samples none; leave one of them out.\n"),
      ("generate", [f"--checkpoint={tmp_path}/none", "--temperature=0", "--top_p=1"], "/none does not exist"),
      ("retrofit", ["--cost=tiny", "--checkpoint=x", "--nomemory", "--freeze=embedding"],
       "error: --checkpoint, --memory, --freeze: --cost=tiny prints what the retrofit of a preset takes, and trains"
       " nothing; leave it out.\n")):
    assert message in run_python("-m", f"experiments.{script}", *given, check=False), (script, given)
