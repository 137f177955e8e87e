# SPDX-License-Identifier: Apache-2.0
"""The PDPTE registers of PAE paging: when they are loaded, what is checked then, and that they are stale until then.

Source: SDM vol. 3, "PDPTE Registers".
"""

from dataclasses import replace

import numpy as np
import pytest
from guest_modes import CD, NW, NXE, PAE, PAE_MODE, PAGES, PDS, PE, PG, PGE, PKE, PSE, ROOT, SMAP, SMEP, WP, machine, refused
from paths import DATA

import kvmmu
from kvmmu import Access
from kvmmu.traces import Recording
from kvmmu.traces.recording import Events, Writes

CLIPS = DATA / "linux"


def moved_pdpt():
    """A PAE vCPU whose PDPT names the second directory in memory, while its registers still name the first."""
    vcpu = machine(PAE_MODE)
    vcpu.mem.write_u64(ROOT, PDS[1] | 1)
    assert vcpu.gva_walk.gva_to_gpa(0x1234) == PAGES[0] + 0x1234, "stale until reloaded"
    return vcpu


CR0_RELOADS, CR4_RELOADS = {NW | CD, CD}, {PGE, PSE, SMEP}


@pytest.mark.parametrize(("n", "bits"), [
    *((0, bits) for bits in (CD, NW | CD, WP, 1 << 1, 1 << 3, 1 << 5, 1 << 18)),
    *((4, bits) for bits in (PGE, PSE, SMEP, SMAP, PKE, 1 << 0, 1 << 2, 1 << 9, 1 << 10, 1 << 11, 1 << 16, 1 << 18))])
def test_only_the_named_bits_reload_pdptes(n, bits):
    """CR0.CD, NW, PG and CR4.PAE, PGE, PSE, SMEP reload when they change, in both directions; no other bit does."""
    vcpu = moved_pdpt()
    old = vcpu.regs.cr0 if n == 0 else vcpu.regs.cr4
    page = PAGES[bits in (CR0_RELOADS if n == 0 else CR4_RELOADS)]
    vcpu.mov_cr(n, old)
    assert vcpu.gva_walk.gva_to_gpa(0x1234) == PAGES[0] + 0x1234, "the same value changes nothing"
    vcpu.mov_cr(n, old | bits)
    assert vcpu.gva_walk.gva_to_gpa(0x1234, Access.AC) == page + 0x1234
    vcpu.set_regs(pdptrs=(PDS[0] | 1, 0, 0, 0))
    vcpu.mov_cr(n, old)
    assert vcpu.gva_walk.gva_to_gpa(0x1234, Access.AC) == page + 0x1234


@pytest.mark.parametrize("reload", [
    lambda v: v.mov_cr(3, ROOT), lambda v: v.set_regs(cr3=ROOT), lambda v: (v.mov_cr(0, PE), v.mov_cr(0, PE | PG)),
    lambda v: (v.mov_cr(4, 0), v.mov_cr(4, PAE))], ids=["mov-cr3", "set_regs", "pg-off-on", "pae-off-on"])
def test_pdptes_are_reloaded(reload):
    vcpu = moved_pdpt()
    reload(vcpu)
    assert (vcpu.gva_walk.gva_to_gpa(0x1234), vcpu.pdptrs[0], vcpu.gva_walk.get_pdptr(0)) == (
        PAGES[1] + 0x1234, PDS[1] | 1, PDS[1] | 1)


def test_efer_and_pkru_do_not_reload_pdptes():
    vcpu = moved_pdpt()
    vcpu.wrmsr_efer(NXE)
    vcpu.mov_cr(4, PAE | PKE)
    vcpu.wrpkru(5)
    assert vcpu.gva_walk.gva_to_gpa(0) == PAGES[0]


@pytest.mark.parametrize("maxphyaddr", [36, 40, 52])
@pytest.mark.parametrize("index", range(4))
def test_pdpte_bits_checked_at_load(index, maxphyaddr):
    """Bits 1, 2, 5 to 8 and MAXPHYADDR to 63 of a present PDPTE, used or not; none of one that is not present."""
    vcpu = machine(PAE_MODE, maxphyaddr=maxphyaddr)
    reserved = {1, 2, 5, 6, 7, 8, *range(maxphyaddr, 64)}
    for bit in range(1, 64):
        vcpu.mem.write_u64(ROOT + 8 * index, 1 << bit)
        vcpu.mov_cr(3, ROOT)
        vcpu.mem.write_u64(ROOT + 8 * index, 1 << bit | 1)
        if bit in reserved:
            unloaded = replace(vcpu.regs, pdptrs=None)
            for call in (lambda: vcpu.mov_cr(3, ROOT), lambda: vcpu.mov_cr(0, PE | PG | CD), lambda: vcpu.mov_cr(4, PAE | PGE),
                         lambda: vcpu.set_regs(cr3=ROOT, pkru=9), lambda regs=unloaded: vcpu.gva_walk.prepare([regs])):
                error = refused(vcpu, call)
                assert (error.rule, f"PDPTE {index} is {1 << bit | 1:#x}" in str(error)) == ("pdpte-reserved", True)
        else:
            vcpu.mov_cr(3, ROOT)
            assert vcpu.pdptrs[index] == 1 << bit | 1


def test_the_pdpt_is_32_bytes_anywhere_in_a_page():
    """CR3[31:5] is its address, CR3[4:0] is ignored; a PDPT in a hole is #GP."""
    vcpu = machine(PAE_MODE)
    vcpu.mem.write_u64(0x4FE0 + 24, PDS[1] | 1)
    vcpu.mov_cr(3, 0x4FFF)
    assert vcpu.pdptrs == (0, 0, 0, PDS[1] | 1)
    assert vcpu.gva_walk.gva_to_gpa(0xC0000042) == PAGES[1] + 0x42
    assert refused(vcpu, vcpu.mov_cr, 3, 0x80000000).rule == "pdpt-in-hole"


def test_given_pdptrs_are_checked_and_not_kept_outside_pae():
    vcpu = machine(PAE_MODE)
    assert refused(vcpu, vcpu.set_regs, pdptrs=(0, 0, 0, 3)).rule == "pdpte-reserved"
    vcpu.set_regs(pdptrs=(0, PDS[1] | 1, 0, 0))
    assert vcpu.gva_walk.gva_to_gpa(0x40000000) == PAGES[1]
    vcpu.mov_cr(0, PE)
    assert vcpu.pdptrs is None
    vcpu.set_regs(pdptrs=(1, 0, 0, 0))
    assert vcpu.pdptrs is None, "they are those of PAE paging"


@pytest.mark.parametrize("lie", [False, True])
def test_replay_takes_pdptes_at_cr3_loads_only(lie):
    """A PDPTE cleared in memory and restored before the next CR3 load never counts, even if the access that restores it
    is a mismatch by itself."""
    recording = Recording.open(CLIPS / "pae")
    load, cr3 = 5000, int(recording.ctx[0, 1])
    user = next(row for row in range(load - 1, 0, -1) if recording.priv[row] == 1)
    entry = (cr3 & 0xFFFFFFE0) + 8 * int(recording.columns(user, user + 1)["gva"][0] >> 30)
    offset = entry & 0xFFF
    page = recording.table_data[recording.table_pfn == entry >> 12][0]
    value = int.from_bytes(page[offset:offset + 8].tobytes(), "little")
    events = (np.append(column, column.dtype.type(new)) for column, new in zip(recording.events, (load, 1, cr3, 0), strict=True))
    changed = {"events": Events(*events), "writes": Writes(*(np.array(column, np.uint64) for column in (
        [10, load - 1], [entry, entry], [0, value])))}
    if lie:
        pidx, last = recording.pidx.astype(np.uint32), recording.pages_gva.size
        changed |= {name: np.append(getattr(recording, name), getattr(recording, name)[pidx[load - 1]])
                    for name in ("pages_gva", "pages_gpa", "pages_ctx", "pages_io")}
        changed["pages_gpa"][-1] ^= np.uint64(1 << 20)
        pidx[load - 1] = last
        changed["pidx"] = pidx
    report = kvmmu.replay(replace(recording, **changed))
    assert (report.mismatches, report.verified, report.table_writes) == (int(lie), len(recording) - lie, 2)
    assert [example.position for example in report.examples] == [load - 1] * lie
