# SPDX-License-Identifier: Apache-2.0
"""The function table of kvmmu.h, called through ctypes; the example of ctypes has its functions."""

import ctypes
import importlib.util

import numpy as np
from paths import ROOT

from kvmmu.walk.results import Translation

_spec = importlib.util.spec_from_file_location("walk_ctypes", ROOT / "examples" / "embed" / "walk_ctypes.py")
walk_ctypes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(walk_ctypes)
Registers, Result, SecondStage, NestedResult, load = (
    walk_ctypes.Registers, walk_ctypes.Result, walk_ctypes.SecondStage, walk_ctypes.NestedResult, walk_ctypes.load)
WORD, NARROW, BYTE = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint8

RESULT = np.dtype([("gpa", np.uint64), ("error_code", np.uint32), ("status", np.uint8), ("level", np.uint8),
                   ("reserved", np.uint16)])


class Cpu(ctypes.Structure):
    """kvmmu_cpu."""

    _fields_ = [("size", NARROW), ("maxphyaddr", NARROW), ("flags", NARROW), ("c_bit", NARROW), ("features", NARROW)]

    def __init__(self, maxphyaddr=0, flags=0, c_bit=0, features=0):
        super().__init__(ctypes.sizeof(Cpu), maxphyaddr, flags, c_bit, features)


class Mapping(ctypes.Structure):
    """kvmmu_mapping."""

    _fields_ = [*((name, WORD) for name in ("gpa", "size", "pte", "pte_gpa")), ("error_code", NARROW),
                *((name, BYTE) for name in ("status", "level", "rights", "pkey", "accessed", "dirty", "global_")),
                ("reserved", BYTE * 5)]


class Step(ctypes.Structure):
    """kvmmu_step."""

    _fields_ = [("entry", WORD), ("entry_gpa", WORD), ("index", ctypes.c_uint16), ("level", BYTE), ("rights", BYTE),
                ("reserved", BYTE * 4)]


class Record(ctypes.Structure):
    """kvmmu_record."""

    _fields_ = [("end", Mapping), ("count", NARROW), ("reserved", NARROW), ("steps", Step * 5)]


READ = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, WORD, ctypes.c_void_p)
WRITE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, WORD, ctypes.c_void_p, ctypes.c_size_t)


class Callbacks(ctypes.Structure):
    """kvmmu_callbacks."""

    _fields_ = [("size", NARROW), ("cache_pages", NARROW), ("memory_size", WORD), ("opaque", ctypes.c_void_p), ("read", READ),
                ("write", WRITE)]


STRUCTURES = {"kvmmu_registers": Registers, "kvmmu_result": Result, "kvmmu_cpu": Cpu, "kvmmu_mapping": Mapping,
              "kvmmu_step": Step, "kvmmu_record": Record, "kvmmu_callbacks": Callbacks, "kvmmu_second_stage": SecondStage,
              "kvmmu_nested_result": NestedResult, "kvmmu_api": walk_ctypes.Api}
EPT, NPT, MBEC, NO_EXECONLY, NO_ADVANCED_INFO, NO_2M, NO_1G, PML, SPP, VE, GMET = (1 << bit for bit in range(11))


class CallFailed(Exception):
    """A function returned a code."""


class Table:
    """The functions, of which each raises CallFailed with its code where it fails."""

    def __init__(self):
        self.api = load()

    def __getattr__(self, name):
        function = getattr(self.api, name)

        def call(*arguments):
            code = function(*arguments)
            if code:
                raise CallFailed(code)

        return call


class Machine:
    """A memory and a vCPU behind handles. IN slots: (gpa, array of bytes); callbacks: these are read and written."""

    def __init__(self, slots, regs, *, cpu=None, callbacks=False, cache_pages=0, write=True, stage=None):
        self.table, self.slots = Table(), slots
        self.memory, self.vcpu = WORD(), WORD()
        self.reads, self.writes = [], []
        if callbacks:
            self.callbacks = Callbacks(ctypes.sizeof(Callbacks), cache_pages, 0, None, READ(self._read),
                                       WRITE(self._write) if write else WRITE())
            self.table.memory_create_callbacks(ctypes.byref(self.callbacks), ctypes.byref(self.memory))
        else:
            self.table.memory_create(ctypes.byref(self.memory))
            for gpa, data in slots:
                self.table.memory_add(self.memory, gpa, data.ctypes.data, data.nbytes, 0)
        cpu = cpu or Cpu()
        self.table.vcpu_create(self.memory, ctypes.byref(cpu), ctypes.byref(self.vcpu))
        if stage is not None:
            self.enter(stage)
        self.load(**regs)

    def enter(self, stage):
        """Take the second stage of an Ept or an Npt; None: none."""
        self.table.set_second_stage(self.vcpu, None if stage is None else ctypes.byref(second_stage(stage)))

    def load(self, pdptrs=None, **registers):
        registers = Registers(size=ctypes.sizeof(Registers), **registers)
        if pdptrs is not None:
            registers.flags, registers.pdptrs = 1, (WORD * 4)(*pdptrs)
        self.table.set_registers(self.vcpu, ctypes.byref(registers))

    def _find(self, gpa):
        for start, data in self.slots:
            if start <= gpa < start + data.nbytes:
                return data, gpa - start
        return None, 0

    def _read(self, opaque, gpa, page):
        self.reads.append(gpa)
        data, offset = self._find(gpa)
        if data is None:
            return 1
        ctypes.memmove(page, data.ctypes.data + offset, 4096)
        return 0

    def _write(self, opaque, gpa, value, n):
        self.writes.append((gpa, n))
        data, offset = self._find(gpa)
        ctypes.memmove(data.ctypes.data + offset, value, n)
        return 0

    def translate(self, gva, access, flags=0):
        """One call for each row, as the columns of `Translation`."""
        result, rows = Result(), []
        for address, how in zip(gva.tolist(), access.tolist(), strict=True):
            self.table.translate(self.vcpu, address, how | flags, ctypes.byref(result))
            rows.append((result.gpa, result.error_code, result.status, result.level, result.reserved))
        return columns(np.array(rows, RESULT))

    def translate_many(self, gva, access, flags=0):
        """One call for all rows."""
        out, done = np.zeros(gva.size, RESULT), ctypes.c_size_t()
        self.table.translate_many(self.vcpu, gva.size, gva.ctypes.data, access.ctypes.data, flags, out.ctypes.data,
                                  ctypes.byref(done))
        assert gva.size == done.value
        return columns(out)

    def nested(self, gva, access):
        result = NestedResult()
        self.table.translate_nested(self.vcpu, gva, access, ctypes.byref(result))
        return result

    def lookup(self, gva, access):
        mapping = Mapping()
        self.table.lookup(self.vcpu, gva, access, ctypes.byref(mapping))
        return mapping

    def record(self, gva, access):
        record = Record()
        self.table.record(self.vcpu, gva, access, ctypes.byref(record))
        return record

    def close(self):
        self.table.vcpu_free(self.vcpu)
        self.table.memory_free(self.memory)


def second_stage(stage):
    """The kvmmu_second_stage of an Ept or an Npt."""
    c = SecondStage(size=ctypes.sizeof(SecondStage), root=stage.root)
    if hasattr(stage, "ncr3"):
        c.flags, c.cr4, c.efer = NPT | GMET * stage.gmet, stage.cr4, stage.efer
        return c
    c.flags = (EPT | MBEC * stage.mbec | NO_EXECONLY * (not stage.execonly) | NO_ADVANCED_INFO * (not stage.advanced_info) |
               NO_2M * (not stage.page_2m) | NO_1G * (stage.page_1g is False))
    if stage.pml is not None:
        c.flags, c.pml_address, c.pml_index = c.flags | PML, stage.pml.address, stage.pml.index
    if stage.spptp is not None:
        c.flags, c.spptp = c.flags | SPP, stage.spptp
    if stage.ve is not None:
        c.flags, c.ve_area = c.flags | VE, stage.ve
    return c


def columns(rows):
    return Translation(**{name: np.ascontiguousarray(rows[name]) for name in ("gpa", "error_code", "status", "level")})


def copy_of(mem):
    """The slots of a GuestMemory, as arrays of their own."""
    return [(gpa, np.frombuffer(bytearray(mem.read(gpa, size)), np.uint8)) for gpa, size, _ in mem.slots]


def bytes_of(slots):
    return [data.tobytes() for _, data in slots]
