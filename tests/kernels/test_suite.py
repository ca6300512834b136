"""Every implementation of the table against its operation's reference; the same on whatever device is there.

On a processor the kernels for GPUs say why they do not run; their own tests run them in Pallas' interpreter.
"""

from __future__ import annotations

import pytest

from kernels import suite
from pallas_kernels.table import IMPLEMENTATIONS

EVERY = [pytest.param(operation, name, spec, id=f"{operation}, {name}, {of}",
                      marks=() if i % 2 == 0 else pytest.mark.slow)
         for operation in IMPLEMENTATIONS for name in IMPLEMENTATIONS[operation]
         for i, (of, spec) in enumerate(suite.CASES[operation].small.items())]


@pytest.mark.usefixtures("true_float32")
@pytest.mark.parametrize(("operation", "name", "spec"), EVERY)
def test_values_and_gradients_or_a_reason(operation, name, spec):
  if not suite.check_refusal(operation, name, spec):
    suite.check_numbers(operation, name, spec)
    suite.check_poison(operation, name, spec)
