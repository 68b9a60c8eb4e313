# cython: language_level=3, boundscheck=False, wraparound=False, embedsignature=True
"""Thin wrapper over the C kernels: takes checked buffers, drops the GIL, maps codes to exceptions. No arithmetic."""

import os
import weakref

import numpy as np

from cpython.buffer cimport PyBUF_STRIDED_RO, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc


cdef extern from "ktk_probe.h" nogil:
    uint64_t ktk_probe_features()
    const char *ktk_probe_feature_name(int index)
    int ktk_probe_num_features()


cdef extern from "ktk.h" nogil:
    ctypedef struct ktk_matrix:
        int32_t format
        int32_t padded_in
        int32_t num_panels
        int32_t group_size
        int32_t activation_group
        int32_t scales_are_bf16
        int64_t code_offset
        int64_t panel_bytes

    ctypedef struct ktk_activation:
        int32_t kind
        int32_t has_gate
        float alpha
        float gate_min
        float gate_max
        float up_min
        float up_max
        float up_offset

    enum: KTK_MAX_PARTS

    ctypedef struct ktk_part:
        const uint8_t *data
        int64_t expert_bytes
        int64_t down_offset
        int64_t gate_bias_offset
        int64_t up_bias_offset
        int64_t down_bias_offset
        int32_t first_up_panel
        int32_t num_up_panels
        int32_t first_down_panel
        int32_t num_down_panels

    ctypedef struct ktk_layer:
        int32_t num_experts
        int32_t hidden_size
        int32_t intermediate_size
        ktk_matrix gate_up
        ktk_matrix down
        ktk_activation activation
        int32_t num_parts
        ktk_part *parts

    ctypedef int (*pack_panel_fn)(const ktk_matrix *, int, const void *const *, int, const float *, int, int, float *,
                                  uint8_t *) noexcept nogil

    ctypedef struct ktk_kernels:
        const char *name
        pack_panel_fn pack_panel

    const ktk_kernels *ktk_kernels_row(int index)

    ctypedef struct ktk_pool:
        pass
    ktk_pool *ktk_pool_new(int num_threads, int num_parts, const void *cores, int may_borrow)
    void ktk_pool_free(ktk_pool *pool)
    void ktk_pool_borrow(void *gomp_parallel)
    void ktk_pool_own_threads_only()
    unsigned ktk_float_mode_enter()
    void ktk_float_mode_leave(unsigned callers)
    int ktk_moe_forward(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool, int64_t num_tokens,
                        int top_k, int dtype, const void *hidden, const int64_t *ids, const float *weights,
                        const uint8_t *skip, const float *add, void *out)
    int ktk_moe_linear(const ktk_layer *layer, const ktk_kernels *kernels, ktk_pool *pool, int is_down,
                       int64_t num_rows, const float *x, const int64_t *ids, float *y)


# Order of the C enums.
_FORMATS = {"int4": 0, "int8": 1, "bf16": 2, "fp32": 3}
_ACTIVATIONS = {"sigmoid_glu": 0, "gelu_tanh": 1, "relu2": 2}
_DTYPES = {"f": 0, "e": 1, "H": 2}  # by NumPy's dtype.char; bf16 comes as uint16


cdef const ktk_kernels *_kernels(str isa) except NULL:
    cdef int i = 0
    while ktk_kernels_row(i) != NULL:
        if ktk_kernels_row(i).name.decode() == isa:
            return ktk_kernels_row(i)
        i += 1
    raise ValueError(f"isa={isa!r}: this build has {', '.join(isa_rows())}")


def isa_rows():
    """Names of the ISA rows this build holds, slowest first, tuple of str."""
    cdef int i = 0
    names = []
    while ktk_kernels_row(i) != NULL:
        names.append(ktk_kernels_row(i).name.decode())
        i += 1
    return tuple(names)


def probe_features():
    """CPU features that this CPU and OS support, list of str; see ktk_probe.h."""
    cdef uint64_t found = ktk_probe_features()
    return [ktk_probe_feature_name(i).decode() for i in range(ktk_probe_num_features()) if found >> i & 1]


cdef extern from "sched.h" nogil:
    ctypedef struct cpu_set_t:
        pass
    void CPU_ZERO(cpu_set_t *cpus)
    void CPU_SET(int cpu, cpu_set_t *cpus)
    int CPU_SETSIZE


cdef class _Pool:
    """A C thread pool; shared by every Experts of the same engine layout."""

    cdef ktk_pool *pool
    cdef object pid
    cdef object __weakref__

    def __cinit__(self, int num_threads, int num_parts, cores, bint may_borrow):
        cdef cpu_set_t *masks = NULL
        cdef int i
        self.pid = os.getpid()
        if num_threads < num_parts or (cores and len(cores) != num_threads):
            raise ValueError(
                f"num_threads={num_threads}, {num_parts} parts, {len(cores)} cores: each part needs a thread, each "
                "thread a core (or none has one)"
            )
        if cores and max(max(cpus) for cpus in cores) < CPU_SETSIZE:
            masks = <cpu_set_t *>malloc(<size_t>num_threads * sizeof(cpu_set_t))
            if masks == NULL:
                raise MemoryError("no memory for CPU masks")
            for i in range(num_threads):
                CPU_ZERO(&masks[i])
                for cpu in cores[i]:
                    CPU_SET(cpu, &masks[i])
        self.pool = ktk_pool_new(num_threads, num_parts, masks, may_borrow)
        free(masks)
        if self.pool == NULL:
            raise MemoryError(f"cannot start {num_threads} threads")

    def __dealloc__(self):
        # After a fork the threads exist in the parent only: nothing to join, the memory is left alone.
        if self.pool != NULL and self.pid == os.getpid():
            ktk_pool_free(self.pool)


def borrow_threads(address):
    """Run on the threads of the OpenMP runtime whose GOMP_parallel stands at ``address``, int; 0 = own threads again."""
    cdef uintptr_t at = address
    ktk_pool_borrow(<void *>at)


def own_threads_only():
    """What the calling Python thread runs uses ktk's own threads, whatever is borrowed."""
    ktk_pool_own_threads_only()


_pools = weakref.WeakValueDictionary()


def _pool_of(engine):
    # Borrowed threads stay where torch has them: not for weights bound to a node.
    key = (os.getpid(), engine.num_threads, engine.threadpool_count, engine.cores, not engine.is_bound)
    # Several threads may come here first.
    return _pools.get(key) or _pools.setdefault(key, _Pool(*key[1:]))


cdef void _fill_matrix(ktk_matrix *m, layout, str weight_format):
    m.format = _FORMATS[weight_format]
    m.padded_in = layout.padded_in
    m.num_panels = layout.num_panels
    m.group_size = layout.group_size
    m.activation_group = layout.activation_group
    m.scales_are_bf16 = layout.scales_are_bf16
    m.code_offset = layout.scale_bytes
    m.panel_bytes = layout.panel_bytes


cdef void *_address(array) except? NULL:
    """Where a contiguous array's data begins (its __array_interface__ takes a microsecond to build)."""
    cdef Py_buffer view
    PyObject_GetBuffer(array, &view, PyBUF_STRIDED_RO)
    cdef void *at = view.buf
    PyBuffer_Release(&view)
    return at


cdef class Experts:
    """One layer's packed experts with the kernels of one ISA row. The caller has checked shapes and dtypes."""

    cdef ktk_layer layer
    cdef const ktk_kernels *kernels
    cdef _Pool pool
    cdef object engine
    cdef object parts
    cdef int pid

    def __init__(self, spec, layout, parts, str isa, engine):
        """parts : list of ktk.backends._parts.Part, at most KTK_MAX_PARTS. engine : ktk.types.EngineLayout."""
        self.kernels = _kernels(isa)
        self.parts = parts
        self.engine = engine
        self.pool = _pool_of(engine)
        self.pid = os.getpid()
        cdef ktk_layer *layer = &self.layer
        layer.num_experts = spec.num_experts
        layer.hidden_size = spec.hidden_size
        layer.intermediate_size = spec.intermediate_size
        _fill_matrix(&layer.gate_up, layout.gate_up, spec.weight_format)
        _fill_matrix(&layer.down, layout.down, spec.weight_format)
        act = spec.activation
        layer.activation.kind = _ACTIVATIONS[act.kind]
        layer.activation.has_gate = spec.has_gate
        layer.activation.alpha = act.alpha
        layer.activation.gate_min = act.gate_min
        layer.activation.gate_max = act.gate_max
        layer.activation.up_min = act.up_min
        layer.activation.up_max = act.up_max
        layer.activation.up_offset = act.up_offset
        cdef ktk_part *part
        assert len(parts) <= KTK_MAX_PARTS
        layer.num_parts = len(parts)
        for i, given in enumerate(parts):
            part = &layer.parts[i]
            part.data = <const uint8_t *>_address(given.data)
            part.expert_bytes = given.data.shape[1]
            part.down_offset = given.down_offset
            part.gate_bias_offset = given.gate_bias_offset
            part.up_bias_offset = given.up_bias_offset
            part.down_bias_offset = given.down_bias_offset
            part.first_up_panel = given.first_up_panel
            part.num_up_panels = given.num_up_panels
            part.first_down_panel = given.first_down_panel
            part.num_down_panels = given.num_down_panels

    cdef _Pool _pool(self):
        """The pool, a new one after a fork. Callers keep the reference while they run."""
        if self.pid != os.getpid():
            self.pool = _pool_of(self.engine)
            self.pid = os.getpid()
        return self.pool

    def forward(self, hidden, topk_ids, topk_weights, skip, out, add):
        """See ktk.backends.base.Runner.forward."""
        cdef _Pool pool = self._pool()
        cdef int64_t num_tokens = topk_ids.shape[0]
        cdef int top_k = topk_ids.shape[1]
        cdef int dtype = _DTYPES[hidden.dtype.char]
        cdef const void *x = <const void *>_address(hidden)
        cdef const int64_t *ids = <const int64_t *>_address(topk_ids)
        cdef const float *weights = <const float *>_address(topk_weights)
        cdef const uint8_t *mask = NULL
        cdef const float *partial = NULL
        if skip is not None:
            mask = <const uint8_t *>_address(skip)
        if add is not None:
            partial = <const float *>_address(add)
        cdef void *y = <void *>_address(out)
        cdef int status
        with nogil:
            status = ktk_moe_forward(&self.layer, self.kernels, pool.pool, num_tokens, top_k, dtype, x, ids,
                                     weights, mask, partial, y)
        if status:
            raise MemoryError(f"no scratch memory for {num_tokens} tokens x top_k {top_k}: pass fewer tokens a call")

    def linear(self, str projection, x, expert_ids):
        """See ktk.backends.base.Runner.linear."""
        cdef _Pool pool = self._pool()
        cdef int is_down = projection == "down"
        cdef int64_t num_rows = x.shape[0]
        cdef int64_t width = self.layer.hidden_size
        if not is_down:
            width = self.layer.intermediate_size * (2 if self.layer.activation.has_gate else 1)
        result = np.empty((num_rows, width), np.float32)
        cdef const float *rows = <const float *>_address(x)
        cdef const int64_t *ids = <const int64_t *>_address(expert_ids)
        cdef float *y = <float *>_address(result)
        cdef int status
        with nogil:
            status = ktk_moe_linear(&self.layer, self.kernels, pool.pool, is_down, num_rows, rows, ids, y)
        if status:
            raise MemoryError(f"no scratch memory for {num_rows} rows: pass fewer rows a call")
        return result


def pack_matrix(w, layout, str weight_format, str isa, ladder, int refits, panels):
    """Quantise float32 or bf16-bit rows (out, in) into panels, uint8 (num_panels, panel_bytes) with any row stride.

    ValueError if a weight is NaN or inf.
    """
    cdef ktk_matrix m
    _fill_matrix(&m, layout, weight_format)
    cdef const ktk_kernels *kernels = _kernels(isa)
    w = np.ascontiguousarray(w)
    cdef int is_bf16 = w.dtype == np.uint16
    cdef int64_t num_rows = w.shape[0], row_bytes = w.strides[0]
    cdef int in_features = w.shape[1]
    cdef const uint8_t *first = <const uint8_t *>_address(w)
    cdef uint8_t *panel = <uint8_t *>_address(panels)
    cdef int64_t panel_stride = panels.strides[0]
    cdef const float *steps = <const float *>_address(ladder)
    cdef int num_steps = ladder.shape[0]
    cdef const void *rows[16]
    cdef int64_t p, n, row
    cdef int status = 0
    cdef float *work = <float *>malloc(<size_t>m.padded_in * 16 * 4 * 2)
    if work == NULL:
        raise MemoryError("no memory to quantise a panel")
    cdef unsigned callers
    with nogil:
        callers = ktk_float_mode_enter()
        for p in range(m.num_panels):
            for n in range(16):
                row = p * 16 + n
                rows[n] = <const void *>(first + row * row_bytes) if row < num_rows else NULL
            status = kernels.pack_panel(&m, in_features, rows, is_bf16, steps, num_steps, refits, work,
                                        panel + p * panel_stride)
            if status:
                break
        ktk_float_mode_leave(callers)
        free(work)
    if status:
        raise ValueError("weights hold NaN or inf: mend the checkpoint")
