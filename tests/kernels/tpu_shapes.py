"""Shapes at which the kernels for TPUs are tested: in the interpreter, on a TPU, and by the compiler for TPUs alone."""

from __future__ import annotations

import pytest

from pallas_kernels.decode.arg_specs import ArgSpec as Decode
from pallas_kernels.dilated.arg_specs import ARG_SPECS as DILATED_SPECS, ArgSpec as Dilated
from pallas_kernels.pattern import Pattern
from pallas_kernels.scan.arg_specs import ARG_SPECS as SCAN_SPECS, SMALL as SMALL_SCAN, ArgSpec as Scan
from pallas_kernels.sparse.arg_specs import ArgSpec as Sparse

SCANS = SMALL_SCAN | {"three float32 inputs": Scan(1, 300, 8, 128, "float32", "float32", inputs=3),
                      "two tiles": Scan(1, 700, 1, 128, "float32", "float32", reset=True),
                      "nine groups": Scan(1, 150, 9, 128)}


def dilated(length, pattern, heads=1, groups=1, dtype="float32", width=128):
  return Dilated(1, length, heads * groups, heads, width, dtype, Pattern(*pattern))


DILATEDS = {
    "heads of 384": dilated(700, (4, 200, 2), width=384), "an enormous dilation": dilated(64, (858993460, 0, 1)),
    "one token": dilated(1, (4, 0, 0)), "no window": dilated(300, (16, 0, 4), groups=2),
    "window and sinks": dilated(300, (8, 40, 9), heads=2), "no dilation": dilated(300, (None, 70, 0)),
    "sinks alone": dilated(140, (None, 0, 3)), "the own token alone": dilated(140, (None, 0, 0)),
    "dense": dilated(260, (1, 0, 0)), "a window beyond the row": dilated(140, (4, 300, 2)),
    "sinks beyond the row": dilated(140, (4, 3, 300)), "D beyond the row": dilated(140, (500, 3, 2)),
    "a window of three blocks": dilated(700, (32, 300, 2)), "wide heads": dilated(140, (4, 5, 2), width=256),
    "several blocks of queries": dilated(2100, (4, 0, 3)), "dense, several blocks": dilated(1100, (1, 0, 0)),
    "grouped heads, several blocks and a window": dilated(1300, (64, 600, 3), groups=2),
    "bfloat16, grouped heads": dilated(300, (16, 5, 4), groups=4, dtype="bfloat16"),
    "bfloat16, a window": dilated(200, (16, 150, 4), dtype="bfloat16")}
DECODES = {
    "one row": Decode(1, 1, 1, 1, dtype="float32"), "ragged": Decode(3, 37, 2, 2, dtype="float32"),
    "grouped heads, own token": Decode(3, 21, 6, 2, dtype="float32", own=True),
    "a mask for every head": Decode(2, 30, 4, 2, dtype="float32", per_head=True),
    "the last of three layers": Decode(2, 10, 2, 1, dtype="float32", layers=3),
    "several blocks of rows": Decode(2, 1500, 2, 2, dtype="float32", own=True),
    "several, with a mask for every head": Decode(2, 1100, 2, 1, dtype="float32", per_head=True),
    "blocks": Decode(2, 96, 2, 2, dtype="float32", block=16, chosen=3),
    "blocks of query heads, own token": Decode(2, 72, 4, 2, dtype="float32", block=16, chosen=4, apart=True, own=True),
    "blocks of wide heads, layers": Decode(2, 64, 4, 2, 256, "float32", block=8, chosen=3, layers=2),
    "bfloat16, own token": Decode(3, 65, 4, 4, own=True), "bfloat16, blocks": Decode(2, 48, 4, 2, block=16, chosen=2)}
SPARSES = {
    "one key": Sparse(2, 1, 2, 1, 128, "float32", block=8),
    "ragged tiles": Sparse(1, 37, 6, 2, 128, "float32", block=8, chosen=3),
    "a choice for each group": Sparse(1, 64, 4, 2, 128, "float32", block=16, chosen=2, apart=False),
    "a window and sinks": Sparse(1, 50, 2, 2, 128, "float32", block=8, chosen=2, rule=Pattern(None, 5, 2)),
    "one query": Sparse(3, 70, 4, 4, 128, "float32", block=16, chosen=2, queries=1, rule=Pattern(None, 5, 1)),
    "queries at any positions": Sparse(1, 40, 2, 2, 128, "float32", block=8, chosen=3, queries=11),
    "several tiles": Sparse(1, 300, 2, 1, 128, "float32", block=64, chosen=2),
    "wide heads": Sparse(1, 30, 1, 1, 256, "float32", block=8, chosen=2),
    "queries beyond the keys": Sparse(1, 45, 2, 1, 128, "float32", block=16, chosen=2, queries=20,
                                      rule=Pattern(None, 9, 2)),
    "bfloat16, a window": Sparse(1, 96, 4, 2, 128, block=16, chosen=2, rule=Pattern(None, 3, 1))}
QUICK = [("gated_scan", Scan(1, 37, 1, 16, "float32", "float32", reset=True)),
         ("dilated_attention", DILATEDS["no window"]),
         ("decode_attention", DECODES["blocks of query heads, own token"]),
         ("sparse_attention", SPARSES["a window and sinks"])]
EVERY = [pytest.param(operation, spec, id=f"{operation}, {name}")
         for operation, specs in (("gated_scan", SCANS), ("dilated_attention", DILATEDS),
                                  ("decode_attention", DECODES), ("sparse_attention", SPARSES))
         for name, spec in specs.items()]
COMPILED = [("gated_scan", SCAN_SPECS[name]) for name in ("prefill_32k", "train_4k", "few_channels")] + [
    ("dilated_attention", DILATED_SPECS[name]) for name in ("prefill_32k", "train_4k_sparser", "window_and_sinks")] + [
    ("dilated_attention", dilated(16384, (16, 256, 4), heads=8, groups=4, dtype="bfloat16")),
    ("dilated_attention", dilated(4096, (64, 0, 4), groups=16, dtype="bfloat16")),
    ("decode_attention", Decode.compact(32, 16384, 64, own=True, layers=2)),
    ("decode_attention", Decode(4, 16384, 32, 8, own=True)), ("decode_attention", Decode(1, 131072)),
    ("decode_attention", Decode(16, 16384, block=64, chosen=16, apart=True)),
    ("decode_attention", Decode(4, 131072, 32, 8, block=512, chosen=16, own=True)),
    ("decode_attention", Decode(4, 300, 12, 2, per_head=True)),
    ("sparse_attention", Sparse.sixteenth(16384, 64, kv_heads=8)), ("sparse_attention", Sparse.sixteenth(65536, 512)),
    ("sparse_attention", Sparse.sixteenth(16384, 512, rule=Pattern(None, 64, 4), kv_heads=8, apart=False)),
    # The most that VMEM is asked for.
    ("gated_scan", Scan(1, 1024, 8, inputs=4)), ("gated_scan", Scan(1, 1024, 8, 128, "float32", "float32", inputs=3)),
    ("dilated_attention", dilated(8192, (16, 700, 4), width=384)),
    ("sparse_attention", Sparse(1, 2048, 32, 1, 128, block=64, chosen=4, apart=False)),
    ("dilated_attention", dilated(262144, (16, 0, 4), heads=4, dtype="bfloat16")),
    ("dilated_attention", dilated(16384, (16, 256, 4), groups=32, dtype="bfloat16")),
    ("dilated_attention", dilated(8192, (1, 0, 0), heads=8, width=256)),
    ("dilated_attention", dilated(16384, (None, 4096, 4), groups=8, dtype="bfloat16")),
    ("decode_attention", Decode(1, 65536, 2, 2, block=64, chosen=256, own=True)),
    ("sparse_attention", Sparse(1, 16384, 16, 1, block=1024, chosen=4, apart=False, rule=Pattern(None, 64, 4))),
    ("sparse_attention", Sparse(1, 8192, 2, 2, 512, "float32", block=512, chosen=2))]
SMALL_COMPILED = {
    "gated_scan": Scan(1, 256, 8, reset=True), "dilated_attention": dilated(512, (16, 100, 4), dtype="bfloat16"),
    "decode_attention": Decode(2, 512, 4, 2, block=64, chosen=3, own=True),
    "sparse_attention": Sparse(1, 512, 2, 1, block=64, chosen=2)}
