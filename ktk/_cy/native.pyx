# cython: language_level=3, boundscheck=False, wraparound=False, embedsignature=True
"""Thin wrapper over the C kernels: takes checked buffers, drops the GIL, maps codes to exceptions. No arithmetic."""

import os
import weakref

import numpy as np

from cpython.buffer cimport PyBUF_STRIDED_RO, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc


cdef extern from "ktk_probe.h" nogil:
    uint64_t ktk_probe_features(int asks_for_tiles, int *refused)
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
        int64_t work_bytes

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
        const uint8_t **gate_up
        const uint8_t **up
        const uint8_t **down
        const float **gate_bias
        const float **up_bias
        const float **down_bias
        int32_t first_up_panel
        int32_t num_up_panels
        int32_t first_down_panel
        int32_t num_down_panels

    ctypedef struct ktk_layer:
        int32_t num_experts
        int32_t hidden_size
        int32_t intermediate_size
        ktk_matrix gate_up
        ktk_matrix up
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
    void ktk_use_packed(ktk_matrix *m, const ktk_kernels *kernels)
    void ktk_use_blocks(ktk_matrix *m, int format, int isa, int in_features, int num_panels, int activation_group,
                        int is_repacked)

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
    int ktk_linear_forward(const ktk_matrix *w, const uint8_t *panels, const float *bias, int in_features,
                           int out_features, const ktk_kernels *kernels, ktk_pool *pool, int64_t num_rows,
                           int dtype, const void *x, void *y)


cdef extern from "ktk_decoder.h" nogil:
    ctypedef struct ktk_dense:
        ktk_matrix w
        const uint8_t *panels
        const float *bias
        int32_t in_features
        int32_t out_features

    ctypedef struct ktk_router:
        int32_t num_experts
        int32_t top_k
        int32_t score
        int32_t num_groups
        int32_t top_groups
        int32_t best_of_group
        int32_t is_normalised
        float scale
        const float *correction

    ctypedef struct ktk_mlp:
        ktk_dense gate
        ktk_dense up
        ktk_dense down
        ktk_activation activation
        const float *scale

    ctypedef struct ktk_decoder_layer:
        int32_t hidden_size
        int32_t num_heads
        int32_t num_kv_heads
        int32_t head_dim
        int32_t rotary_dim
        int32_t is_interleaved
        int32_t norm_is_whole
        float epsilon
        float head_epsilon
        float scaling
        const float *input_norm
        const float *output_norm
        const float *q_norm
        const float *k_norm
        const float *sinks
        ktk_dense q
        ktk_dense k
        ktk_dense v
        ktk_dense o
        ktk_layer *experts
        ktk_dense logits
        ktk_router router
        ktk_mlp *mlp

    ctypedef struct ktk_kv_rows:
        void *keys
        void *values
        int64_t keys_head_stride
        int64_t values_head_stride
        int64_t num_cached

    void ktk_route(const ktk_router *router, const float *logits, float *scores, int64_t *ids,
                   float *weights)
    int ktk_decoder_layer_forward(const ktk_decoder_layer *layer, const ktk_kernels *kernels, ktk_pool *pool,
                                  int dtype, const void *hidden, const float *cos, const float *sin,
                                  const ktk_kv_rows *kv, void *out)


cdef extern from "llamafile.h" nogil:
    ctypedef struct lf_format:
        const char *name
        int32_t ggml_type
        int32_t block_weights
        int32_t block_bytes
        int32_t fine
        int32_t is_float

    const lf_format *lf_formats
    int32_t lf_num_formats

    ctypedef struct lf_matrix:
        int32_t format
        int32_t is_repacked
        int32_t in_features
        int32_t activation_group

    ctypedef struct lf_kernels:
        const char *name
        void (*repack)(const lf_matrix *w, const uint8_t *panel, uint8_t *out) noexcept nogil
        void (*unpack)(const lf_matrix *w, const uint8_t *panel, float *codes, float *scales, float *minima,
                       uint8_t *work) noexcept nogil

    const lf_kernels *lf_kernels_row(int index)
    int64_t lf_panel_bytes(const lf_matrix *w)
    int64_t lf_work_bytes(const lf_matrix *w, int num_rows)


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


def probe_features(asks_for_tiles=True):
    """(CPU features that this CPU and OS support, list of str; errno of refused tiles, or 0); see ktk_probe.h."""
    cdef int refused
    cdef uint64_t found = ktk_probe_features(bool(asks_for_tiles), &refused)
    names = [ktk_probe_feature_name(i).decode() for i in range(ktk_probe_num_features()) if found >> i & 1]
    return names, refused


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


cdef void _fill_activation(ktk_activation *a, act, bint has_gate) except *:
    a.kind = _ACTIVATIONS[act.kind]
    a.has_gate = has_gate
    a.alpha = act.alpha
    a.gate_min = act.gate_min
    a.gate_max = act.gate_max
    a.up_min = act.up_min
    a.up_max = act.up_max
    a.up_offset = act.up_offset


cdef void *_address(array) except? NULL:
    """Where a contiguous array's data begins (its __array_interface__ takes a microsecond to build)."""
    cdef Py_buffer view
    PyObject_GetBuffer(array, &view, PyBUF_STRIDED_RO)
    cdef void *at = view.buf
    PyBuffer_Release(&view)
    return at


cdef class _OnPool:
    """What runs on the pool of an engine layout with the kernels of one ISA row."""

    cdef const ktk_kernels *kernels
    cdef _Pool pool
    cdef object engine
    cdef int pid

    cdef void _take_pool(self, str isa, engine) except *:
        self.kernels = _kernels(isa)
        self.engine = engine
        self.pool = _pool_of(engine)
        self.pid = os.getpid()

    cdef _Pool _pool(self):
        """The pool, a new one after a fork. Callers keep the reference while they run."""
        if self.pid != os.getpid():
            self.pool = _pool_of(self.engine)
            self.pid = os.getpid()
        return self.pool


cdef class Experts(_OnPool):
    """One layer's experts with the kernels of one ISA row. The caller has checked shapes and dtypes."""

    cdef ktk_layer layer
    cdef object parts
    cdef const void **tables  # every part's pointers, one behind the other
    cdef int64_t num_tables

    def __dealloc__(self):
        free(self.tables)

    cdef void _begin(self, spec, str isa, engine, parts) except *:
        self._take_pool(isa, engine)
        self.parts = parts
        cdef ktk_layer *layer = &self.layer
        layer.num_experts = spec.num_experts
        layer.hidden_size = spec.hidden_size
        layer.intermediate_size = spec.intermediate_size
        _fill_activation(&layer.activation, spec.activation, spec.has_gate)
        assert len(parts) <= KTK_MAX_PARTS
        layer.num_parts = len(parts)
        # Six tables a part at most.
        self.tables = <const void **>malloc(<size_t>(6 * len(parts) * spec.num_experts) * sizeof(void *))
        if self.tables == NULL:
            raise MemoryError("no memory for the experts' addresses")
        cdef ktk_part *part
        for i, given in enumerate(parts):
            part = &layer.parts[i]
            part.first_up_panel = given.first_up_panel
            part.num_up_panels = given.num_up_panels
            part.first_down_panel = given.first_down_panel
            part.num_down_panels = given.num_down_panels

    cdef const void **_table(self, array, int64_t offset, order=None) except? NULL:
        """Addresses of each expert's bytes, `offset` bytes into array[expert]; NULL without an array.

        order : int64 (num_experts,): expert e stands at array[order[e]].
        """
        cdef int64_t e, n = self.layer.num_experts
        if array is None or offset < 0:
            return NULL
        cdef const uint8_t *first = <const uint8_t *>_address(array) + offset
        cdef int64_t stride = array.strides[0]
        cdef const void **table = self.tables + self.num_tables * n
        cdef const int64_t[::1] places
        self.num_tables += 1
        if order is None:
            for e in range(n):
                table[e] = first + e * stride
        else:
            places = order
            for e in range(n):
                table[e] = first + places[e] * stride
        return table

    @staticmethod
    def of_panels(spec, layout, parts, str isa, engine):
        """Packed experts. parts : list of ktk.placement.parts.Part. engine : ktk.machine.threads.EngineLayout."""
        cdef Experts self = Experts()
        self._begin(spec, isa, engine, parts)
        _fill_matrix(&self.layer.gate_up, layout.gate_up, spec.weight_format)
        _fill_matrix(&self.layer.down, layout.down, spec.weight_format)
        ktk_use_packed(&self.layer.gate_up, self.kernels)
        ktk_use_packed(&self.layer.down, self.kernels)
        cdef ktk_part *part
        for i, given in enumerate(parts):
            part = &self.layer.parts[i]
            part.gate_up = <const uint8_t **>self._table(given.data, 0)
            part.up = NULL
            part.down = <const uint8_t **>self._table(given.data, given.down_offset)
            part.gate_bias = <const float **>self._table(given.data, given.gate_bias_offset)
            part.up_bias = <const float **>self._table(given.data, given.up_bias_offset)
            part.down_bias = <const float **>self._table(given.data, given.down_bias_offset)
        return self

    @staticmethod
    def of_blocks(spec, matrices, parts, str isa, str blocks_isa, engine):
        """Experts in GGUF blocks.

        matrices : {"gate", "up", "down": (index of the format, in_features, panels, is_repacked)}, no gate without one.
        parts : list of ktk.backends.llamafile.Part.
        """
        cdef Experts self = Experts()
        self._begin(spec, isa, engine, parts)
        cdef int row = _blocks_isa(blocks_isa), group = spec.activation_group
        cdef bint has_gate = "gate" in matrices
        cdef ktk_matrix *m
        for name, given in matrices.items():
            m = &self.layer.down if name == "down" else &self.layer.gate_up
            if name == "up" and has_gate:
                m = &self.layer.up
            ktk_use_blocks(m, given[0], row, given[1], given[2], group, given[3])
        cdef ktk_part *part
        for i, part_given in enumerate(parts):
            part = &self.layer.parts[i]
            order = part_given.order
            up = <const uint8_t **>self._table(part_given.up, 0, order)
            part.gate_up = <const uint8_t **>self._table(part_given.gate, 0, order) if has_gate else up
            part.up = up if has_gate else NULL
            part.down = <const uint8_t **>self._table(part_given.down, 0, order)
            part.gate_bias = <const float **>self._table(part_given.gate_bias, 0, order)
            part.up_bias = <const float **>self._table(part_given.up_bias, 0, order)
            part.down_bias = <const float **>self._table(part_given.down_bias, 0, order)
        return self

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


cdef class Matrix(_OnPool):
    """One dense matrix with the kernels of one ISA row. The caller has checked shapes and dtypes."""

    cdef ktk_matrix matrix
    cdef object panels, bias
    cdef int in_features, out_features

    cdef void _begin(self, panels, bias, int in_features, int out_features, str isa, engine) except *:
        self._take_pool(isa, engine)
        self.panels, self.bias = panels, bias
        self.in_features, self.out_features = in_features, out_features

    @staticmethod
    def of_panels(layout, str weight_format, panels, bias, str isa, engine):
        """layout : MatrixLayout. panels : uint8 (num_panels, panel_bytes), contiguous. bias : float32 (16 * num_panels,) or None."""
        cdef Matrix self = Matrix()
        self._begin(panels, bias, layout.in_features, layout.out_features, isa, engine)
        _fill_matrix(&self.matrix, layout, weight_format)
        ktk_use_packed(&self.matrix, self.kernels)
        return self

    @staticmethod
    def of_blocks(given, rows, bias, int in_features, int out_features, int activation_group, str isa,
                  str blocks_isa, engine):
        """A matrix in GGUF blocks. given : as a matrix of Experts.of_blocks. rows : uint8 (16 * panels, row bytes), contiguous.
        bias : float32 (16 * panels,) or None."""
        cdef Matrix self = Matrix()
        self._begin(rows, bias, in_features, out_features, isa, engine)
        ktk_use_blocks(&self.matrix, given[0], _blocks_isa(blocks_isa), given[1], given[2], activation_group, given[3])
        return self

    def forward(self, x, out):
        """out = x W^T + bias. x, out : C-contiguous (rows, features), both float32, float16 or bf16 bits as uint16."""
        cdef _Pool pool = self._pool()
        cdef int64_t num_rows = x.shape[0]
        cdef int dtype = _DTYPES[x.dtype.char]
        cdef const void *rows = <const void *>_address(x)
        cdef const uint8_t *panels = <const uint8_t *>_address(self.panels)
        cdef const float *bias = NULL
        if self.bias is not None:
            bias = <const float *>_address(self.bias)
        cdef void *y = <void *>_address(out)
        cdef int status
        with nogil:
            status = ktk_linear_forward(&self.matrix, panels, bias, self.in_features, self.out_features, self.kernels,
                                        pool.pool, num_rows, dtype, rows, y)
        if status:
            raise MemoryError(f"no scratch memory for {num_rows} rows: pass fewer rows a call")


_SCORES = {"softmax": 0, "sigmoid": 1}


cdef const float *_floats(array) except? NULL:
    if array is None:
        return NULL
    return <const float *>_address(array)


cdef void _fill_router(ktk_router *r, router) except *:
    """router : ktk.ops.router.Router; it must outlive r."""
    r.num_experts = router.num_experts
    r.top_k = router.top_k
    r.score = _SCORES[router.score]
    r.num_groups = router.num_groups
    r.top_groups = router.top_groups
    r.best_of_group = router.best_of_group
    r.is_normalised = router.is_normalised
    r.scale = router.scale
    r.correction = _floats(router.correction)


def route(router, logits):
    """ktk.ops.router.Router over float32 (tokens, num_experts): int64 ids and float32 weights, (tokens, top_k)."""
    cdef ktk_router r
    _fill_router(&r, router)
    cdef int64_t i, num_tokens = logits.shape[0]
    ids = np.empty((num_tokens, router.top_k), np.int64)
    weights = np.empty((num_tokens, router.top_k), np.float32)
    scores = np.empty(2 * router.num_experts, np.float32)
    cdef const float *x = <const float *>_address(logits)
    cdef float *work = <float *>_address(scores)
    cdef int64_t *chosen = <int64_t *>_address(ids)
    cdef float *scale = <float *>_address(weights)
    for i in range(num_tokens):
        ktk_route(&r, x + i * r.num_experts, work, chosen + i * r.top_k, scale + i * r.top_k)
    return ids, weights


cdef void _fill_dense(ktk_dense *dense, linear) except *:
    """linear : ktk.ops.linear.Linear or None; it must outlive dense."""
    dense.panels = NULL
    if linear is None:
        return
    cdef Matrix matrix = linear.matrix
    dense.w = matrix.matrix
    dense.panels = <const uint8_t *>_address(matrix.panels)
    dense.bias = _floats(matrix.bias)
    dense.in_features = matrix.in_features
    dense.out_features = matrix.out_features


cdef class DecoderLayer(_OnPool):
    """One new token through a decoder layer, in one call. The caller has checked that shapes fit."""

    cdef ktk_decoder_layer layer
    cdef ktk_mlp mlp
    cdef object spec
    cdef Experts experts

    def __init__(self, spec, str isa, engine):
        """spec : ktk.ops.decoder.DecoderSpec. engine : ktk.machine.threads.EngineLayout."""
        self._take_pool(isa, engine)
        self.spec = spec
        cdef ktk_decoder_layer *layer = &self.layer
        layer.hidden_size = spec.hidden_size
        layer.num_heads = spec.num_heads
        layer.num_kv_heads = spec.num_kv_heads
        layer.head_dim = spec.head_dim
        layer.rotary_dim = spec.rotary_dim
        layer.is_interleaved = spec.is_interleaved
        layer.norm_is_whole = spec.norm_is_whole
        layer.epsilon = spec.epsilon
        layer.head_epsilon = spec.head_epsilon
        layer.scaling = spec.scaling
        layer.input_norm = _floats(spec.input_norm)
        layer.output_norm = _floats(spec.output_norm)
        layer.q_norm = _floats(spec.q_norm)
        layer.k_norm = _floats(spec.k_norm)
        layer.sinks = _floats(spec.sinks)
        _fill_dense(&layer.q, spec.q)
        _fill_dense(&layer.k, spec.k)
        _fill_dense(&layer.v, spec.v)
        _fill_dense(&layer.o, spec.o)
        _fill_dense(&layer.logits, spec.logits)
        layer.experts = NULL
        if spec.experts is not None:
            self.experts = spec.experts.runner.experts
            layer.experts = &self.experts.layer
            _fill_router(&layer.router, spec.router)
        layer.mlp = NULL
        if spec.mlp is not None:
            layer.mlp = &self.mlp
            _fill_dense(&self.mlp.gate, spec.mlp.gate)
            _fill_dense(&self.mlp.up, spec.mlp.up)
            _fill_dense(&self.mlp.down, spec.mlp.down)
            _fill_activation(&self.mlp.activation, spec.mlp.activation, True)
            self.mlp.scale = _floats(spec.mlp.scale)

    def forward(self, str dtype, uintptr_t hidden, uintptr_t cosines, uintptr_t sines, uintptr_t keys,
                int64_t keys_head_stride, uintptr_t values, int64_t values_head_stride, int64_t num_cached,
                uintptr_t out):
        """See ktk_decoder.h. dtype : "f", "e" or "H" (bf16). The rest: addresses, strides in elements."""
        cdef _Pool pool = self._pool()
        cdef int kind = _DTYPES[dtype]
        cdef ktk_kv_rows kv
        kv.keys = <void *>keys
        kv.values = <void *>values
        kv.keys_head_stride = keys_head_stride
        kv.values_head_stride = values_head_stride
        kv.num_cached = num_cached
        cdef int status
        with nogil:
            status = ktk_decoder_layer_forward(&self.layer, self.kernels, pool.pool, kind, <const void *>hidden,
                                               <const float *>cosines, <const float *>sines, &kv, <void *>out)
        if status:
            raise MemoryError(f"no memory for a token with {num_cached} cached ones")


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


def blocks_isa_rows():
    """Names of the ISAs that the kernels over GGUF blocks are compiled for, slowest first, tuple of str."""
    cdef int i = 0
    names = []
    while lf_kernels_row(i) != NULL:
        names.append(lf_kernels_row(i).name.decode())
        i += 1
    return tuple(names)


def block_formats():
    """{ggml type's name: (index, weights of a block, bytes of a block, weights that share a scale or 0: floats)}."""
    cdef const lf_format *f
    found = {}
    for i in range(lf_num_formats):
        f = &lf_formats[i]
        found[f.name.decode()] = (i, f.block_weights, f.block_bytes, f.fine)
    return found


cdef int _blocks_isa(str isa) except -1:
    names = blocks_isa_rows()
    if isa not in names:
        raise ValueError(f"isa={isa!r}: this build has {', '.join(names)}")
    return names.index(isa)


def repack_blocks(rows, int format, int in_features, str isa, out):
    """One expert's rows, uint8 (out_features, row bytes), out_features a multiple of 16, to the same bytes in the order
    the kernels read. out : uint8 of as many bytes, 64-byte aligned."""
    cdef const lf_kernels *kernels = lf_kernels_row(_blocks_isa(isa))
    cdef lf_matrix w
    w.format, w.is_repacked, w.in_features, w.activation_group = format, 0, in_features, 32
    cdef int64_t p, num_panels = rows.shape[0] // 16, panel_bytes = lf_panel_bytes(&w)
    cdef const uint8_t *first = <const uint8_t *>_address(rows)
    cdef uint8_t *to = <uint8_t *>_address(out)
    with nogil:
        for p in range(num_panels):
            kernels.repack(&w, first + p * panel_bytes, to + p * panel_bytes)


def unpack_blocks(rows, int format, int in_features, str isa, bint is_repacked):
    """What 16 rows, uint8 (16, row bytes), hold: float32 codes (in_features, 16), scales and minima (groups, 16).

    Value = code * scale + minimum; of float formats codes are the values, and the rest is None.
    """
    cdef const lf_kernels *kernels = lf_kernels_row(_blocks_isa(isa))
    cdef lf_matrix w
    w.format, w.is_repacked, w.in_features, w.activation_group = format, is_repacked, in_features, 32
    cdef int64_t groups = in_features // lf_formats[format].fine if lf_formats[format].fine else 1
    codes = np.zeros((in_features, 16), np.float32)
    scales, minima = np.zeros((groups, 16), np.float32), np.zeros((groups, 16), np.float32)
    work = np.zeros(lf_work_bytes(&w, 1) + 64, np.uint8)
    cdef uint8_t *at = <uint8_t *>_address(work)
    at += -<uintptr_t>at & 63
    kernels.unpack(&w, <const uint8_t *>_address(rows), <float *>_address(codes), <float *>_address(scales),
                   <float *>_address(minima), at)
    return (codes, scales, minima) if lf_formats[format].fine else (codes, None, None)
