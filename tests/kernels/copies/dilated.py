"""A copy of dilated/xla.py."""

from kernels.copies import copy_of
from pallas_kernels.dilated import xla

IMPLEMENTATION = copy_of(xla.IMPLEMENTATION)
