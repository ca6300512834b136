"""A batch of two needle tasks and two rows of text: the rows are windows of the text."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from absl import flags

from experiments import sft_niah

flags.FLAGS(sys.argv)
text = np.asarray(sft_niah.text().tokens)
stage = sft_niah.stages(8)[0]
assert [sum(rows.count for rows in sft_niah.Stage(64, n, 1).mixture) for n in (4, 5, 7)] == [4, 5, 7]
with pytest.raises(ValueError, match="less than two rows for each of 2 tasks"):
  print(sft_niah.Stage(64, 3, 1).mixture)
made = {name: np.asarray(x) for name, x in sft_niah.batch_of(stage, 3, 5, text).items()}
alone = {name: np.asarray(x) for name, x in sft_niah.batch_of(stage, 3, 5).items()}
assert (made["tokens"].shape, alone["tokens"].shape) == ((10, 96), (8, 96))
for name in made:
  np.testing.assert_array_equal(made[name][:8], alone[name])
whole = bytes(text)
for tokens, targets in zip(made["tokens"][8:], made["targets"][8:], strict=True):
  assert bytes(tokens.astype(np.uint8)) in whole
  assert ((targets == np.append(tokens[1:], targets[-1])) | (tokens == 0)).all()
  assert (targets[tokens == 0] == -100).all()
np.testing.assert_allclose(made["weights"][8:].sum(), 1, rtol=1e-5)
