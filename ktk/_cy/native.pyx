# cython: language_level=3, boundscheck=False, wraparound=False, embedsignature=True
"""Thin wrapper over the C kernels: takes checked buffers, drops the GIL, maps codes to exceptions.
No arithmetic.

One extension, because the pool and the table of kernels are one per process; its parts lie in
``bind/``, C's declarations in ``native.pxd``.
"""

import weakref

import numpy as np

from ktk.errors import AwaitedInVain, BackendError

include "bind/arguments.pxi"
include "bind/probe.pxi"
include "bind/pool.pxi"
include "bind/blocks.pxi"
include "bind/experts.pxi"
include "bind/prepared.pxi"
include "bind/arrivals.pxi"
include "bind/decoder.pxi"
include "bind/pack.pxi"
