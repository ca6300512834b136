"""Who sees whom: literal grids, the text form, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, strategies as st

from rat_jax import Dense, Dilated, MoBA, PerHead, PerLayer, Quest, StreamingLLM, parse_mode, visible
from rat_jax.modes import MODES, Mode
from rat_jax.plan import layer_runs

DILATED_3 = """
1.......
.1......
..1.....
..11....
..1.1...
..1..1..
..1..11.
..1..1.1
"""
DILATED_3_WINDOW_1_SINKS_1 = """
1.......
11......
111.....
1.11....
1.111...
1.1.11..
1.1..11.
1.1..111
"""
SINKS_BEYOND_A_BLOCK = """
1.......
11......
111.....
1111....
111.1...
111..1..
111..11.
111..1.1
"""
STREAMING_2_1 = """
1.......
11......
111.....
1111....
1.111...
1..111..
1...111.
1....111
"""
LONGER_THAN_THE_SEQUENCE = """
1.......
.1......
..1.....
...1....
....1...
.....1..
......1.
.......1
"""


def grid(text):
  return np.array([[c == "1" for c in line] for line in text.split()])


@pytest.mark.parametrize(("mode", "text"), [
    (Dilated(3), DILATED_3),
    (Dilated(3, window=1, sinks=1), DILATED_3_WINDOW_1_SINKS_1),
    (Dilated(3, sinks=3), SINKS_BEYOND_A_BLOCK),
    (StreamingLLM(2, sinks=1), STREAMING_2_1),
    (Dilated(None, 2, 1), STREAMING_2_1),
    (Dilated(9), LONGER_THAN_THE_SEQUENCE),
    (Dilated(None), LONGER_THAN_THE_SEQUENCE),
])
def test_grids(mode, text):
  np.testing.assert_array_equal(visible(mode, np.arange(8), np.arange(8)), grid(text))


def test_dense_is_lower_triangular_and_so_are_its_equals():
  triangle = np.tri(8, dtype=bool)
  for mode in (Dense(), Dilated(1), Dilated(5, window=7), Dilated(5, sinks=8), StreamingLLM(7, 0)):
    np.testing.assert_array_equal(visible(mode, np.arange(8), np.arange(8)), triangle)


def test_negative_positions_see_nothing_and_are_seen_by_nobody():
  positions = np.array([[-1, 0, 1], [0, -1, -1]])
  seen = np.asarray(visible(Dense(), positions, positions))
  np.testing.assert_array_equal(seen[0], [[0, 0, 0], [0, 1, 0], [0, 1, 1]])
  np.testing.assert_array_equal(seen[1], [[1, 0, 0], [0, 0, 0], [0, 0, 0]])


def test_positions_of_any_integer_type():
  narrow = np.arange(256).astype(np.uint8)
  expected = visible(Dilated(16), np.arange(256), np.arange(256))
  np.testing.assert_array_equal(visible(Dilated(16), narrow, narrow), expected)


def test_positions_broadcast():
  assert visible(Dense(), np.zeros((2, 3, 4), int), np.zeros((3, 5), int)).shape == (2, 3, 4, 5)


modes = st.one_of(
    st.just(Dense()),
    st.builds(Dilated, st.one_of(st.none(), st.integers(1, 99)), st.integers(0, 99), st.integers(0, 9)),
    st.builds(StreamingLLM, st.integers(0, 99), st.integers(0, 9)))
all_modes = modes | st.builds(PerLayer, st.lists(modes, min_size=1, max_size=4).map(tuple))


@given(all_modes)
def test_text_round_trip(mode):
  read = parse_mode(str(mode))
  assert read == mode
  assert hash(read) == hash(mode)


def test_text_forms():
  assert str(Dilated(16, window=256, sinks=4)) == "dilated:16,window=256,sinks=4"
  assert str(Dense()) == "dense"
  assert str(StreamingLLM(32)) == "streaming_llm:32"
  assert str(Dilated(None, 3)) == "dilated:none,window=3"
  assert parse_mode("dilated: dilation=8, sinks=2") == Dilated(8, sinks=2)
  assert parse_mode("per_layer:[dense;dilated:8,sinks=1]") == PerLayer((Dense(), Dilated(8, sinks=1)))


def test_a_union_is_read_as_it_is_written_in_code_and_as_it_is_printed():
  union = StreamingLLM(64) | Quest(1024)
  assert str(union) == "quest:1024,also=(streaming_llm:64)"
  for text in (str(union), "streaming_llm:64|quest:1024", " streaming_llm: 64 | quest: 1024 "):
    assert parse_mode(text) == union
  layers = PerLayer((Dense(), Dilated(8, sinks=1) | MoBA(0.25)))
  for text in (str(layers), "per_layer:[dense;dilated:8,sinks=1|moba:0.25]"):
    assert parse_mode(text) == layers


def test_a_mode_is_given_back_as_it_is():
  for mode in (Dense(), StreamingLLM(64) | Quest(1024)):
    assert parse_mode(mode) is mode
  for other in (None, 16, b"dense", ["dense"]):
    with pytest.raises(ValueError, match=r"give a text such as 'dilated:16', or a mode\."):
      parse_mode(other)


@pytest.mark.parametrize("name", MODES)
def test_errors_list_fields_in_the_order_of_arguments(name):
  """So what they list first is what a text gives first; a mode without a needed field has none to miss."""
  order = {"quest": "budget, block, keep_first, dense_layers, group, selector, seed, also, rounding",
           "moba": "top_k, block, keep_first, dense_layers, group, selector, seed, also",
           "snapkv": "capacity, obs_window, kernel, pool, dense_layers, group, selector, seed",
           "topk": "budget, window, sinks, dense_layers, group, selector, seed"}
  with pytest.raises(ValueError, match=f"fields of {name} are: {order.get(name, '')}"):
    parse_mode(f"{name}:none_such=1")


@dataclasses.dataclass(frozen=True, eq=False)
class Columns(Mode):
  """A mode of a user's own, which checks nothing."""

  name: ClassVar[str] = "columns"
  columns: tuple[int, ...]


def test_lists_become_tuples_and_what_cannot_be_hashed_is_named():
  for mode, same in ((Columns([3, 5]), Columns((3, 5))), (PerLayer([Dense(), Dense()]), PerLayer((Dense(), Dense()))),
                     (Quest(0.5, dense_layers=[1, 0, 1]), Quest(0.5, dense_layers=(0, 1)))):
    assert (mode, hash(mode), str(mode)) == (same, hash(same), str(same))
  with pytest.raises(TypeError, match=r"Columns: columns=\{3: 5\}; a mode is a static argument, so store"):
    hash(Columns({3: 5}))


@pytest.mark.parametrize(("text", "message"), [
    ("quux:3", "'quux' is unknown"),
    ("dilated", "fields of dilated are: dilation, window, sinks"),
    ("dilated:3,width=4", "unexpected keyword argument 'width'"),
    ("dilated:window=3,4", "comes after field=value"),
    ("dilated:0", "dilation=0"),
    ("dilated:3.5", "dilation=3.5"),
    ("dilated:$", "is no number"),
    ("", "the name '' is unknown"),
    ("dilated:4,window=1,window=2", "window is given twice; leave one of them out"),
    ("dense|", r"^mode 'dense\|': the name '' is unknown"),
    ("dilated:16,,window=3", "^mode 'dilated:16,,window=3': '16,,window=3' has nothing before or after a ','; write it,"
     r" or leave that out\.$"),
    ("dilated:16,", "'16,' has nothing before or after a ','"),
    ("per_layer:[dense;;dilated:8]", r"^mode 'per_layer:\[dense;;dilated:8\]': 'dense;;dilated:8' has nothing before"),
    ("per_layer:[dense;dilated:0]", r"^mode 'per_layer:\[dense;dilated:0\]': Dilated: dilation=0; use an integer"),
    ("quest:1024,also=(dilated:$)", r"^mode 'quest:1024,also=\(dilated:\$\)': '\$' is no number"),
    ("dense|dilated:4", "dense and dilated:4 have no union; write a position-only mode, then one that chooses blocks"),
    ("quest:1024|streaming_llm:8", "quest:1024 and streaming_llm:8 have no union"),
    ("dense|streaming_llm:8|quest:1024", "dense and streaming_llm:8 have no union"),
    ("per_layer:[dense]|quest:1024", "give a position-only mode such as StreamingLLM"),
])
def test_bad_text(text, message):
  with pytest.raises(ValueError, match=message):
    parse_mode(text)


def test_text_nested_too_deeply():
  with pytest.raises(ValueError, match=r"^mode 'dilated:\[\[.*': nested too deeply$"):
    parse_mode("dilated:" + "[" * 5000 + "]" * 5000)


@pytest.mark.parametrize(("build", "message"), [
    (lambda: Dilated(0), "dilation=0; use an integer of at least 1"),
    (lambda: Dilated(-1), "or None for window and sinks"),
    (lambda: Dilated(4, window=-1), "window=-1"),
    (lambda: Dilated(4, sinks=-2), "sinks=-2"),
    (lambda: Dilated(True), "dilation=True"),
    (lambda: Dilated(2**40), "dilation=1099511627776; .* 2\\*\\*30 at most"),
    (lambda: StreamingLLM(-1), "window=-1"),
    (lambda: PerLayer(()), "empty"),
    (lambda: PerLayer((PerLayer((Dense(),)),)), "not itself a PerLayer"),
    (lambda: PerLayer((3,)), r"modes\[0\]=3"),
    (lambda: PerLayer({Dense()}), r"^PerLayer: modes=\{Dense\(\)\}; give a tuple with one mode for each layer\.$"),
    (lambda: PerHead({Dense(): 1}), "^PerHead: modes=.*; give a tuple with one mode for each key/value head"),
    (lambda: visible(Dense(), [0.7, 1.9], [0]), r"^q_pos is float32 \(2,\); give integers \[\.\.\., T\]\.$"),
    (lambda: visible(Dense(), [0], [True]), r"^k_pos is bool \(1,\); give integers \[\.\.\., S\]\.$"),
    (lambda: visible(Dense(), 3, [0]), r"^q_pos is int32 \(\); give integers \[\.\.\., T\], with at least one axis\.$"),
    (lambda: visible(Dense(), [0], np.array([2**32], np.uint64)), "^k_pos holds 4294967296, which int32 does not"),
    (lambda: layer_runs(PerLayer((Dense(), Dense())), 3), "modes has 2 entries and the model num_layers=3"),
    (lambda: visible(PerLayer((Dense(),)), np.arange(2), np.arange(2)), "Pass one of its modes"),
])
def test_bad_modes(build, message):
  with pytest.raises(ValueError, match=message):
    build()


def test_numpy_scalars_become_python_ones():
  mode = Dilated(np.int64(4), np.int32(2), np.uint8(1))
  assert mode == Dilated(4, 2, 1)
  assert all(type(x) is int for x in (mode.dilation, mode.window, mode.sinks))


def test_layers_of_equal_mode_run_together():
  runs = layer_runs(PerLayer((Dense(), Dense(), Dilated(4), Dense())), 4)
  assert [(run.start, run.stop) for run in runs] == [(0, 2), (2, 3), (3, 4)]
  assert [(run.start, run.stop) for run in layer_runs(Dilated(4), 4)] == [(0, 4)]
