"""The benchmarks: that they run, check results before they time them, and draw what they have."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import types

import pytest

from conftest import run_python
from experiments import bench_model, bench_ops
from experiments.bench import cases, times, torch_reference
from experiments.bench.cases import Case
from experiments.bench.times import Speeds
from rat_jax import Dilated
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


def test_grouped_heads_are_none_of_the_authors_operators(tmp_path):
  with pytest.raises(ValueError, match="--torch_reference with --kv_heads=2: the authors' code has no grouped heads"):
    bench_ops.authors(dataclasses.replace(OPS, kv_heads=2, torch_reference=str(tmp_path)), [Case("scan", 96)])


def test_the_authors_files_are_modules_that_can_be_looked_up(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"has no src/model/op/ascan\.py"):
    torch_reference.check_paths(str(tmp_path))
  for name in torch_reference.FILES:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(f"NAME = {name!r}\n")
  torch_reference.check_paths(str(tmp_path))
  modules = torch_reference.load(str(tmp_path))
  assert [module.NAME for module in modules] == list(torch_reference.FILES)
  assert all(sys.modules[module.__name__] is module for module in modules)
