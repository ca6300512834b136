"""A copy of sparse/xla.py."""

from kernels.copies import copy_of
from pallas_kernels.sparse import xla

IMPLEMENTATION = copy_of(xla.IMPLEMENTATION)
