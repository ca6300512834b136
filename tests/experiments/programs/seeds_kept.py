"""Which seeds pass --leave_at, and which are kept beside --stragglers."""

from __future__ import annotations

import sys

import numpy as np
from absl import flags

from experiments import sft_niah

flags.FLAGS(sys.argv)
found = sft_niah.passes(np.array([[0.9, 0.2, 0.95], [1, 1, 0.8], [0.89, 1, 1]]))
assert found.tolist() == [True, False, False], found
kept = [sft_niah.keep(np.array(worst)).tolist() for worst in ([95, 99, 96, 100], [40, 99, 60, 30], [0, 95, 1, 97])]
assert kept == [[True, True, False, False], [False, True, True, False], [False, True, False, True]], kept
