"""A copy of decode/xla.py."""

from kernels.copies import copy_of
from pallas_kernels.decode import xla

IMPLEMENTATION = copy_of(xla.IMPLEMENTATION)
