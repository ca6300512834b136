"""The benchmarks: that they run, check results before they time them, and draw what they have."""

from __future__ import annotations

import json
import pathlib
import sys
import types

import pytest

from conftest import run_python
from experiments import kernel_times, plots, torch_reference


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
  assert "no kernels: the profiler names none on CPU" in told
  assert all((tmp_path / f"{op}.png").exists() for op in ("scan", "prefill", "decode"))
  refused = run_python("-m", "experiments.bench_ops", f"--torch_reference={tmp_path}", f"--workdir={tmp_path}",
                       check=False)
  assert "has no src/model/op/ascan.py" in refused


@pytest.mark.slow
def test_whole_models_are_timed_at_every_batch_and_context(tmp_path):
  run_python("-m", "experiments.bench_model", "--layers=1", "--width=16", "--heads=2", "--context=32", "--context=64",
             "--batch_size=1", "--batch_size=2", "--mode=dilated:4", "--part=prefill", "--part=decode", "--part=train",
             "--steps=2", "--rounds=1", f"--workdir={tmp_path}")
  lines = json.loads((tmp_path / "results.json").read_text())["lines"]
  assert len({(line["part"], line["mode"], line["context"], line["batch_size"]) for line in lines}) == 24
  assert (tmp_path / "decode.png").exists()


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
  monkeypatch.setattr(kernel_times.jax.profiler, "ProfileData", read)
  seconds = kernel_times.kernels(pathlib.Path("trace"))
  assert seconds["scan"] == pytest.approx([3e-3, 1e-3])
  assert len(seconds) == 22
  rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in kernel_times.table(seconds, 2).splitlines()]
  assert rows[2:4] == [["scan", "1", "2.000"], ["gemm", "0.5", "1.000"]]
  assert rows[-2:] == [["6 others", "3", "0.021"], ["all", "11.5", "3.210"]]


def test_what_did_not_fit_is_not_drawn(tmp_path):
  lines = [{"mode": mode, "context": context, "batch_size": 1, "seconds": 1.0}
           for mode, context in (("dense", 32), ("dilated:4", 32), ("dilated:4", 64))]
  plots.draw_throughput(lines, tmp_path / "two.png")
  assert (tmp_path / "two.png").exists()
  plots.draw_throughput(lines[:2], tmp_path / "one.png")  # nothing varies
  assert not (tmp_path / "one.png").exists()


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
