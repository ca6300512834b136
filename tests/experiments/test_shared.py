"""What all commands share: flags and settings, ends in words, which run a checkpoint is of, bits per byte."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

import rat_jax
from conftest import ROOT
from experiments import costs, retrofit
from experiments.shared import command, device, inputs, output, training
from rat_jax import RATPlusConfig, RATPlusLM
from rat_jax.data.token_file import Sidecar
from rat_jax.train import Checkpoints
from tests.experiments.command_line import flags_of, settings


@pytest.fixture
def ended(monkeypatch, capsys):
  """What a script says when its `main` is run with arguments and exits with code 1."""
  monkeypatch.setattr(signal, "signal", lambda *_: None)

  def run(main, *arguments):
    with pytest.raises(SystemExit) as exited:
      command.guarded(main, ["script", *arguments])
    assert exited.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err

  return run


def raises(error):
  def main():
    raise error

  return main


COMMANDS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")
REQUIRED = {"checkpoint": "c", "from": "olmo2", "source": "s", "output": "o"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_command_is_a_field_of_its_settings(name):
  module = importlib.import_module(f"experiments.{name}")
  before = set(flags.FLAGS)
  with flags_of(module.define_flags):
    defined = set(flags.FLAGS) - before
  fields = {field.name.rstrip("_") for field in dataclasses.fields(module.Settings)}
  assert fields - {"given"} == {flag for flag in defined if "-" not in flag}  # an alias is no field
  found = settings(module, *(f"--{flag}={REQUIRED[flag]}" for flag in REQUIRED if flag in defined), "--seed=3")
  assert found.seed == 3
  assert found.given == {"seed"} | {flag.replace("from", "from_") for flag in REQUIRED if flag in defined}
  assert hash(found) == hash(dataclasses.replace(found))


MISSING = {"adapt": ("checkpoint",), "bench_model": ("torch_reference",), "bench_ops": ("torch_reference",),
           "bench_released": ("checkpoint",), "chat": ("checkpoint",), "convert": ("source",),
           "demo": ("checkpoint",), "eval_lm": ("checkpoint",), "eval_niah": ("checkpoint",),
           "generate": ("checkpoint",), "hypotheses": ("checkpoint",),
           "prepare_data": ("source",), "pretrain": ("data",), "quickstart": ("data",),
           "retrofit": ("checkpoint",), "sft_niah": ("lm_data",)}
BESIDE = {"bench_model": {"dtype": "bfloat16"}, "sft_niah": {"lm_rows": "2"}}  # what lets the file be looked for
WITHOUT_FILES = {"aot_compile", "bench_convert", "costs", "roofline", "runs", "tables"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bad_flag_is_one_line_with_the_nearest_and_the_fix(name, capsys):
  module = importlib.import_module(f"experiments.{name}")
  with flags_of(module.define_flags):
    bad = {"--seedd=1": "Unknown command line flag 'seedd'. Did you mean: seed", "--seed=x": "flag --seed=x: "}
    if "mode" in flags.FLAGS:
      bad["--mode=dilatted:4"] = "flag --mode=dilatted:4: mode 'dilatted:4': the name 'dilatted' is unknown; use one of"
    for argument, said in bad.items():
      with pytest.raises(SystemExit) as exited:
        command.parsed(["script", argument])
      printed = capsys.readouterr()
      assert exited.value.code == 1
      assert printed.err.startswith(f"error: {said}")
      assert printed.err.count("\n") == 1


@pytest.mark.parametrize("name", sorted(MISSING))
def test_a_missing_file_is_one_line_before_anything_runs(name, ended, tmp_path):
  module, gone = importlib.import_module(f"experiments.{name}"), str(tmp_path / "gone")
  with flags_of(module.define_flags):
    needed = {flag: REQUIRED[flag] for flag in REQUIRED if flag in flags.FLAGS}
    needed |= BESIDE.get(name, {})
    given = needed | {flag: gone for flag in MISSING[name]} | {"workdir": str(tmp_path / "runs")}
    command.parsed(["script", *(f"--{flag}={value}" for flag, value in given.items())])
    said = ended(lambda: module.main(command.settings_of(module.Settings)))
  assert said.startswith("error: ")
  assert said.count("\n") == 1
  assert gone in said


def test_every_command_that_reads_files_is_asked_for_one_that_is_not_there():
  assert set(MISSING) | WITHOUT_FILES == set(COMMANDS)


def test_a_run_goes_on_as_it_is_told(tmp_path):
  model = RATPlusLM(RATPlusConfig(61, 1, 16, 2))
  params = model.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
  state = rat_jax.init_train_state(model, params, rat_jax.make_optimizer(1e-3, total_steps=2))
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  assert not output.resumes("auto", checkpoints)
  assert not output.resumes("never", checkpoints)
  with pytest.raises(ValueError, match=r"^--resume=must: .*checkpoints holds no checkpoint; give"):
    output.resumes("must", checkpoints)
  checkpoints.save(state, model.config, {})
  assert output.resumes("auto", checkpoints)
  assert output.resumes("must", checkpoints)
  with pytest.raises(ValueError, match=r"^--resume=never: .*checkpoints holds a checkpoint of step 0; give"):
    output.resumes("never", checkpoints)


def test_help_shows_the_flags_of_a_command_and_of_what_it_shares():
  with flags_of(retrofit.define_flags):
    said = command.help_of(retrofit.__name__)
  own, freeze, shared, steps = map(said.index, ("Flags of this command:", "--freeze: ",
                                                "Flags of experiments.shared.training:", "--steps: "))
  assert own < freeze < shared < steps
  assert "--learning_rate: Peak learning rate. [6e-05]" in said
  assert "--mode: One update of every batch, repeat it for several in order. [dilated:64, dense]" in said


def test_a_stray_argument_is_said_first_and_alone(ended):
  never = raises(AssertionError("it ran"))
  with flags_of(costs.define_flags):
    assert ended(never, "seed=5", "x") == (
        "error: unexpected argument 'seed=5'; every setting is a flag, so write --seed=5.\n")
    assert ended(never, "x") == (
        "error: unexpected argument 'x'; every setting is a flag, such as --seed=1 (--help lists them).\n")


def test_what_a_user_can_mend_is_one_line_and_nothing_else_is(ended):
  assert ended(raises(ValueError("length=0; use 1."))) == "error: length=0; use 1.\n"
  with pytest.raises(KeyError):
    command.guarded(raises(KeyError("a mistake of ours")), ["script"])


def test_too_little_memory_is_said_with_what_helps(ended):
  full = raises(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 bytes.\nBufferAssignment: ..."))
  for module, fix in ((costs, "lower --length"),
                      (retrofit, "raise --accumulation, or lower --batch_size, or lower --length")):
    with flags_of(module.define_flags):
      assert ended(full) == (f"error: the memory of {device.name()} did not suffice; {fix}. RESOURCE_EXHAUSTED: Out of"
                             " memory: 9 bytes.\n")
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    command.guarded(raises(jax.errors.JaxRuntimeError("INTERNAL: a mistake of ours")), ["script"])


def test_what_jax_says_of_too_little_memory_is_known(ended):
  def full():
    jnp.zeros(2**55, jnp.int8).block_until_ready()

  assert ended(full).count("RESOURCE_EXHAUSTED") == 1


def test_flags_of_paths_take_paths_of_this_machine(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert settings(costs, "--workdir=~/x").workdir == tmp_path / "x"
  assert settings(costs, "--workdir=runs/a").workdir == pathlib.Path("runs/a")
  with pytest.raises(flags.Error, match=r"--workdir='gs://b/run' is a URL, and only files of this machine are read"):
    settings(costs, "--workdir=gs://b/run")


def test_a_rate_bends_with_the_number_of_steps():
  found = settings(retrofit, "--learning_rate=1e-3", "--warmup=0.1")
  before, after = (float(found.optimizer(steps).schedule(np.int32(80))) for steps in (100, 400))
  assert (f"{before:.3g}", f"{after:.3g}") == ("0.000118", "0.00097")
  assert training.rate_change(found, 80, 100, 400) == (
      "--steps=400 where the run had 100: the learning rate of the next batch is 0.00097, it would have been 0.000118")


def test_models_and_data_are_of_this_machine(tmp_path):
  with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none does not exist; give the folder that a training saved"):
    inputs.load_model(str(tmp_path / "none"))
  with pytest.raises(ValueError, match="--checkpoint='gs://b/run' is a URL"):
    inputs.load_model("gs://b/run")
  with pytest.raises(ValueError, match="--data='s3://b/run' is a URL"):
    inputs.corpus("s3://b/run", tmp_path / "data")
  assert not list(tmp_path.iterdir())


def test_data_are_known_by_their_digest_wherever_they_lie(tmp_path):
  old = {"seed": 1, "source": "/a/text", "data_tokens": 9}
  new, elsewhere = old | {"data_sha256": "1f"}, old | {"source": "/b/text", "data_sha256": "1f"}
  for saved, notes in ((new, elsewhere), (elsewhere, new), (old, new), (new, old), (new | {"data_sha256": None}, new)):
    output.check_same_run(tmp_path, saved, notes)
  for saved, notes, message in (
      (new, new | {"data_sha256": "2e"}, "of a run with data_sha256='1f', this one has '2e'; use another --workdir"),
      (old, elsewhere, "of a run with source='/a/text', this one has '/b/text'"),
      (elsewhere | {"data_sha256": None}, new, "of a run with source='/b/text'"),
      (new, elsewhere | {"seed": 2}, "of a run with seed=1, this one has 2")):
    with pytest.raises(ValueError, match=message):
      output.check_same_run(tmp_path, saved, notes)


def test_bits_per_byte():
  """100 tokens of 3 bytes on average, the 4 that end documents included; a byte's own token is one but for those."""
  sidecar = Sidecar("uint16", 300, 0, 100, 4, "some", "x", bytes=300)
  assert inputs.bits_per_byte(6 * math.log(2), sidecar) == pytest.approx(2)
  assert inputs.bits_per_byte(1.0, Sidecar("uint16", 300, 0, 100, 4, "some", "x")) is None
  for known in (96, None):
    found = inputs.bits_per_byte(math.log(2), Sidecar("uint8", 256, 0, 100, 4, "bytes", "x", bytes=known))
    assert found == pytest.approx(100 / 96)
