# Dense matrices, routing, and a decoder layer of them.

_SCORES = {"softmax": KTK_SOFTMAX, "sigmoid": KTK_SIGMOID}


cdef class Matrix(_OnPool):
    """One dense matrix with the kernels of one ISA row.

    The caller has checked shapes and dtypes.
    """

    cdef ktk_dense dense
    cdef object panels, bias

    def __init__(self, layout, bint is_repacked, panels, bias, str isa, engine):
        """layout : MatrixLayout, of panels or of blocks. panels : uint8 (num_panels, panel_bytes),
            or rows of blocks, contiguous.
        bias : float32 (16 * num_panels,) or None.
        """
        self._take_pool(isa, engine)
        self.panels, self.bias = panels, bias  # they outlive dense
        self.dense.panels, self.dense.bias = <const uint8_t *>_address(panels), _floats(bias)
        self.dense.in_features, self.dense.out_features = layout.in_features, layout.out_features
        _fill_matrix(&self.dense.w, layout, is_repacked)
        ktk_use_kernels(&self.dense.w, self.kernels)

    def forward(self, x, out):
        """out = x W^T + bias.

        x, out : C-contiguous (rows, features), both float32, float16 or bf16 bits as uint16.
        """
        cdef _Pool pool = self._pool()
        cdef int64_t num_rows = x.shape[0]
        cdef int dtype = _DTYPES[x.dtype.char]
        cdef const void *rows = <const void *>_address(x)
        cdef void *y = <void *>_address(out)
        cdef int status
        with nogil:
            status = ktk_linear_forward(&self.dense, self.kernels, pool.pool, num_rows, dtype,
                                        rows, y)
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
    """ktk.ops.router.Router over float32 (tokens, num_experts): int64 ids and float32 weights,
    (tokens, top_k).
    """
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


cdef ktk_dense _no_matrix
cdef ktk_norm _no_norm


cdef ktk_dense _dense(linear) except *:
    """linear : ktk.ops.linear.Linear or None; it must outlive the result."""
    return _no_matrix if linear is None else (<Matrix>linear.matrix).dense


cdef ktk_norm _norm(norm) except *:
    """norm : ktk.ops.components.Norm or None; it must outlive the result."""
    cdef ktk_norm n = _no_norm
    if norm is not None:
        n.weight, n.size, n.epsilon = _floats(norm.weight), len(norm.weight), norm.epsilon
    return n


_ROTARY_ORDERS = {"halves": KTK_ROTARY_HALVES, "pairs": KTK_ROTARY_PAIRS,
                  "pairs to halves": KTK_ROTARY_PAIRS_TO_HALVES}


cdef ktk_rotary _rotary(rotary) except *:
    cdef ktk_rotary r
    r.dim, r.order = rotary.dim, _ROTARY_ORDERS[rotary.order]
    return r


cdef class Foresight:
    """The next layer's router beside a layer of experts that come and go, once there is one."""

    cdef ktk_foresight router

    def follow(self, routed):
        """routed : ktk.ops.components.RoutedExperts of the next layer; it must outlive this."""
        self.router.logits = _dense(routed.logits)
        self.router.experts = &(<Experts>routed.experts.runner.experts).layer
        _fill_router(&self.router.router, routed.router)

    def turn(self, bint is_on):
        """Whether layers look ahead."""
        self.router.is_on = is_on


cdef int _bring(void *caller, void *owner, int64_t num_ids, const int64_t *ids,
                const float *weights, int64_t num_foretold,
                const int64_t *foretold) noexcept with gil:
    """The ktk_bring of a visit; what it raises waits in the visit."""
    cdef int64_t i
    visit = <object>caller
    try:
        is_brought = visit.bring(<object>owner, [ids[i] for i in range(num_ids)],
                                 [weights[i] for i in range(num_ids)],
                                 [foretold[i] for i in range(num_foretold)])
        return KTK_DONE if is_brought else KTK_NOT_BROUGHT
    except BaseException as error:
        visit.error = error
        return KTK_NOT_BROUGHT


cdef class DecoderLayer(_OnPool):
    """Rows through a decoder layer, in one call. The caller has checked that shapes fit."""

    cdef ktk_decoder_layer layer
    cdef object spec
    cdef list memory  # of the C structs
    cdef object chosen
    cdef object new_visit

    def __init__(self, spec, str isa, engine, new_visit=None):
        """spec : ktk.ops.decoder.DecoderSpec. engine : ktk.machine.threads.EngineLayout.
        new_visit : () -> ktk.ops.streamed.Visit, of a spec with experts that come and go.
        """
        self._take_pool(isa, engine)
        self.spec, self.memory, self.chosen = spec, [], None
        self.new_visit = new_visit
        cdef size_t size = len(spec.branches) * sizeof(ktk_branch)
        cdef ktk_branch *branches = <ktk_branch *>self._room(size)
        cdef ktk_branch *b = branches
        self.layer.hidden_size, self.layer.num_branches = spec.hidden_size, len(spec.branches)
        self.layer.branches = branches
        for branch in spec.branches:
            b.norm, b.output_norm = _norm(branch.norm), _norm(branch.output_norm)
            b.multiplier, b.num_components = branch.multiplier, len(branch.components)
            for i, component in enumerate(branch.components):
                self._fill(&b.components[<int>i], component)
            b += 1

    cdef void *_room(self, size_t size) except NULL:
        """Zeros as long as this lives."""
        self.memory.append(bytearray(size))
        return _address(self.memory[len(self.memory) - 1])

    cdef void _fill(self, ktk_component *c, component) except *:
        kind = component.kind
        if kind == "attention":
            c.kind, c.part = KTK_ATTENTION, self._attention(component)
        elif kind == "latent_attention":
            c.kind, c.part = KTK_LATENT_ATTENTION, self._latent_attention(component)
        elif kind == "mlp":
            c.kind, c.part = KTK_MLP, self._mlp(component)
        else:
            c.kind, c.part = KTK_ROUTED, self._routed(component)

    cdef const void *_attention(self, a) except NULL:
        cdef ktk_attention *c = <ktk_attention *>self._room(sizeof(ktk_attention))
        c.num_heads, c.num_kv_heads, c.head_dim = a.num_heads, a.num_kv_heads, a.head_dim
        c.window, c.scaling, c.rotary = a.window or 0, a.scaling, _rotary(a.rotary)
        c.q_norm, c.k_norm, c.sinks = _norm(a.q_norm), _norm(a.k_norm), _floats(a.sinks)
        c.q, c.k, c.v, c.o = _dense(a.q), _dense(a.k), _dense(a.v), _dense(a.o)
        return c

    cdef const void *_latent_attention(self, a) except NULL:
        cdef ktk_latent_attention *c
        c = <ktk_latent_attention *>self._room(sizeof(ktk_latent_attention))
        c.num_heads, c.nope_dim = a.num_heads, a.nope_dim
        c.latent_dim, c.value_dim = a.latent_dim, a.value_dim
        c.scaling, c.rotary = a.scaling, _rotary(a.rotary)
        c.q_a, c.q_norm, c.q = _dense(a.q_a), _norm(a.q_norm), _dense(a.q)
        c.latent, c.latent_norm = _dense(a.latent), _norm(a.latent_norm)
        c.absorb, c.expand, c.o = _dense(a.absorb), _dense(a.expand), _dense(a.o)
        return c

    cdef const void *_mlp(self, m) except NULL:
        cdef ktk_mlp *c = <ktk_mlp *>self._room(sizeof(ktk_mlp))
        c.gate, c.up, c.down = _dense(m.gate), _dense(m.up), _dense(m.down)
        c.scale = _floats(m.scale)
        _fill_activation(&c.activation, m.activation, True)
        return c

    cdef const void *_routed(self, r) except NULL:
        cdef ktk_routed *c = <ktk_routed *>self._room(sizeof(ktk_routed))
        c.logits, c.experts = _dense(r.logits), &(<Experts>r.experts.runner.experts).layer
        _fill_router(&c.router, r.router)
        # The spec keeps adapters and the owner alive.
        if r.lora is not None:
            c.lora = _fill_lora(<ktk_lora *>self._room(sizeof(ktk_lora)), r.lora)
        c.owner = <void *>r.experts if r.experts.is_streamed else NULL
        if r.experts.is_streamed:
            c.foresight = &(<Foresight>r.experts.foresight.native).router
            if r.experts.slots.arrivals is not None:
                c.arrivals = (<Arrivals>r.experts.slots.arrivals).of
                c.number = r.experts.layer
        return c

    def forward(self, str dtype, int num_rows, uintptr_t hidden, uintptr_t cosines,
                uintptr_t sines, pages, sequence,
                position, uintptr_t out, chosen=None):
        """See ktk_decoder.h. dtype : "f", "e" or "H" (bf16). pages : for each sequence (address of
        the keys' table, head and row stride, of the values' likewise, page_tokens, their dtype: as
        above, or "b"). sequence, position : num_rows of each. chosen : int64 (num_rows, top_k),
        where the rows' experts are left, or None. The rest: addresses.
        """
        cdef ktk_decoder_rows rows
        cdef int i
        of_sequences = bytearray(len(pages) * sizeof(ktk_sequence))
        of_indices = bytearray(num_rows * sizeof(int32_t))
        of_places = bytearray(num_rows * sizeof(int64_t))
        cdef ktk_sequence *sequences = <ktk_sequence *>_address(of_sequences)
        cdef int32_t *index = <int32_t *>_address(of_indices)
        cdef int64_t *place = <int64_t *>_address(of_places)
        for i in range(<int>len(pages)):
            _fill_sequence(&sequences[i], pages[i])
        for i in range(num_rows):
            index[i], place[i] = sequence[i], position[i]
        rows.num_rows, rows.sequences = num_rows, sequences
        rows.sequence, rows.position = index, place
        rows.cosines, rows.sines = <const float *>cosines, <const float *>sines
        rows.chosen = NULL if chosen is None else <int64_t *>_address(chosen)
        self._run(_DTYPES[dtype], <const void *>hidden, &rows, <void *>out)

    def leave_chosen(self, chosen):
        """From now on forward_row writes the experts of its row to chosen, int64 (top_k,),
        contiguous; None: no more.
        """
        self.chosen = chosen

    def forward_row(self, str dtype, uintptr_t hidden, uintptr_t cosines, uintptr_t sines,
                    uintptr_t keys, int64_t key_head, int64_t key_row,
                    uintptr_t values, int64_t value_head, int64_t value_row,
                    int64_t position, uintptr_t out):
        """One row of a sequence whose keys and values lie in one page each, which holds position:
        their addresses, head and row strides. Nothing of Python's is made: this runs for each
        layer of each token.
        """
        cdef void *page_of_keys = <void *>keys
        cdef void *page_of_values = <void *>values
        cdef int32_t index = 0
        cdef ktk_sequence sequence
        cdef ktk_decoder_rows rows
        sequence.keys.pages, sequence.values.pages = &page_of_keys, &page_of_values
        sequence.keys.head_stride, sequence.keys.row_stride = key_head, key_row
        sequence.values.head_stride, sequence.values.row_stride = value_head, value_row
        sequence.page_tokens, sequence.dtype = position + 1, _DTYPES[dtype]
        rows.num_rows, rows.sequences = 1, &sequence
        rows.sequence, rows.position = &index, &position
        rows.cosines, rows.sines = <const float *>cosines, <const float *>sines
        chosen = self.chosen  # stays alive though another thread may take it away
        rows.chosen = NULL if chosen is None else <int64_t *>_address(chosen)
        self._run(_DTYPES[dtype], <const void *>hidden, &rows, <void *>out)

    cdef int _run(self, int dtype, const void *hidden, ktk_decoder_rows *rows,
                  void *out) except -1:
        cdef int status
        cdef ktk_held held
        rows.held = NULL
        if self.new_visit is None:
            status = self._call(dtype, hidden, rows, out)
        else:
            visit = self.new_visit()
            rows.bring, rows.caller = _bring, <void *>visit
            held.arrivals, rows.held = NULL, &held
            try:
                status = self._call(dtype, hidden, rows, out)
                rows.held = NULL
                if held.arrivals != NULL:
                    with nogil:  # who has the lock may wait for the GIL
                        ktk_arrivals_release(&held)
                    if status == KTK_AWAITED_IN_VAIN:  # once more, by Python
                        status = self._call(dtype, hidden, rows, out)
                while status == KTK_NOT_BROUGHT or status == KTK_AWAITED_IN_VAIN:
                    visit.wait()
                    status = self._call(dtype, hidden, rows, out)
            finally:
                visit.end()
        return _check_status(status, rows)

    cdef int _call(self, int dtype, const void *hidden, const ktk_decoder_rows *rows,
                   void *out) except -1:
        cdef _Pool pool = self._pool()
        cdef int status
        with nogil:
            status = ktk_decoder_layer_forward(&self.layer, self.kernels, pool.pool, dtype,
                                               hidden, rows, out)
        return status


cdef int _check_status(int status, const ktk_decoder_rows *rows) except -1:
    if status == KTK_ABSENT:
        raise BackendError("experts that the rows are routed to are not in memory: bring them "
                           "back first")
    if status:
        raise MemoryError(f"no memory for {rows.num_rows} rows, the first at "
                          f"{rows.position[0]} tokens")
    return 0


cdef void _fill_sequence(ktk_sequence *s, given) except *:
    keys, s.keys.head_stride, s.keys.row_stride = given[:3]
    values, s.values.head_stride, s.values.row_stride, s.page_tokens, dtype = given[3:]
    s.dtype = _CACHED_DTYPES[dtype]
    s.keys.pages, s.values.pages = <void **><uintptr_t>keys, <void **><uintptr_t>values


cdef class PageTables:
    """Where keys and values of one sequence lie in each layer."""

    cdef bytearray memory
    cdef object given

    def __init__(self, tables):
        """tables : of each layer, as DecoderLayer.forward takes one; they stay alive with this."""
        cdef int i
        self.given, self.memory = tables, bytearray(len(tables) * sizeof(ktk_sequence))
        cdef ktk_sequence *sequences = <ktk_sequence *>_address(self.memory)
        for i in range(<int>len(tables)):
            _fill_sequence(&sequences[i], tables[i])


cdef struct _Step:
    const ktk_decoder_layer *layer
    const ktk_kernels *kernels
    ktk_pool *pool
    ktk_decoder_rows rows


def run_layers(layers, str dtype, uintptr_t hidden, turns, tables, const int32_t[::1] sequence,
               const int64_t[::1] position):
    """Rows through layers, one after the other, in one call without the GIL.

    layers : of DecoderLayer, without experts that come and go. hidden : the address of the rows,
    which are overwritten. turns : of each layer (address of cosines, of sines). tables : PageTables
    of each sequence. sequence, position : of each row.
    """
    cdef int i, j, kind = _DTYPES[dtype], status = 0
    cdef int num_layers = <int>len(layers), num_sequences = <int>len(tables)
    cdef size_t of_tables = <size_t>(num_layers * num_sequences) * sizeof(ktk_sequence)
    memory = bytearray(of_tables + <size_t>num_layers * sizeof(_Step))
    cdef ktk_sequence *sequences = <ktk_sequence *>_address(memory)
    cdef _Step *steps = <_Step *>(<uintptr_t>sequences + of_tables)
    cdef DecoderLayer layer
    cdef PageTables own
    cdef ktk_sequence *from_
    pools = []
    for j in range(num_sequences):
        own = tables[j]
        from_ = <ktk_sequence *>_address(own.memory)
        for i in range(num_layers):
            sequences[i * num_sequences + j] = from_[i]
    for i in range(num_layers):
        layer = layers[i]
        pools.append(layer._pool())
        steps[i].layer, steps[i].kernels = &layer.layer, layer.kernels
        steps[i].pool = (<_Pool>pools[i]).pool
        cosines, sines = turns[i]
        steps[i].rows.num_rows = <int32_t>sequence.shape[0]
        steps[i].rows.sequences = &sequences[i * num_sequences]
        steps[i].rows.sequence, steps[i].rows.position = &sequence[0], &position[0]
        steps[i].rows.cosines = <const float *><uintptr_t>cosines
        steps[i].rows.sines = <const float *><uintptr_t>sines
    with nogil:
        for i in range(num_layers):
            status = ktk_decoder_layer_forward(steps[i].layer, steps[i].kernels, steps[i].pool,
                                               kind, <const void *>hidden, &steps[i].rows,
                                               <void *>hidden)
            if status:
                break
    _check_status(status, &steps[0].rows)
