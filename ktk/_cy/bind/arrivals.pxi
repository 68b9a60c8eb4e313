# Experts that come and go while rows are decoded, without Python.

_EVENTS = {
    KTK_BROUGHT: "brought", KTK_RELEASED: "released", KTK_CAME: "came", KTK_FAILED: "failed",
    KTK_CLAIMED: "claimed", KTK_FORETOLD: "foretold", KTK_SAVED: "saved",
    KTK_CANCELLED: "cancelled",
}


cdef class Arrivals:
    """See ktk_arrivals.h. What is said there to have the lock is called between lock() and
    unlock().
    """

    COLD, READY, OURS, OTHERS = KTK_COLD, KTK_READY, KTK_OURS, KTK_OTHERS

    cdef ktk_arrivals *of
    cdef int made_in, slot_bytes
    cdef object memory
    cdef dict experts  # by layer
    cdef readonly bytearray standing
    cdef readonly bytearray checked

    def __init__(self, int num_layers, int num_experts, memory, int num_readers):
        """memory : uint8 (slots, slot_bytes). standing, checked : bytes of each key."""
        self.memory, self.experts, self.made_in = memory, {}, 0
        self.standing = bytearray(num_layers * num_experts)
        self.checked = bytearray(num_layers * num_experts)
        self.of = ktk_arrivals_new(
            num_layers, num_experts, <uint8_t *>_address(memory), memory.strides[0],
            <uint8_t *>_address(self.standing), <const uint8_t *>_address(self.checked),
            num_readers)
        if self.of == NULL:
            raise MemoryError("no memory for the experts' slots")

    def __dealloc__(self):
        if self.of != NULL and (self.made_in == 0 or self.made_in == _process()):
            ktk_arrivals_stop(self.of)
            ktk_arrivals_free(self.of)

    def follow(self, int layer, Experts experts, offsets, int fd, int64_t first,
               int64_t num_bytes):
        """The layer's experts; offsets : {table: where it begins in a slot}. first : of the file's
        bytes. Before ``start``.
        """
        cdef ktk_streamed_layer given
        cdef int i
        assert experts.layer.num_parts == 1 and len(experts.names) <= KTK_MAX_TABLES
        given.layer, given.entries = &experts.layer, experts.entries
        given.num_tables = <int>len(experts.names)
        for i in range(given.num_tables):
            given.offsets[i] = offsets[experts.names[i]]
        given.fd, given.first, given.num_bytes = fd, first, num_bytes
        ktk_arrivals_set_layer(self.of, layer, &given)
        self.experts[layer] = experts

    def start(self):
        """Threads that read, in this process."""
        cdef Experts experts
        for experts in self.experts.values():
            experts._pool()  # has locks of this process then
        if not ktk_arrivals_start(self.of):
            raise MemoryError("cannot start threads that read experts")
        self.made_in = _process()

    def stop(self):
        """Returns when no thread reads. ``wait`` says False."""
        if self.made_in == _process():
            with nogil:
                ktk_arrivals_stop(self.of)

    def lock(self):
        with nogil:
            ktk_arrivals_lock(self.of)

    def unlock(self):
        ktk_arrivals_unlock(self.of)

    def wait(self):
        """Until there is something to do, True; False: stopped. Without the lock."""
        cdef int goes_on
        with nogil:
            goes_on = ktk_arrivals_wait(self.of)
        return goes_on != 0

    def turn(self, bint is_on):
        ktk_arrivals_turn(self.of, is_on)

    def ask(self, int change):
        ktk_arrivals_ask(self.of, change)

    def offer(self, int32_t key, int32_t slot):
        """Whether there was room."""
        return ktk_arrivals_offer(self.of, key, slot) != 0

    def take(self):
        """(key or -1, slot), or None."""
        cdef int32_t key, slot
        return (key, slot) if ktk_arrivals_take(self.of, &key, &slot) else None

    def keep(self, int32_t key):
        """Whether it was offered."""
        return ktk_arrivals_keep(self.of, key) != 0

    @property
    def num_offered(self):
        return ktk_arrivals_num_offered(self.of)

    def address(self, int layer, int64_t expert):
        """Where the layer's tables say the expert begins; 0: elsewhere."""
        return (<Experts>self.experts[layer]).address(0, self.experts[layer].tables[0], expert)

    def hurry(self, int32_t key):
        ktk_arrivals_hurry(self.of, key)

    def events(self):
        """[(what, words)] since the last time."""
        cdef int64_t num, at = 0
        cdef int i, size
        cdef const int32_t *words = ktk_arrivals_events(self.of, &num)
        found = []
        while at < num:
            size = words[at] >> 8
            found.append((_EVENTS[words[at] & 255], [words[at + 1 + i] for i in range(size)]))
            at += 1 + size
        return found
