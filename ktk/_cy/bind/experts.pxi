# A layer's experts: matrices of any format, and tables of where each expert's are.


_ARRIVALS = {"here": KTK_HERE, "coming": KTK_COMING, "lost": KTK_LOST}


cdef class Experts(_OnPool):
    """One layer's experts with the kernels of one ISA level.

    The caller has checked shapes and dtypes.
    """

    cdef ktk_layer layer
    cdef object parts, names
    cdef const void **entries  # [part][table][expert]

    def __dealloc__(self):
        free(self.entries)
        ktk_lock_free(self.layer.lock)

    def __init__(self, spec, matrices, parts, order, str isa, engine):
        """matrices : {"gate", "up", "down": (MatrixLayout, is_repacked)}, no gate without one.
        parts : list of ktk.placement.parts.Part. order : as StoredExperts has it. engine :
            ktk.machine.threads.EngineLayout.
        """
        self._take_pool(isa, engine)
        self.parts = parts
        cdef ktk_layer *layer = &self.layer
        layer.num_experts = spec.num_experts
        self._take_lock()
        layer.hidden_size = spec.hidden_size
        layer.intermediate_size = spec.intermediate_size
        _fill_activation(&layer.activation, spec.activation, spec.has_gate)
        assert len(parts) <= KTK_MAX_PARTS
        layer.num_parts = len(parts)
        # Panels of gate and up alternate: one matrix, whose table holds the gate's addresses.
        cdef bint is_one = spec.has_gate and spec.is_packed
        first = "gate" if spec.has_gate else "up"
        self._use(&layer.gate_up, matrices[first])
        if spec.has_gate and not is_one:
            self._use(&layer.up, matrices["up"])
        self._use(&layer.down, matrices["down"])
        tables = [first, *(["up"] if spec.has_gate and not is_one else []), "down"]
        tables += [f"{name}_bias" for name in matrices if getattr(parts[0],
                                                                  f"{name}_bias") is not None]
        self.names = tuple(tables)
        cdef size_t num_entries = len(parts) * len(tables) * spec.num_experts
        self.entries = <const void **>malloc(num_entries * sizeof(void *))
        if self.entries == NULL:
            raise MemoryError("no memory for the experts' addresses")
        cdef ktk_part *part
        for i, given in enumerate(parts):
            for name in tables:
                self._fill(self._table(i, name), getattr(given, name), order)
            part = &layer.parts[i]
            part.gate_up = <const uint8_t **>self._table(i, first)
            part.up = NULL
            if first != "up":
                part.up = <const uint8_t **>self._table(i, "up")
            part.down = <const uint8_t **>self._table(i, "down")
            part.gate_bias = <const float **>self._table(i, "gate_bias")
            part.up_bias = <const float **>self._table(i, "up_bias")
            part.down_bias = <const float **>self._table(i, "down_bias")
            part.first_up_panel = given.first_up_panel
            part.num_up_panels = given.num_up_panels
            part.first_down_panel = given.first_down_panel
            part.num_down_panels = given.num_down_panels

    cdef void _take_lock(self) except *:
        self.layer.lock = ktk_lock_new(self.layer.num_experts)
        if self.layer.lock == NULL:
            raise MemoryError("no memory for a lock")

    cdef _Pool _pool(self):
        """After a fork a new lock, too: who held the old one may be gone,
        so that one is left alone.
        """
        if self.made_in != _process():
            self._take_lock()
        return _OnPool._pool(self)

    cdef void _use(self, ktk_matrix *m, matrix) except *:
        layout, is_repacked = matrix
        _fill_matrix(m, layout, is_repacked)
        ktk_use_kernels(m, self.kernels)

    cdef const void **_table(self, int part, str name) except? NULL:
        """A part's table, NULL if the experts have none of this name."""
        if name not in self.names:
            return NULL
        cdef int64_t index = part * len(self.names) + self.names.index(name)
        return self.entries + index * self.layer.num_experts

    cdef void _fill(self, const void **table, array, order) except *:
        """Addresses of array[e], or array[order[e]]; NULL where that is -1."""
        cdef int64_t e, stride = array.strides[0]
        cdef const uint8_t *first = <const uint8_t *>_address(array)
        cdef const int64_t[::1] places
        if order is None:
            for e in range(self.layer.num_experts):
                table[e] = first + e * stride
            return
        places = order
        for e in range(self.layer.num_experts):
            table[e] = NULL if places[e] < 0 else first + places[e] * stride
            self.layer.num_absent += table[e] == NULL

    cdef const void **_entry(self, int part, str table, int64_t expert) except NULL:
        is_part = 0 <= part < self.layer.num_parts and table in self.names
        if not is_part or not 0 <= expert < self.layer.num_experts:
            raise ValueError(
                f"part={part}, table={table!r}, expert={expert}: there are {self.layer.num_parts} "
                f"parts, tables "
                f"{', '.join(self.names)} and {self.layer.num_experts} experts"
            )
        return self._table(part, table) + expert

    @property
    def tables(self):
        """Names of the tables of addresses: of packed experts "gate" stands for gate and up,
        whose panels alternate.
        """
        return self.names

    def address(self, int part, str table, int64_t expert):
        """Where an expert's bytes of a table are, int; 0 = elsewhere.

        ValueError for what there is not.
        """
        return <uintptr_t>self._entry(part, table, expert)[0]

    def set_address(self, int part, str table, int64_t expert, uintptr_t address,
                    bint is_unused=False):
        """Move an expert; 0 = it is elsewhere now. Returns when no call reads the old address any
        more.

        The memory is the caller's to keep. is_unused : no call uses the expert, so that there is
        nothing to wait for. ValueError for what there is not.
        """
        cdef const void **entry = self._entry(part, table, expert)
        cdef const void *to = <const void *>address
        self._pool()
        if is_unused:
            ktk_put_address(&self.layer, entry, to)
            return
        with nogil:
            ktk_set_address(&self.layer, entry, to)

    def set_arrival(self, int64_t expert, str arrival):
        """Whether an expert's bytes are where its addresses say: "here"; "coming", and calls that
        use it wait; "lost", and they end with AwaitedInVain. At first they are here.
        """
        self._entry(0, self.names[0], expert)
        self._pool()
        ktk_set_arrival(&self.layer, expert, _ARRIVALS[arrival])

    def _absent(self, ids, skip):
        """The error for a call whose tokens go to experts that are elsewhere."""
        named = [e for e in np.unique(ids).tolist() if 0 <= e < self.layer.num_experts]
        found = [e for e in named if skip is None or not skip[e]]
        found = [e for e in found if any(
            not self.address(part, table,
                             e) for part in range(self.layer.num_parts) for table in self.names)]
        return BackendError(f"experts {', '.join(map(str, found))} are not in memory: bring them "
                            f"back first")

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
            status = ktk_moe_forward(&self.layer, self.kernels, pool.pool, num_tokens, top_k,
                                     dtype, x, ids,
                                     weights, mask, partial, y)
        self._raise(status, topk_ids, skip)

    def _raise(self, int status, topk_ids, skip):
        """The error for what the operator says of a call, if it is one."""
        if status == KTK_ABSENT:
            raise self._absent(topk_ids, skip)
        if status == KTK_AWAITED_IN_VAIN:
            raise AwaitedInVain("an expert that was on its way could not be read: call again")
        if status:
            num_tokens, top_k = topk_ids.shape
            raise MemoryError(f"no scratch memory for {num_tokens} tokens x top_k {top_k}: pass "
                              f"fewer tokens a call")

    def forward_saved(self, hidden, topk_ids, topk_weights, lora, z, out):
        """See ktk.backends.base.Runner.forward_saved."""
        cdef _Pool pool = self._pool()
        cdef int64_t num_tokens = topk_ids.shape[0]
        cdef int top_k = topk_ids.shape[1], dtype = _DTYPES[hidden.dtype.char]
        cdef const void *x = <const void *>_address(hidden)
        cdef const int64_t *ids = <const int64_t *>_address(topk_ids)
        cdef const float *weights = <const float *>_address(topk_weights)
        cdef float *kept = <float *>_address(z)
        cdef void *y = <void *>_address(out)
        cdef ktk_lora given
        cdef const ktk_lora *adapters = _fill_lora(&given, lora)
        cdef int status
        with nogil:
            status = ktk_moe_forward_saved(&self.layer, self.kernels, pool.pool, num_tokens, top_k,
                                           dtype, x, ids, weights, NULL, adapters, kept, y)
        self._raise(status, topk_ids, None)

    def backward(self, hidden, topk_ids, topk_weights, lora, z, grad, d_hidden, d_weights, d_lora):
        """See ktk.backends.base.Runner.backward. d_lora : float32 arrays by their names."""
        cdef _Pool pool = self._pool()
        cdef int64_t num_tokens = topk_ids.shape[0]
        cdef int top_k = topk_ids.shape[1], dtype = _DTYPES[hidden.dtype.char]
        cdef int grad_dtype = _DTYPES[grad.dtype.char]
        cdef const void *x = <const void *>_address(hidden)
        cdef const int64_t *ids = <const int64_t *>_address(topk_ids)
        cdef const float *weights = <const float *>_address(topk_weights)
        cdef const float *kept = <const float *>_address(z)
        cdef const void *dy = <const void *>_address(grad)
        cdef float *dx = <float *>_address(d_hidden)
        cdef float *dw = <float *>_address(d_weights)
        cdef ktk_lora given
        cdef const ktk_lora *adapters = _fill_lora(&given, lora)
        cdef ktk_adapter_gradient gradients[3]
        for i, name in enumerate(_PROJECTIONS):
            gradients[i].a = <float *>_floats(d_lora.get(name + "_a"))
            gradients[i].b = <float *>_floats(d_lora.get(name + "_b"))
        cdef int status
        with nogil:
            status = ktk_moe_backward(&self.layer, self.kernels, pool.pool, num_tokens, top_k,
                                      dtype, x, ids, weights, NULL, adapters, kept, grad_dtype, dy,
                                      dx, dw, gradients)
        self._raise(status, topk_ids, None)

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
            status = ktk_moe_linear(&self.layer, self.kernels, pool.pool, is_down, num_rows, rows,
                                    ids, y)
        if status == KTK_ABSENT:
            raise self._absent(expert_ids, None)
        if status == KTK_AWAITED_IN_VAIN:
            raise AwaitedInVain("an expert that was on its way could not be read: call again")
        if status:
            raise MemoryError(f"no scratch memory for {num_rows} rows: pass fewer rows a call")
        return result

    def combine(self, y, place, weights, add, out):
        """See ktk.backends.base.Runner.combine; y is as wide as whole panels."""
        cdef _Pool pool = self._pool()
        cdef int64_t num_tokens = place.shape[0], hidden = out.shape[1], stride = y.shape[1]
        cdef int top_k = place.shape[1]
        cdef int dtype = _DTYPES[out.dtype.char]
        cdef const float *rows = <const float *>_address(y)
        cdef const int32_t *places = <const int32_t *>_address(place)
        cdef const float *factors = <const float *>_address(weights)
        cdef const float *partial = _floats(add)
        cdef void *sums = <void *>_address(out)
        with nogil:
            ktk_combine(self.kernels, pool.pool, num_tokens, hidden, stride, top_k, dtype, rows,
                        places, factors, partial, sums)


def row_major(codes, int bits, out, engine):
    """Codes of panels row by row. codes : uint8 (panels, code bytes), panels at any distance.

    bits : 4, 8 (of fp8) or 16. out : uint8 (rows, row bytes). engine :
    ktk.machine.threads.EngineLayout, whose threads do it.
    """
    cdef _Pool pool = _pool_of(engine)
    cdef const uint8_t *first = <const uint8_t *>_address(codes)
    cdef int64_t stride = codes.strides[0], num_panels = codes.shape[0]
    cdef int64_t num_rows = out.shape[0], row_bytes = out.shape[1]
    cdef uint8_t *to = <uint8_t *>_address(out)
    with nogil:
        ktk_row_major(pool.pool, first, stride, num_panels, bits, num_rows, row_bytes, to)
