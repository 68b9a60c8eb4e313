# A forward pass over buffers that stay where they are, as a C function: for threads that have no
# Python, as a CUDA stream's.


from libc.string cimport memset


cdef struct _Pass:
    const ktk_layer *layer
    const ktk_kernels *kernels
    ktk_pool *pool
    int64_t num_tokens
    int top_k
    int dtype
    const void *hidden
    const int64_t *ids
    const float *weights
    const uint8_t *skip
    const float *add
    void *out
    int64_t out_bytes
    int64_t calls
    int status  # of the first call that failed


cdef void _run_pass(void *data) noexcept nogil:
    cdef _Pass *p = <_Pass *>data
    ktk_pool_own_threads_only(1)
    cdef int status = ktk_moe_forward(p.layer, p.kernels, p.pool, p.num_tokens, p.top_k, p.dtype,
                                      p.hidden, p.ids, p.weights, p.skip, p.add, p.out)
    if status:  # NaN, until Python hears of it
        memset(p.out, 0xff, <size_t>p.out_bytes)
        if not p.status:
            p.status = status
    p.calls += 1


cdef class Prepared:
    """A pass with its buffers. ``function(data)``, addresses, runs it from any thread, one at a
    time.
    """

    cdef _Pass given
    cdef Experts experts
    cdef object kept

    def __init__(self, Experts experts, hidden, topk_ids, topk_weights, skip, out, add):
        """As Experts.forward takes them; all are kept, and read when the pass runs."""
        cdef _Pool pool = experts._pool()
        self.experts = experts
        self.kept = (pool, hidden, topk_ids, topk_weights, skip, out, add)
        cdef _Pass *p = &self.given
        p.layer, p.kernels, p.pool = &experts.layer, experts.kernels, pool.pool
        p.num_tokens, p.top_k = topk_ids.shape[0], topk_ids.shape[1]
        p.dtype = _DTYPES[hidden.dtype.char]
        p.hidden = <const void *>_address(hidden)
        p.ids = <const int64_t *>_address(topk_ids)
        p.weights = <const float *>_address(topk_weights)
        p.skip = NULL if skip is None else <const uint8_t *>_address(skip)
        p.add = NULL if add is None else <const float *>_address(add)
        p.out, p.out_bytes = <void *>_address(out), out.nbytes
        p.calls = p.status = 0

    @property
    def function(self):
        return <uintptr_t>&_run_pass

    @property
    def data(self):
        return <uintptr_t>&self.given

    @property
    def calls(self):
        """Times it has run."""
        return self.given.calls

    def check(self):
        """Raise what a call since the last check has failed of; its output is not to be used."""
        status, self.given.status = self.given.status, 0
        _, _, ids, _, skip, _, _ = self.kept
        if status == KTK_ABSENT:
            raise self.experts._absent(ids, skip)
        if status:
            raise MemoryError(f"no scratch memory for {self.given.num_tokens} tokens x top_k "
                              f"{self.given.top_k}: pass fewer tokens a call")
