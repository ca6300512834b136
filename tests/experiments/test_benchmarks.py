"""The benchmarks: that they run, check results before they time them, and draw what they have."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shlex
import shutil
import sys
import types

import jax
import numpy as np
import pytest

from conftest import run_python
from experiments import bench_convert, bench_model, bench_ops, pictures
from experiments.bench import cases, page_tables, times, torch_reference
from experiments.bench.cases import Case
from experiments.bench.times import Speeds
from experiments.shared.table_of_runs import RUNS
from rat_jax import Dilated, RATPlusConfig, RATPlusLM
from rat_jax.train import Checkpoints
from tests.experiments.command_line import settings

NOWHERE = pathlib.Path("/nowhere")
OPS = bench_ops.Settings(
    workdir=NOWHERE, profile=False, heads=4, kv_heads=None, head_dim=16, op=("scan", "prefill", "decode"),
    implementation=("xla",), length=(96,), dilation=(16,), block=(), batch_size=1, window=0, sinks=4, rounds=1,
    torch_reference=None, gradient=False, crossovers=False)
MODEL = bench_model.Settings(
    workdir=NOWHERE, profile=False, chunk=None, remat="products", unroll=False, steps=2, rounds=1, mode=(Dilated(4),),
    part=("decode",), context=(64,), batch_size=(1,), preset=None, memory=True, through_files=False, layers=1, width=16,
    heads=2, kv_heads=None, dtype="float32", torch_reference=None)


def refuses(module, given, message, folder):
  """Asserts that a command ends with a message for these flags, and writes no folder."""
  asked = settings(module, f"--workdir={folder}", *shlex.split(given))
  with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
    module.main(asked)
  assert not folder.exists()


@pytest.mark.slow
def test_every_operation_is_checked_and_timed(tmp_path):
  """In plain JAX, at two lengths: a table, a figure for each operation, errors of bfloat16."""
  told = run_python("-m", "experiments.bench_ops", "--implementation=xla", "--length=96", "--length=200",
                    "--dilation=16", "--block=8", "--heads=4", "--head_dim=16", "--rounds=1", "--profile",
                    f"--workdir={tmp_path}")
  lines = json.loads((tmp_path / "results.json").read_text())["lines"]
  assert [line["case"]["op"] for line in lines] == ["scan"] * 2 + ["prefill"] * 4 + ["decode"] * 6
  assert all(0 < line["error"] < 2e-2 for line in lines)
  assert "times faster than dense" in told
  assert all(line["bytes"] > 0 and line["floor"] > 0 for line in lines)
  assert {line["case"]["op"] for line in lines if not line["flops"]} == {"scan"}
  assert "no kernels: the profiler names none on CPU" in told
  assert all((tmp_path / f"{op}.png").exists() for op in ("scan", "prefill", "decode"))
  refused = run_python("-m", "experiments.bench_ops", f"--torch-reference={tmp_path}", f"--workdir={tmp_path}",
                       check=False)
  assert "has no src/model/op/ascan.py" in refused


@pytest.mark.slow
@pytest.mark.scripts
def test_gradients_are_checked_and_timed(tmp_path, monkeypatch, capsys):
  """Of grouped heads, beside dense attention; a gradient that is a fifth too large is refused."""
  grouped = dataclasses.replace(OPS, workdir=tmp_path, gradient=True, window=3, kv_heads=2)
  bench_ops.main(grouped)
  lines = json.loads((tmp_path / "results.json").read_text())["lines"]
  assert [(line["case"]["op"], line["case"]["dilation"]) for line in lines] == [
      ("scan", 1), ("prefill", 1), ("prefill", 16)]
  assert all(0 < line["error"] < 5e-2 for line in lines)
  assert "scan and gradient T=96" in capsys.readouterr().out
  right = cases.with_gradients

  def scaled(*arguments, **made):
    values, gradients = right(*arguments, **made)
    return values, gradients | {"k": (1.2 if made["k"].dtype == "bfloat16" else 1) * gradients["k"]}

  monkeypatch.setattr(cases, "with_gradients", scaled)
  with pytest.raises(ValueError, match="scan and gradient T=96, B=1: the result is off by"):
    bench_ops.main(grouped)


def test_cases_that_are_not_timed_are_refused():
  cases_of = lambda **changes: bench_ops.cases_of(dataclasses.replace(OPS, **changes))
  with pytest.raises(ValueError, match="--gradient with --op=decode; only scan and prefill have gradients"):
    cases_of(gradient=True, op=("decode",))
  for lengths in ((), (96, 100)):
    with pytest.raises(ValueError, match=r"--block=8 beside --length=\[.*\]; give lengths that are multiples of it"):
      cases_of(block=(8,), length=lengths)
  with pytest.raises(ValueError, match=r"--block=64 beside --length=\[1000\]; give lengths"):
    cases_of(op=("prefill", "sparse"), length=(1000,))
  with pytest.raises(ValueError, match=r"--op=sparse with --block=64 .* give lengths of 1024 or more"):
    cases_of(op=("prefill", "sparse"), length=(512,))
  assert len(cases_of(op=("decode",), length=(96,), block=(8,))) == 3  # dense, D=16, Quest


SCAN, DECODE = "scan has xla/mosaic_gpu/pallas_tpu", "decode has xla/mosaic_gpu/pallas_tpu"
PREFILL = "prefill has xla/mosaic_gpu/pallas_tpu, xla/cudnn/cudnn_masked/mosaic_gpu/pallas_tpu"


@pytest.mark.parametrize("given, message", [
    ("--crossovers --length=64 --op=scan --implementation=xla --torch_reference=x --sinks=0",
     "--op, --implementation, --length, --sinks, --torch_reference: --crossovers has operations and sizes of its own;"
     " leave it out."),
    ("--gradient --op=prefill --op=decode",
     "--gradient with --op=decode; only scan and prefill have gradients that are timed."),
    ("--torch_reference=x --kv_heads=2",
     "--torch_reference with --kv_heads=2: the authors' code has no grouped heads; leave one of them out."),
    ("--torch_reference=x --op=sparse", "--torch_reference: the authors' code has no --op=sparse; leave it out."),
    ("--kv_heads=3", "--kv_heads=3 does not divide --heads=32; every key/value head serves as many query heads."),
    ("--op=scan --heads=4 --kv_heads=3",
     "--heads: --op=scan has the heads of --kv_heads alone; leave one of them out."),
    ("--op=scan --dilation=16 --window=3", "--dilation, --window: --op=scan is not dilated; leave it out."),
    ("--op=sparse --sinks=4", "--sinks: --op=sparse is not dilated; leave it out."),
    ("--window=3 --sinks=0", "--window, --sinks: the standard cases have their own; give --length or --dilation too, or"
     " leave it out."),
    ("--dilation=1 --window=3", "--window: --dilation=1 is dense attention, which has none; leave it out."),
    ("--batch_size=8", "--batch_size: the standard cases of prefill have rows of their own; give --length too, or leave"
     " it out."),
    ("--op=decode --op=sparse --dilation=16 --batch_size=8",
     "--batch_size: the standard cases of sparse have rows of their own; give --length too, or leave it out."),
    ("--op=scan --op=prefill --length=64 --block=8", "--block: --op=scan, prefill reads no blocks; leave it out."),
    ("--gradient --length=64 --block=8", "--block: --op=scan, prefill reads no blocks; leave it out."),
    ("--implementation=xla --implementation=xlaa",
     f"--implementation=xlaa: no operation that is timed has it; {SCAN}; {PREFILL}; {DECODE}."),
    ("--op=prefill --implementation=cudnn",
     f"--implementation=cudnn: no operation that is timed has it; {PREFILL}."),
    ('--op=prefill --op=scan "--implementation=xla, cudnn"',
     "--implementation=['xla, cudnn']: scan has none of them; give --op without scan, or name one of its own:"
     f" {PREFILL}; {SCAN}."),
    ("--op=prefill --dilation=1 --implementation=xla",
     "--implementation: all cases are dense attention, which libraries compute; leave it out."),
])
def test_what_no_operation_takes_is_refused_before_anything_is_drawn(given, message, tmp_path):
  refuses(bench_ops, given, message, tmp_path / "run")


def test_implementations_are_those_that_an_operation_has():
  of = bench_ops.implementations
  names = ("xla", "mosaic_gpu, cudnn", "cudnn_masked", "xla, cudnn_masked")
  assert of("prefill", names) == ["xla, xla", "mosaic_gpu, cudnn", "xla, cudnn_masked"]
  assert of("scan", names) == of("decode", names) == of("sparse", names) == ["xla"]


@pytest.mark.parametrize("given, message", [
    ("--preset=tiny --layers=2 --kv_heads=1", "--layers, --kv_heads: --preset=tiny has its own sizes; leave one of them"
     " out."),
    ("--nomemory", "--memory: it is for a --preset of OLMo 2; leave it out."),
    ("--preset=tiny --nomemory", "--memory: --preset=tiny has a memory of its own; leave it out."),
    ("--chunk=8", "--chunk: --part=prefill alone reads it; give that too, or leave it out."),
    ("--part=prefill --steps=3", "--steps: --part=decode alone reads it; give that too, or leave it out."),
    ("--remat=nothing --unroll", "--remat, --unroll: --part=train alone reads it; give that too, or leave it out."),
    ("--part=prefill --torch_reference=x", "--torch_reference: the authors' code is timed in decoding and training;"
     " give --part=decode or --part=train too, or leave it out."),
    ("--part=train", "--part=train with --mode=snapkv:0.0625: SnapKV compresses when the prompt ends, and a row of"
     " training has none; give the modes to train, such as --mode=dilated:16."),
    ("--part=decode --part=train --mode=dilated:4 --mode=snapkv:80,obs_window=8", "--part=train with"
     " --mode=snapkv:80,obs_window=8: SnapKV compresses when the prompt ends, and a row of training has none; give the"
     " modes to train, such as --mode=dilated:16."),
])
def test_what_no_part_takes_is_refused_before_anything_is_built(given, message, tmp_path):
  refuses(bench_model, given, message, tmp_path / "run")


def test_the_table_of_runs_asks_for_nothing_that_is_refused():
  lines = [shlex.split(line.replace("{reference}", "x")) for run in RUNS.values() for line in run.commands]
  ops, models = ([settings(module, *line[1:]) for line in lines if line[0] == module.__name__]
                 for module in (bench_ops, bench_model))
  assert (len(ops), len(models)) == (8, 10)
  for asked in ops:
    bench_ops.check_flags(asked)
  for asked in models:
    bench_model.check_flags(asked)
    bench_model.check_modes(asked, bench_model.configuration(asked))


def test_blocks_are_called_by_what_was_timed():
  """Quest decodes over them; sparse attention alone reads what it is given."""
  timed = [dataclasses.asdict(Case(op, length, block=64)) for op in ("decode", "sparse") for length in (1024, 2048)]
  lines = [{"case": case, "implementation": "xla", "seconds": 1.0} for case in timed]
  cases_of, _ = page_tables.by_case(lines)
  assert list(cases_of) == [f"{name} 1/16, blocks of 64, T={length}, B=1" for name in ("Quest", "sparse attention")
                            for length in (1024, 2048)]
  named = {op: pictures.against_length(lines, op).legends[0].get_texts()[0].get_text() for op in ("decode", "sparse")}
  assert named == {"decode": "Quest, blocks of 64", "sparse": "blocks of 64"}


@pytest.mark.slow
def test_the_seed_draws_the_checkpoint_that_is_converted(tmp_path):
  config = RATPlusConfig(16, 1, 8, 2)
  for seed in (0, 3):
    bench_convert.random_checkpoint(config, tmp_path / str(seed), seed)
    drawn = RATPlusLM(config).init(jax.random.key(seed), np.zeros((1, 4), np.int32))["params"]
    saved = Checkpoints(tmp_path / str(seed)).load_params()[1]
    np.testing.assert_allclose(saved["embedding"], drawn["embedding"], rtol=1e-5)


def test_work_is_that_of_the_arrays_and_products():
  """Counted by hand, of 2 query heads over 1 of width 8; only decoding takes the faster of reads and copies."""
  size = cases.Size(2, 1, 8)
  keys = {1: 1 + 2 + 3 + 4, 2: 1 + 2 + 3 + 3}  # by D, of four queries; with a sink the last one sees 0, 1 and itself
  expected = {
      Case("scan", 10): (5 * 10 * 16, 0, 80, 80),
      Case("prefill", 4): (6 * 4 * 16, 4 * 2 * 8 * keys[1], 38.4, 38.4),
      Case("prefill", 4, 1, 2, 0, 1): (5 * 4 * 16, 4 * 2 * 8 * keys[2], 32.576, 32.576),
      Case("decode", 32, 3, 16): (3 * 2 * 3 * 16, 3 * 3 * 4 * 2 * 8, 28.8, 14.4),
      Case("prefill", 4, gradient=True): (18 * 4 * 16, 14 * 2 * 8 * keys[1], 115.2, 115.2),
      Case("scan", 10, gradient=True): (15 * 10 * 16, 0, 240, 240)}
  for case, of_case in expected.items():
    floors = [cases.floor(case, size, Speeds(10, read, 1000)) for read in (5, 20)]
    assert (*cases.work(case, size), *floors) == pytest.approx(of_case), case


@pytest.mark.slow
@pytest.mark.scripts
def test_whole_models_are_timed_at_every_batch_and_context(tmp_path):
  run_python("-m", "experiments.bench_model", "--layers=1", "--width=16", "--heads=2", "--context=32", "--context=64",
             "--batch_size=1", "--batch_size=2", "--mode=dilated:4", "--part=prefill", "--part=decode", "--part=train",
             "--steps=2", "--rounds=1", f"--workdir={tmp_path}")
  lines = json.loads((tmp_path / "results.json").read_text())["lines"]
  assert len({(line["part"], line["mode"], line["context"], line["batch_size"]) for line in lines}) == 24
  assert all(line["error"] < 1e-3 and line["floor"] > 0 for line in lines)
  assert (tmp_path / "decode.png").exists()


@pytest.mark.slow
def test_a_model_with_a_wrong_kernel_is_not_timed(tmp_path):
  """A kernel for decoding that halves what it should give, and one that gives the same as plain JAX."""
  small = ("--layers=2", "--width=32", "--heads=2", "--context=64", "--batch_size=3", "--mode=dilated:4", "--steps=2",
           "--rounds=1", f"--workdir={tmp_path}")
  scaled = ("-m", "kernels.scaled_decode")
  assert "decode under dense: the result is off by" in run_python(*scaled, "0.5", *small, check=False)
  run_python(*scaled, "1", *small)
  nan = run_python(*scaled, "nan", *small, check=False)
  assert "decode under dense: the result is not finite; it is not timed" in nan


def test_kernels_of_a_trace_add_up(monkeypatch):
  """A plane of a device with two streams and one of the host, of two calls; copies of a kernel are one."""
  made = lambda **fields: types.SimpleNamespace(**fields)
  events = lambda *pairs: [made(name=name, duration_ns=ns) for name, ns in pairs]
  planes = [made(name="/device:GPU:0", lines=[
      made(name="Stream #1", events=events(("scan_1", 3e6), ("scan_2", 1e6), ("gemm", 2e6))),
      made(name="Stream #2", events=events(*((f"small{i}x", 2e3 * (i + 1)) for i in range(20)))),
      made(name="Steps", events=events(("0", 9e9)))]), made(name="/host:CPU", lines=[
          made(name="Stream #3", events=events(("host", 9e9)))])]
  read = made(from_file=lambda path: made(planes=planes))
  monkeypatch.setattr(times.jax.profiler, "ProfileData", read)
  seconds = times.kernels(pathlib.Path("trace"))
  assert seconds["scan"] == pytest.approx([3e-3, 1e-3])
  assert len(seconds) == 22
  rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in times.table(seconds, 2).splitlines()]
  assert rows[2:4] == [["scan", "1", "2.000"], ["gemm", "0.5", "1.000"]]
  assert rows[-2:] == [["6 others", "3", "0.021"], ["all", "11.5", "3.210"]]


@pytest.mark.parametrize("command", [bench_ops, bench_model])
def test_the_authors_code_is_given_with_a_dash_too(command):
  for flag in ("--torch-reference", "--torch_reference"):
    assert settings(command, f"{flag}=checkout").torch_reference == "checkout"


def test_a_model_unlike_the_authors_is_refused(tmp_path):
  """Before their code is looked for, or ours runs."""
  run = lambda **changes: bench_model.main(
      dataclasses.replace(MODEL, workdir=tmp_path, torch_reference=str(tmp_path), **changes))
  with pytest.raises(ValueError, match="num_kv_heads: 1, 2; dtype: 'float32', 'bfloat16'"):
    run(kv_heads=1)
  with pytest.raises(FileNotFoundError, match=r"has no src/model/op/ascan\.py"):
    run(dtype="bfloat16")


def write_checkout(folder):
  """What stands for the authors' files: modules with their own NAME."""
  for name in torch_reference.FILES:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"NAME = {name!r}\n")


def test_a_failure_of_the_authors_code_is_one_line(tmp_path, monkeypatch):
  write_checkout(tmp_path)
  monkeypatch.setattr(sys, "executable", shutil.which("false"))
  with pytest.raises(ValueError, match=f"^--torch_reference={tmp_path}: the authors' code ended with 1, for the reason"
                     r" above; mend that, or leave the flag out to time ours alone\.$"):
    torch_reference.ask(str(tmp_path), {"cases": []})


def test_the_authors_files_are_modules_that_can_be_looked_up(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"has no src/model/op/ascan\.py"):
    torch_reference.check_paths(str(tmp_path))
  write_checkout(tmp_path)
  torch_reference.check_paths(str(tmp_path))
  modules = torch_reference.load(str(tmp_path))
  assert [module.NAME for module in modules] == list(torch_reference.FILES)
  assert all(sys.modules[module.__name__] is module for module in modules)
