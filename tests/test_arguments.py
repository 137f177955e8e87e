# SPDX-License-Identifier: Apache-2.0
"""Integers, flags, bytes and masked arrays as callers pass them: taken whatever their width, or refused by name."""

import re
from dataclasses import fields, replace

import numpy as np
import pytest
from builders import PageTables
from machines import vcpu_over
from public_calls import (
    BITS,
    CALLS,
    EPTP,
    GVAS,
    PAGE,
    TOP,
    U64,
    expected_parameters,
    machine,
    memory,
    paging_off,
    recorded,
    spte_format,
    walk,
    walk_format,
)

import kvmmu
import kvmmu.traces
from kvmmu import (
    Acc,
    Access,
    Accesses,
    CpuModel,
    Ept,
    EptViolation,
    GuestMemory,
    Host,
    Intercepts,
    Npt,
    PageFault,
    PageFormat,
    Pml,
    Regs,
    TlbHierarchy,
    Tracepoints,
    Translation,
)
from kvmmu.arch.arguments import check_bytes, check_integers
from kvmmu.images import is_image, open_image
from kvmmu.oracles import run_scenario
from kvmmu.report.address_space import plot_mappings
from kvmmu.traces import Header, ParquetTrace, Recording, RegisterSet, Stage, convert, open_trace
from kvmmu.traces.opening import describe_trace
from kvmmu.traces.source import open_source

NUMPY = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64)


class Index:
    """An integer of somebody else."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


def test_no_public_parameter_is_forgotten():
    """Each integer and each flag of a public callable is in the table."""
    expected = expected_parameters()
    assert len(expected) > 200
    missing = []
    for (name, parameter), kind in expected.items():
        calls = [call for key, call in CALLS.items() if key in (name, f"{name} of EPT")]
        flags = [parameter in call.flags for call in calls]
        ints = [parameter in call.ints for call in calls]
        if not any(flags if kind == "bool" else ints + flags):
            missing.append((name, parameter, kind))
    assert not missing


# ---- integers --------------------------------------------------------------------------------------------------------------

INTS = [(name, parameter) for name, call in CALLS.items() for parameter in call.ints]
FLAGS = [(name, parameter) for name, call in CALLS.items() for parameter in call.flags]


@pytest.mark.parametrize(("name", "parameter"), INTS)
def test_integers_of_any_kind(name, parameter):
    """NumPy's of every width that holds the value, members of enums and objects with __index__ do what an int does."""
    call = CALLS[name]
    value = call.ints[parameter][0]
    expected = call.run()
    given = [kind(value) for kind in NUMPY if value <= np.iinfo(kind).max]
    if parameter not in call.arrays:
        given.append(Index(value))
    given += [flags(value) for flags in (Access, Acc) if value in (0, 2, 4)]
    for other in given:
        assert call.run(**{parameter: other}) == expected, repr(other)


@pytest.mark.parametrize(("name", "parameter"), INTS)
def test_what_is_no_integer(name, parameter):
    """TypeError that names the argument."""
    call = CALLS[name]
    value = call.ints[parameter][0]
    wrong = [True, False, np.True_, float(value), np.float64(value), np.float32(value), str(value), "", 1j, object()]
    if parameter != "size_or_buffer":
        wrong += [b"1", bytearray(8)]
    if parameter not in call.optional:
        wrong.append(None)
    if parameter not in call.arrays:
        wrong += [[value], (value,), {value}]
    if parameter not in (*call.arrays, "size_or_buffer"):
        wrong.append(np.array([value]))
    for other in wrong:
        with pytest.raises(TypeError) as caught:
            call.run(**{parameter: other})
        assert parameter in str(caught.value), repr(other)


@pytest.mark.parametrize(("name", "parameter"), INTS)
def test_integers_out_of_range(name, parameter):
    """ValueError that names the argument."""
    call = CALLS[name]
    _, low, high = call.ints[parameter]
    for value in (low - 1, high + 1, -(1 << 70), 1 << 70, 1 << 20_000, Index(high + 1)):
        if isinstance(value, Index) and parameter in call.arrays:
            continue
        with pytest.raises(ValueError, match=parameter) as caught:
            call.run(**{parameter: value})
        assert len(str(caught.value)) < 6000
    for kind in NUMPY:
        for value in (low - 1, high + 1):
            if np.iinfo(kind).min <= value <= np.iinfo(kind).max:
                with pytest.raises(ValueError, match=parameter):
                    call.run(**{parameter: kind(value)})


# ---- flags -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "parameter"), FLAGS)
def test_flags(name, parameter):
    """Bools, NumPy's bools and the integers 0 and 1; no other integer, and nothing else that happens to be true."""
    call = CALLS[name]
    value = call.flags[parameter]
    expected = call.run()
    for other in (np.bool_(value), int(value), np.uint8(value), np.int64(value)):
        assert call.run(**{parameter: other}) == expected, repr(other)
    for other, error in ((2, ValueError), (-1, ValueError), (1 << 70, ValueError), (np.uint8(2), ValueError), ("no", TypeError),
                         ("", TypeError), (1.0, TypeError), (None, TypeError), (b"", TypeError), (object(), TypeError)):
        if other is None and parameter in call.optional:
            continue
        with pytest.raises(error) as caught:
            call.run(**{parameter: other})
        assert parameter in str(caught.value), repr(other)


# ---- bytes, arrays, and the rest -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("data", [5, np.uint8(5), 1.5, None, "text", [1, 2], np.ma.masked_array(np.zeros(8, np.uint8), True)])
@pytest.mark.parametrize("name", ["GuestMemory.write", "Vm.write_guest_physical", "Vm.host_write"])
def test_what_are_no_bytes(name, data):
    """An integer is no number of zeros; nothing was written."""
    call = CALLS[name]
    owner, function = call.make()
    before = call.state(owner)
    with pytest.raises((TypeError, ValueError), match="^data: want "):
        function(16, data)
    assert call.state(owner) == before


@pytest.mark.parametrize("data", [
    b"12345678", bytearray(b"12345678"), memoryview(b"12345678"), np.frombuffer(b"12345678", np.uint64),
    np.frombuffer(b"12345678", np.uint8).reshape(2, 4)])
@pytest.mark.parametrize("name", ["GuestMemory.write", "Vm.write_guest_physical", "Vm.host_write"])
def test_bytes_of_any_kind(name, data):
    owner, function = CALLS[name].make()
    function(16, data)
    assert (owner if isinstance(owner, GuestMemory) else owner.mem).read(16, 8) == b"12345678"


@pytest.mark.parametrize("data", [b"", np.zeros((0, 4)), bytearray()])
@pytest.mark.parametrize("name", ["GuestMemory.write", "Vm.write_guest_physical", "Vm.host_write"])
def test_no_bytes_at_all(name, data):
    """Nothing happens, whatever the place."""
    owner, function = CALLS[name].make()
    before = CALLS[name].state(owner)
    assert function(TOP - 1, data) is None
    assert CALLS[name].state(owner) == before
    assert memory().read(TOP - 1, 0) == b""


def test_bytes_with_gaps_between_them():
    with pytest.raises(ValueError, match="data: want a C-contiguous buffer"):
        memory().write(0, np.arange(8, dtype=np.uint8)[::2])


def masked(values):
    return np.ma.masked_array(values, mask=True)


MASKED = {
    "gva": lambda a: walk().translate(a(GVAS)), "access": lambda a: walk().translate(GVAS, a(np.zeros(4, np.uint8))),
    "ctx": lambda a: walk().translate(GVAS, regs=[Regs(1, 0, 0, 0)], ctx=a(np.zeros(4, np.uint32))),
    "out.gpa": lambda a: walk().translate(GVAS, fields=("gpa",), out=Translation(gpa=a(GVAS.copy()))),
    "gva ": lambda a: walk().translate_span(a(GVAS), 8), "size": lambda a: walk().translate_span(GVAS, a(np.ones(4, np.uint8))),
    "gva  ": lambda a: paging_off().access(a(GVAS)), "access ": lambda a: paging_off().access(GVAS, a(np.zeros(4, np.uint8))),
    "out.gpa ": lambda a: paging_off().access(GVAS, out=with_column("gpa", a(GVAS.copy()))),
    "gpas": lambda a: GuestMemory.from_pages(a(np.zeros(1, np.uint64)), np.zeros((1, 512), np.uint64)),
    "pages": lambda a: GuestMemory.from_pages([0], a(np.zeros((1, 512), np.uint64))),
    "size_or_buffer": lambda a: GuestMemory(a(np.zeros(512, np.uint64))),
    "pte_access": lambda a: walk_format().is_fault(a(np.zeros(2, np.uint8)), 0),
    "access  ": lambda a: walk_format().is_fault(0, a(np.zeros(2, np.uint8))),
    "pte": lambda a: walk_format().is_rsvd_bits_set(a(np.zeros(2, np.uint64)), 1),
    "level": lambda a: walk_format().is_rsvd_bits_set(0, a(np.ones(2, np.uint8))),
    "pkey": lambda a: walk().permission_fault(15, a(np.zeros(2, np.uint8)), 0),
    "tdp": lambda a: PageFormat.permission_bitmask(tdp=a(np.zeros(2, bool))),
    "cr0": lambda a: kvmmu.calc_cpu_roles(a(np.zeros(2, np.uint64)), 0, 0),
    "pdptrs": lambda a: Regs(1, 0, 0, 0, pdptrs=a(np.zeros(4, np.uint64))),
    "spte": lambda a: spte_format().access(a(BITS)), "gfn": lambda a: spte_format().make_mmio_sptes(a(BITS), 7, 1),
}


def with_column(name, column):
    out = Accesses.empty(4)
    setattr(out, name, column)
    return out


@pytest.mark.parametrize("name", MASKED)
def test_masked_arrays(name):
    """What is behind a mask is nobody's value. Without the mask the same call is right."""
    MASKED[name](np.asarray)
    with pytest.raises(ValueError, match=f"^{name.strip()}: want an array without a mask"):
        MASKED[name](masked)


def test_a_subclass_of_ndarray_is_an_array(tmp_path):
    """numpy.memmap, for one."""
    GVAS.tofile(tmp_path / "gvas")
    mapped = np.memmap(tmp_path / "gvas", np.uint64, "r")
    assert walk().translate(mapped).gpa.tolist() == GVAS.tolist()


def test_pdptrs():
    """Four words in any sequence or array; bytes and text are none."""
    regs = Regs(1, 0, 0, 0, pdptrs=(1, 2, 3, 4))
    for given in ([1, 2, 3, 4], np.arange(1, 5), np.arange(1, 5, dtype=np.uint8), iter((1, 2, 3, 4)), [Acc(1), Index(2), 3, 4]):
        assert Regs(1, 0, 0, 0, pdptrs=given) == regs
    for given in (b"1234", "1234", 5, [1, 2, 3, True], [1, 2, 3, 4.0], memoryview(b"1234"), [1, 2, 3, None]):
        with pytest.raises(TypeError, match="pdptrs"):
            Regs(1, 0, 0, 0, pdptrs=given)
        with pytest.raises(TypeError, match="pdptrs"):
            RegisterSet(1, 0, 0, 0, pdptrs=given)
    for given in ([1, 2, 3], [1, 2, 3, -1], [1, 2, 3, 1 << 64], []):
        with pytest.raises(ValueError, match="pdptrs"):
            Regs(1, 0, 0, 0, pdptrs=given)
        with pytest.raises(ValueError, match="pdptrs"):
            RegisterSet(1, 0, 0, 0, pdptrs=given)


def test_values_of_a_dataclass_are_plain_integers():
    """NumPy's would compare and hash alike, and overflow in arithmetic."""
    for made in (Regs(np.uint8(1), np.uint16(2), np.int32(3), np.uint64(4)), Ept(np.uint8(EPTP)), Npt(np.uint8(64)),
                 CpuModel(maxphyaddr=np.uint8(48)), Host(maxphyaddr=np.uint8(48)), Pml(np.uint64(PAGE), np.uint16(3)),
                 Intercepts(np.uint32(1 << 14)), RegisterSet(np.uint8(1), 0, 0, 0), Stage(ncr3=np.uint64(PAGE))):
        for field in fields(made):
            assert not isinstance(getattr(made, field.name), np.generic), field.name
        assert replace(made) == made


def test_an_address_of_numpy_in_a_fault():
    """The fault of a scalar call has a plain address, and a store over the edge of a page does not overflow."""
    vcpu = vcpu_over(PageTables("4l"))
    with pytest.raises(PageFault) as caught:
        vcpu.access(np.uint64(0x1234), np.uint8(2))
    assert type(caught.value.address) is int
    assert caught.value.access is Access.WRITE
    vcpu = paging_off()
    vcpu.store(np.uint16(PAGE - 2), b"1234")
    assert vcpu.mem.read(PAGE - 2, 4) == b"1234" == vcpu.read_guest(np.int16(PAGE - 2), np.uint8(4))


def test_addresses_go_round():
    """An access over 2**64 ends at address 0; without paging that is over 2**32."""
    vcpu = paging_off()
    vcpu.store(0, b"zero")
    assert vcpu.read_guest(U64 - 1, 6) == bytes(2) + b"zero"


def test_rip_of_an_instruction():
    vcpu = paging_off()
    vcpu.rip = np.uint32(5)
    assert vcpu.access(0).gpa == 0
    for rip, error in ((-1, ValueError), (1 << 64, ValueError), (True, TypeError), (0.5, TypeError), (None, TypeError)):
        vcpu.rip = rip
        with pytest.raises(error, match="rip"):
            vcpu.access(0)


def test_read_of_more_than_there_is_memory_for():
    with pytest.raises(MemoryError, match="n: .*0x4000000000000"):
        memory().read(0, 1 << 50)


def test_faults_made_by_hand():
    """What a caller put into a fault is checked when it is delivered."""
    for fault, name in ((PageFault("", address=0.5), "address"), (PageFault("", address=1, error_code=True), "error_code")):
        with pytest.raises(TypeError, match=f"fault.{name}"):
            kvmmu.deliver_page_fault(fault, None, False)
    for fault, name in ((EptViolation("", fault_gpa="0"), "fault_gpa"), (EptViolation(
            "", fault_gpa=0, exit_qualification=1.0), "exit_qualification")):
        with pytest.raises(TypeError, match=f"fault.{name}"):
            kvmmu.deliver_nested_fault(fault, Ept(EPTP))
    with pytest.raises(TypeError, match="from_hardware"):
        paging_off().inject(PageFault("", address=1), "2")


@pytest.mark.parametrize(("call", "named"), [
    (lambda: CpuModel(vendor=5), "vendor: want 'intel' or 'amd', got 5"),
    (lambda: Host(tdp=["ept"]), "tdp: want 'ept', 'npt' or None, got list"),
    (lambda: Host(max_page=1), "max_page: want '4k', '2m' or '1g', got 1"),
    (lambda: machine().invalidate(0, PAGE, 3), "how: want 'unmap', 'move' or 'protect', got 3"),
    (lambda: machine().set_backing(0, PAGE, ["4k"]), "level: want '4k', '2m' or '1g', got list"),
    (lambda: paging_off().invalidate_addr(None, 0), "walk: want"), (lambda: paging_off().translate_gpa(None, 0), "walk: want"),
    (lambda: Ept(EPTP, pml=5), "pml: want"), (lambda: Npt(0, intercepts=5), "intercepts: want"),
    (lambda: Tracepoints("nope"), "names: 'nope' is no tracepoint"), (lambda: Tracepoints(["kvm_mmu_sync_page"]), "names: "),
    (lambda: kvmmu.replay([], paging_off(), progress=3), "progress: want a bool or a callable, got int"),
    (lambda: kvmmu.deliver_page_fault(PageFault("", address=0), 5, False), "stage: want"),
    (lambda: kvmmu.deliver_nested_fault(EptViolation("", fault_gpa=0), 5), "stage: want"),
    (lambda: run_scenario({}), "scenario: 'slots' is missing; want slots, regs, mem, watch, ops, got none"),
    (lambda: run_scenario(5), "scenario: want a dict, got int")])
def test_other_arguments_are_named(call, named):
    with pytest.raises((TypeError, ValueError), match=named):
        call()


def test_traces(tmp_path):
    """Counts of the trace writer and reader."""
    pytest.importorskip("pyarrow", reason="PyArrow is not installed (extra arrow)")
    out = tmp_path / "out.parquet"
    for repeat, error in ((0, ValueError), (-1, ValueError), (1 << 70, ValueError), (True, TypeError), (1.0, TypeError),
                          ("1", TypeError), (None, TypeError)):
        with pytest.raises(error, match="repeat"):
            convert(recorded(), out, repeat=repeat)
    assert not out.exists()
    with kvmmu.traces.ParquetWriter(out, Header(registers=(RegisterSet(np.uint8(1), 0, 0, 0),))) as writer:
        writer.write(op=np.zeros(3, np.uint8), addr=GVAS[:3], access=np.zeros(3, np.uint8))
    for decoders, error in ((0, ValueError), (1025, ValueError), (1 << 70, ValueError), (True, TypeError), (1.0, TypeError)):
        with pytest.raises(error, match="decoders"):
            ParquetTrace(out, decoders=decoders)
    with pytest.raises(TypeError, match="lean"):
        ParquetTrace(out, lean="no")
    assert ParquetTrace(out, decoders=np.uint8(2), lean=np.True_).rows == 3


def test_numbers_in_the_text_of_a_header():
    """In JSON true is no number and 1 is no flag."""
    text = Header(registers=(RegisterSet(1, 0, 0, 0, second_stage=Stage(eptp=EPTP, mbec=True)),), rows=3).to_json()
    assert Header.from_json(text).rows == 3
    for good, bad in (('"cr0": "0x1"', '"cr0": true'), ('"cr0": "0x1"', '"cr0": 1.5'), ('"mbec": true', '"mbec": 1'),
                      ('"rows": 3', '"rows": true'), ('"rows": 3', '"rows": "3"'), ('"eptp": "0x1e"', '"eptp": true')):
        assert good in text
        with pytest.raises(kvmmu.traces.TraceError, match="header"):
            Header.from_json(text.replace(good, bad))


def test_objects_of_another_kind():
    """The message names the argument and what is allowed."""
    vcpu = paging_off()
    gva = np.zeros(3, np.uint64)
    stats = TlbHierarchy.preset("skylake").stats()
    record = vcpu.gva_walk.walk_record(0)
    for call, words in [
            (lambda: kvmmu.PageTables.for_addresses("x", gva), "mem: want a GuestMemory or None, got str"),
            (lambda: vcpu.access(gva, out=gva), "out: want an Accesses or None, got ndarray"),
            (lambda: kvmmu.regs_from_vmcb(None, PAGE), "mem: want a GuestMemory or another object with is_backed() and read(), "
                                                       "got NoneType"),
            (lambda: kvmmu.npt_from_vmcb(b"", PAGE, cr4=0, efer=0), "mem: want a GuestMemory or another object with"),
            (lambda: kvmmu.ept_from_vmcs12(5, PAGE), "mem: want a GuestMemory or another object with"),
            (lambda: kvmmu.plot_walk(5), "record: want a WalkRecord, got int"),
            (lambda: kvmmu.plot_walk(record, 5), "path: want a path or None, got int"),
            (lambda: kvmmu.plot_walk(record, None, 5), "ax: want an Axes of matplotlib or None, got int"),
            (lambda: plot_mappings([]), "mappings: want a Mappings, got list"),
            (lambda: stats.under_host(None, gva), "host: want a TlbStats, got NoneType"),
            (lambda: stats.under_host(stats, None), "by_refs: want an ndarray of uint64, got NoneType"),
            (lambda: kvmmu.Pager.for_addresses(None, gva), "for_addresses: a Pager maps pages as they are touched; want ")]:
        with pytest.raises(TypeError, match=f"^{re.escape(words)}"):
            call()


# ---- the checks themselves -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("values", [[1, 2], (1, 2), np.array([1, 2]), np.array([1, 2], np.uint8), [np.uint64(1), 2], [Acc(1), 2]])
def test_arrays_of_integers(values):
    array = check_integers("name", values, 0, 9, np.uint32)
    assert array.tolist() == [1, 2]
    assert array.dtype == np.uint32


@pytest.mark.parametrize(("values", "error"), [
    ([1, 2.0], TypeError), ([1, "2"], TypeError), ([1, None], TypeError), ([True, False], TypeError), ("12", TypeError),
    (b"12", TypeError), ({1, 2}, TypeError), ([1, -1], ValueError), ([1, 10], ValueError), ([1, 1 << 64], ValueError),
    ([1, 1 << 70], ValueError), ([-1, 1 << 63], ValueError), (np.array([1.0]), ValueError), (np.array([True]), ValueError),
    (np.array([1, 10]), ValueError), (np.array([-1]), ValueError)])
def test_what_are_no_arrays_of_integers(values, error):
    with pytest.raises(error, match="^name"):
        check_integers("name", values, 0, 9)


def test_wide_integers_in_a_list():
    """NumPy makes floats of them."""
    assert check_integers("name", [[U64, 0], [1, 1 << 63]], 0, U64).tolist() == [[U64, 0], [1, 1 << 63]]


def test_bytes_are_not_copied():
    data = bytearray(8)
    check_bytes("name", data)[3] = 7
    assert data[3] == 7


# ---- paths -------------------------------------------------------------------------------------------------------------

OPENERS = {
    "open_trace": ("path", "a trace", open_trace), "describe_trace": ("path", "a trace", describe_trace),
    "ParquetTrace": ("path", "a trace", ParquetTrace), "open_source": ("path", "a recording or trace", open_source),
    "Recording": ("path", "a recording", Recording.open), "open_image": ("path", "an image", open_image),
    "replay": ("trace", "a recording or trace", kvmmu.replay),
    "compare": ("trace", "a recording or trace", lambda path: kvmmu.compare(path, [kvmmu.Design(tlb="zen3")])),
    "compare elsewhere": ("trace", "a recording or trace",
                          lambda path: kvmmu.compare(path, [kvmmu.Design(tlb="zen3")], scheduler="threads"))}


@pytest.mark.parametrize("opener", OPENERS)
def test_paths_of_nothing_and_of_bytes(opener, tmp_path, monkeypatch):
    """An empty name is not the current folder, and bytes are no path and no chunks."""
    monkeypatch.chdir(tmp_path)
    if opener == "ParquetTrace" or "elsewhere" in opener:
        pytest.importorskip("pyarrow" if opener == "ParquetTrace" else "dask")
    argument, what, call = OPENERS[opener]
    with pytest.raises(FileNotFoundError, match=f"^{argument}: no name of {what} is given$"):
        call("")
    for value in (b"abc", b""):
        with pytest.raises(TypeError, match=rf"^{argument}: want a path as str or path-like, got bytes; os\.fsdecode\(\) makes"):
            call(value)
    assert not is_image("")
