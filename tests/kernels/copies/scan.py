"""A copy of scan/xla.py."""

from kernels.copies import copy_of
from pallas_kernels.scan import xla

IMPLEMENTATION = copy_of(xla.IMPLEMENTATION)
