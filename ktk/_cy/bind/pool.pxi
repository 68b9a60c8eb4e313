# The thread pool, one per engine layout and process, and what runs on it.

from posix.unistd cimport getpid


cdef inline int _process():
    """ktk.fork.process, also where Python has taken its modules down and drops the last pools."""
    return getpid()


cdef class _Pool:
    """A C thread pool; shared by every Experts of the same engine layout."""

    cdef ktk_pool *pool
    cdef int made_in
    cdef object __weakref__

    def __cinit__(self, int num_threads, int num_parts, cores, bint may_borrow):
        cdef cpu_set_t *masks = NULL
        cdef int i
        self.made_in = _process()
        if num_threads < num_parts or (cores and len(cores) != num_threads):
            raise ValueError(
                f"num_threads={num_threads}, {num_parts} parts, {len(cores)} cores: each part "
                f"needs a thread, each "
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
        # After a fork the threads exist in the parent only: nothing to join, the memory is left
        # alone.
        if self.pool != NULL and self.made_in == _process():
            ktk_pool_free(self.pool)


def borrow_threads(address):
    """Run on the threads of the OpenMP runtime whose GOMP_parallel stands at ``address``, int;
    0 = own threads again.
    """
    cdef uintptr_t at = address
    ktk_pool_borrow(<void *>at)


def own_threads_only(int is_only=1):
    """What the calling Python thread runs uses ktk's own threads, whatever is borrowed.

    is_only : 0 no, 1 yes, 2 and the threads wait awake for the next call. Returns what held before.
    """
    return ktk_pool_own_threads_only(is_only)


_pools = weakref.WeakValueDictionary()


def _pool_of(engine):
    # Borrowed threads stay where torch has them: not for weights bound to a node.
    key = (_process(), engine.num_threads, engine.threadpool_count, engine.cores,
           not engine.is_bound)
    # Several threads may come here first.
    return _pools.get(key) or _pools.setdefault(key, _Pool(*key[1:]))


cdef class _OnPool:
    """What runs on the pool of an engine layout with the kernels of one ISA row."""

    cdef const ktk_kernels *kernels
    cdef _Pool pool
    cdef object engine
    cdef int made_in

    cdef void _take_pool(self, str isa, engine) except *:
        self.kernels = _kernels(isa)
        self.engine = engine
        self.pool = _pool_of(engine)
        self.made_in = _process()

    cdef _Pool _pool(self):
        """The pool, a new one after a fork. Callers keep the reference while they run."""
        if self.made_in != _process():
            self.pool = _pool_of(self.engine)
            self.made_in = _process()
        return self.pool
