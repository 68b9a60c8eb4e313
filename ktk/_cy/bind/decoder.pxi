# Dense matrices, routing, and a decoder layer of them.

_SCORES = {"softmax": KTK_SOFTMAX, "sigmoid": KTK_SIGMOID}


cdef class Matrix(_OnPool):
    """One dense matrix with the kernels of one ISA row. The caller has checked shapes and dtypes."""

    cdef ktk_matrix matrix
    cdef object panels, bias
    cdef int in_features, out_features

    def __init__(self, layout, bint is_repacked, panels, bias, str isa, engine):
        """layout : MatrixLayout, of panels or of blocks. panels : uint8 (num_panels, panel_bytes), or rows of blocks, contiguous.
        bias : float32 (16 * num_panels,) or None."""
        self._take_pool(isa, engine)
        self.panels, self.bias = panels, bias
        self.in_features, self.out_features = layout.in_features, layout.out_features
        _fill_matrix(&self.matrix, layout, is_repacked)
        ktk_use_kernels(&self.matrix, self.kernels)

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
