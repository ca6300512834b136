"""What all scripts share: flags that hold paths, ends in words, which run a checkpoint is of, bits per byte."""

from __future__ import annotations

import math
import signal

import jax
import pytest
from absl import flags

from experiments import common
from rat_jax.data.token_file import Sidecar


@pytest.fixture
def ended(monkeypatch, capsys):
  """What a script says when its `main` is run with arguments and exits with code 1."""
  monkeypatch.setattr(signal, "signal", lambda *_: None)

  def run(main, *arguments):
    with pytest.raises(SystemExit) as exited:
      common.guarded(main, ["script", *arguments])
    assert exited.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err

  return run


def raises(error):
  def main():
    raise error

  return main


def test_a_stray_argument_is_said_first_and_alone(ended):
  never = raises(AssertionError("it ran"))
  assert ended(never, "seed=5", "x") == (
      "error: unexpected argument 'seed=5'; every setting is a flag, so write --seed=5.\n")
  assert ended(never, "x") == (
      "error: unexpected argument 'x'; every setting is a flag, such as --seed=1 (--help lists them).\n")


def test_what_a_user_can_mend_is_one_line_and_nothing_else_is(ended):
  assert ended(raises(ValueError("length=0; use 1."))) == "error: length=0; use 1.\n"
  with pytest.raises(KeyError):
    common.guarded(raises(KeyError("a mistake of ours")), ["script"])


def test_too_little_memory_is_said_with_what_helps(ended):
  """The flags of a script that trains are in test_training.py."""
  said = ended(raises(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 bytes.\nBufferAssignment: ...")))
  assert said.startswith(f"error: the memory of {common.device()} did not suffice; ")
  assert said.endswith(" RESOURCE_EXHAUSTED: Out of memory: 9 bytes.\n")
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    common.guarded(raises(jax.errors.JaxRuntimeError("INTERNAL: a mistake of ours")), ["script"])


def test_flags_of_paths_take_paths_of_this_machine(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  parse = flags.FLAGS["workdir"].parser.parse
  assert [parse("~/x"), parse("runs/a")] == [f"{tmp_path}/x", "runs/a"]
  with pytest.raises(ValueError, match=r"--workdir='gs://b/run' is a URL, and only files of this machine are read"):
    parse("gs://b/run")


def test_models_and_data_are_of_this_machine(tmp_path):
  with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none does not exist; give the folder that a training saved"):
    common.load_model(str(tmp_path / "none"))
  with pytest.raises(ValueError, match="--checkpoint='gs://b/run' is a URL"):
    common.load_model("gs://b/run")
  with pytest.raises(ValueError, match="--data='s3://b/run' is a URL"):
    common.corpus("s3://b/run", tmp_path / "data")
  assert not list(tmp_path.iterdir())


def test_data_are_known_by_their_digest_wherever_they_lie(tmp_path):
  old = {"seed": 1, "source": "/a/text", "data_tokens": 9}
  new, elsewhere = old | {"data_sha256": "1f"}, old | {"source": "/b/text", "data_sha256": "1f"}
  for saved, notes in ((new, elsewhere), (elsewhere, new), (old, new), (new, old), (new | {"data_sha256": None}, new)):
    common.check_same_run(tmp_path, saved, notes)
  for saved, notes, message in (
      (new, new | {"data_sha256": "2e"}, "of a run with data_sha256='1f', this one has '2e'; use another --workdir"),
      (old, elsewhere, "of a run with source='/a/text', this one has '/b/text'"),
      (elsewhere | {"data_sha256": None}, new, "of a run with source='/b/text'"),
      (new, elsewhere | {"seed": 2}, "of a run with seed=1, this one has 2")):
    with pytest.raises(ValueError, match=message):
      common.check_same_run(tmp_path, saved, notes)


def test_bits_per_byte():
  """100 tokens of 3 bytes on average, the 4 that end documents included; a byte's own token is one but for those."""
  sidecar = Sidecar("uint16", 300, 0, 100, 4, "some", "x", bytes=300)
  assert common.bits_per_byte(6 * math.log(2), sidecar) == pytest.approx(2)
  assert common.bits_per_byte(1.0, Sidecar("uint16", 300, 0, 100, 4, "some", "x")) is None
  for known in (96, None):
    found = common.bits_per_byte(math.log(2), Sidecar("uint8", 256, 0, 100, 4, "bytes", "x", bytes=known))
    assert found == pytest.approx(100 / 96)
