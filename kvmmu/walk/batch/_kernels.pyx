"""The choice of kernels: one table for each instruction set."""

import os

from kvmmu.walk.batch._kernels cimport kvmmu_kernels, kvmmu_kernels_of

cdef const kvmmu_kernels *IN_USE = NULL
_INSTRUCTION_SETS = ("avx512", "avx2", "portable")


cdef const kvmmu_kernels *kernels_in_use() noexcept nogil:
    return IN_USE


def use_instruction_set(name):
    """Walk batches with the kernels for an instruction set: "avx512", "avx2" or "portable".

    Raises
    ------
    ValueError
        There is no such set, or this CPU or build does not have it.
    """
    global IN_USE
    cdef const kvmmu_kernels *kernels = NULL
    encoded = str(name).encode()
    if name in _INSTRUCTION_SETS:
        kernels = kvmmu_kernels_of(encoded)
    if kernels is NULL:
        raise ValueError(f"instruction set {name!r}: want one of {', '.join(instruction_sets())}")
    IN_USE = kernels


def instruction_sets():
    """Return the instruction sets that this CPU and build have, best first."""
    return [name for name in _INSTRUCTION_SETS if kvmmu_kernels_of(name.encode()) is not NULL]


def default_instruction_set():
    """Return the best instruction set whose kernels are in use by default: AVX-512 has to be chosen by name."""
    return next(name for name in instruction_sets() if name != "avx512")


use_instruction_set(os.environ.get("KVMMU_INSTRUCTION_SET") or default_instruction_set())
