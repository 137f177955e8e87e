"""The lock of one virtual machine, as `_lock.pxd` describes it."""

import os

from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport (
    NOWAIT_LOCK, PY_LOCK_ACQUIRED, PyLockStatus, PyThread_acquire_lock, PyThread_allocate_lock, PyThread_free_lock,
    PyThread_get_thread_ident, PyThread_release_lock, PyThread_type_lock,
)

cdef extern from "pythread.h" nogil:
    PyLockStatus PyThread_acquire_lock_timed(PyThread_type_lock lock, long long microseconds, int intr_flag)

cdef unsigned long forks = 0        # between this process and the one that loaded this module


def _count_fork():
    global forks
    forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


cdef class MachineLock:
    """The lock of one virtual machine; a context manager.

    Notes
    -----
    After a fork() a lock that nobody held is free in the child, and one that the forking thread held is still its own. One that
    another thread held can never be taken there: that thread is gone, and left what it was changing half done.
    """

    def __cinit__(self):
        self.epoch = forks
        self.real = PyThread_allocate_lock()
        if self.real is NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.real is not NULL and self.count == 0:
            PyThread_free_lock(self.real)

    cdef int acquire(self) except -1:
        cdef unsigned long me = <unsigned long>PyThread_get_thread_ident()
        if self.epoch != forks:
            take_over(self, me)
        if self.torn:
            raise RuntimeError("this machine ran in another thread when the process was forked, and is half changed in this "
                               "process; make a new one here, or fork while no thread uses it")
        if self.count == 0 or self.owner != me:
            if not PyThread_acquire_lock(self.real, NOWAIT_LOCK):
                wait_for(self)
            self.owner = me
        self.count += 1
        return 0

    cdef void release(self) noexcept:
        self.count -= 1
        if self.count == 0:
            PyThread_release_lock(self.real)

    def check_outermost(self, what):
        """Raise RuntimeError unless this thread holds the lock once: a call that holds it already is under way below."""
        if self.count != 1 or self.owner != <unsigned long>PyThread_get_thread_ident():
            raise RuntimeError(f"{what}: the machine is within another call of this thread, half-way between two states")

    def __enter__(self):
        self.acquire()
        return True

    def __exit__(self, *exception):
        if self.count == 0 or self.owner != <unsigned long>PyThread_get_thread_ident():
            raise RuntimeError("the lock is not held by this thread")
        self.release()

    def __reduce__(self):
        raise TypeError("a MachineLock cannot be copied or pickled")


cdef int wait_for(MachineLock lock) except -1:
    cdef PyLockStatus status
    while True:
        with nogil:
            status = PyThread_acquire_lock_timed(lock.real, -1, 1)
        if status == PY_LOCK_ACQUIRED:
            return 0
        PyErr_CheckSignals()


cdef int take_over(MachineLock lock, unsigned long me) except -1:
    """The first use in a forked process, in which only the thread that forked lives on."""
    if lock.count and lock.owner == me:
        lock.epoch = forks
        return 0
    lock.torn = lock.torn or lock.count != 0
    lock.real = PyThread_allocate_lock()                # the old one may be held for ever
    if lock.real is NULL:
        raise MemoryError
    lock.count = 0
    lock.epoch = forks
    return 0
