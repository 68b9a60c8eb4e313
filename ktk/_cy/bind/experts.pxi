# A layer's experts.


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
        _fill_panels(&self.layer.gate_up, layout.gate_up, spec.weight_format)
        _fill_panels(&self.layer.down, layout.down, spec.weight_format)
        ktk_use_kernels(&self.layer.gate_up, self.kernels)
        ktk_use_kernels(&self.layer.down, self.kernels)
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
    def of_blocks(spec, matrices, parts, str isa, engine):
        """Experts in GGUF blocks.

        matrices : {"gate", "up", "down": (index of the format, in_features, panels, is_repacked)}, no gate without one.
        parts : list of ktk.backends.llamafile.Part.
        """
        cdef Experts self = Experts()
        self._begin(spec, isa, engine, parts)
        cdef int group = spec.activation_group
        cdef bint has_gate = "gate" in matrices
        cdef ktk_matrix *m
        for name, given in matrices.items():
            m = &self.layer.down if name == "down" else &self.layer.gate_up
            if name == "up" and has_gate:
                m = &self.layer.up
            _fill_blocks(m, given[0], given[1], given[2], group, given[3])
            ktk_use_kernels(m, self.kernels)
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
