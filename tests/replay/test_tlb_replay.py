# SPDX-License-Identifier: Apache-2.0
"""Replays through TLB hierarchies: every counter is that of the model in plain Python, row by row."""

import json
from collections import Counter

import numpy as np
import pytest
from paths import DATA
from tlb_guests import LEVELS, PSC, VCPUS, Guest, some_rows
from tlb_model import PAGES, Model

import kvmmu
from kvmmu import Access, Pager, PageTables, TlbHierarchy, TlbLevel
from kvmmu.arch._bits import CR3_NOFLUSH, Cr4
from kvmmu.cli.command import main
from kvmmu.replay.trace_replay import replay_trace
from kvmmu.tlb.counters import KINDS, MISS_CLASSES
from kvmmu.tlb.processor import ProcessorTlbs, TlbOfHost
from kvmmu.traces import Header, Op, Recording, RegisterSet, Trace
from kvmmu.traces.conversion import recording_chunks, recording_header


def run_model(guest, rows):
    """The models of both vCPUs behind a trace."""
    models = [Model(LEVELS, PSC) for _ in range(VCPUS)]
    cr4 = [guest.regs[0].cr4] * VCPUS
    pages = {gva: (page, is_global) for gva, page, is_global in guest.pages}
    for row in rows:
        model, vcpu = models[row["vcpu"]], row["vcpu"]
        if row["op"] < Op.MOV_CR3:
            kind = ("load", "store", "fetch")[row["op"]]
            page, is_global = pages[row["page"]]
            if kind == "fetch" and cr4[vcpu] & Cr4.SMEP and not row["access"] & Access.USER:
                page = None                                 # the pages are the user's
            model.access(row["addr"], kind, bool(row["access"] & Access.USER), page, is_global and bool(cr4[vcpu] & Cr4.PGE),
                         row["ip"])
        elif row["op"] == Op.MOV_CR3:
            pcid = row["value"] & 0xFFF if cr4[vcpu] & Cr4.PCIDE else 0
            model.mov_cr3(pcid, bool(cr4[vcpu] & Cr4.PCIDE and row["value"] & CR3_NOFLUSH))
        elif row["op"] == Op.MOV_CR4:
            before, cr4[vcpu] = cr4[vcpu], row["value"]
            if (before ^ row["value"]) & Cr4.PGE:
                model.flush_space(0)
            elif row["value"] & ~before & Cr4.SMEP:
                model.mov_cr3(model.pcid, False)
        elif row["op"] == Op.INVLPG:
            model.invlpg(row["addr"])
        elif row["op"] == Op.INVPCID:
            model.invpcid(row["value"] & 15, row["value"] >> 4, row["addr"])
        elif row["op"] == Op.PAGE_FAULT:
            model.page_fault(row["addr"])
        elif row["op"] == Op.HOST_INVALIDATE:
            for one in models:
                one.flush()
    return models


def sum_of(models, name):
    return sum((getattr(model, name) for model in models), Counter())


@pytest.mark.parametrize("seed", range(12))
def test_events_and_vcpus(seed):
    """Registers, PCIDs, global pages, invalidations, page sizes as walked, rows of two vCPUs."""
    guest = Guest(seed)
    rows = some_rows(guest, 1500)
    report = kvmmu.replay(guest.trace(rows), tlb=TlbHierarchy(LEVELS, psc=PSC, details=True))
    models = run_model(guest, rows)
    stats = report.tlb
    for number in range(len(LEVELS)):
        for k, kind in enumerate(KINDS):
            for user in (False, True):
                for p, page in enumerate(PAGES):
                    assert sum_of(models, "hits")[number, kind, user, page] == stats.hits[number, k, int(user), p]
                    assert sum_of(models, "walks")[kind, user, page] == stats.walks[k, int(user), p]
        assert [sum_of(models, "misses")[number, why] for why in MISS_CLASSES] == stats.details.misses[number].tolist()
    assert sum(model.refs for model in models) == stats.guest_refs
    assert sum(model.cached_refs for model in models) == stats.cached_refs
    assert sum_of(models, "psc_hits") == Counter(stats.psc_hits)
    assert sum(model.unmapped for model in models) == stats.unmapped > 0
    assert sum_of(models, "ips") == Counter(dict(stats.details.ips.tolist()))
    shifts = {"4k": 12, "2m": 21}
    wanted = Counter({(number << shifts[page], PAGES.index(page)): walks
                      for (number, page), walks in sum_of(models, "pages").items()})
    assert wanted == Counter({(gva, size): walks for gva, size, walks in stats.details.pages.tolist()})
    assert stats.details.pages[:, 2].tolist() == sorted(wanted.values(), reverse=True)


@pytest.mark.parametrize("pager", [None, "thp", "4k"])
def test_rows_that_cross_a_page(pager):
    """An access that reaches into the next page asks for both, in its place among the others."""
    rng = np.random.default_rng(7)
    addr = rng.integers(0, 40, 30_000, np.uint64) << np.uint64(12) | rng.choice(np.array([0, 8, 4090, 4093], np.uint64), 30_000)
    rows = {"op": np.zeros(30_000, np.uint8), "addr": addr, "access": np.zeros(30_000, np.uint8),
            "size": np.full(30_000, 8, np.uint8)}
    trace = Trace(Header(registers=()), [rows])
    level = TlbLevel("only", 4, 2)
    made = Pager(page=pager or "4k", thp_share=1.0)
    stats = kvmmu.replay(trace, pager=made, tlb=TlbHierarchy([level], psc=PSC, details=True)).tlb
    model = Model([level], PSC)
    for one in addr.tolist():
        model.access(one, "load", False, "4k", False)
        if one % 4096 > 4088:
            model.access((one | 4095) + 1, "load", False, "4k", False)
    assert (int(stats.walks.sum()), int(stats.hits.sum())) == (sum(model.walks.values()), sum(model.hits.values()))
    assert [model.misses[0, why] for why in MISS_CLASSES] == stats.details.misses[0].tolist()
    assert stats.guest_refs == model.refs


@pytest.mark.parametrize("name", ["l4", "ndyn", "pae"])
def test_recordings(name):
    """A recording through a hierarchy: the report of one without, and as many accesses asked as there are."""
    recording = Recording.open(DATA / "linux" / name)
    plain, report = kvmmu.replay(recording), kvmmu.replay(recording, tlb="skylake")
    stats = report.tlb
    assert (report.verified, report.mismatches) == (plain.verified, plain.mismatches)
    assert stats.accesses + stats.unmapped == report.accesses
    assert stats.accesses == int(stats.hits.sum()) + int(stats.walks.sum())
    assert stats.details.walks_by_refs.sum() == stats.walks.sum()
    assert int((stats.details.walks_by_refs * np.arange(6)).sum()) == stats.guest_refs


# ---- two stages --------------------------------------------------------------------------------------------------------

def test_host_translations():
    """Each entry that a walk reads, and the address of the access, are translated by the host: by hand for two pages."""
    tables = PageTables.for_addresses(None, np.array([0, 4096], np.uint64))
    vcpu = kvmmu.Vcpu(tables.mem)
    vcpu.set_regs(tables.regs())
    chunk = {"op": np.zeros(4, np.uint8), "addr": np.array([0, 4096, 0, 4096], np.uint64), "access": np.zeros(4, np.uint8)}
    made = []

    def tlbs(vcpus):
        none, cached = TlbHierarchy([TlbLevel("one", 1, 1)]), TlbHierarchy(
            [TlbLevel("one", 1, 1)], psc={2: TlbLevel("PDE", 1, 1)}, nested=TlbHierarchy([TlbLevel("nTLB", 1, 8)]))
        designs = [TlbOfHost(none, "4k"), TlbOfHost(none, "2m"), TlbOfHost(cached, "4k"), TlbOfHost(none)]
        made.append(ProcessorTlbs(designs, vcpus))
        return made[0]

    header = Header(registers=(RegisterSet(cr0=vcpu.regs.cr0, cr3=vcpu.regs.cr3, cr4=vcpu.regs.cr4, efer=vcpu.regs.efer),))
    replay_trace(Trace(header, [chunk]), vcpu, tlbs=tlbs)
    plain, large, cached, native = (made[0].stats(i) for i in range(4))
    assert [int(stats.walks.sum()) for stats in (plain, large, cached, native)] == [4] * 4
    assert (plain.guest_refs, plain.host_refs, plain.walks_by_all_refs[24]) == (16, 4 * 5 * 4, 4)     # 4-on-4: 24 entries
    assert (large.guest_refs, large.host_refs, large.walks_by_all_refs[19]) == (16, 4 * 5 * 3, 4)
    # The first walk translates 4 tables and the page; the others the last table, which the nested TLB has, and a page; both
    # pages have been there from the second walk on.
    assert (cached.guest_refs, cached.cached_refs, cached.host_refs) == (7, 9, (5 + 1) * 4)
    assert (cached.host_walks, cached.host_hits) == (6, {"nTLB": 1 + 2 + 2})
    assert (native.guest_refs, native.host_refs, native.walks_by_all_refs) == (16, 0, None)


# ---- arguments, and the command ----------------------------------------------------------------------------------------

def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="tlb: want a path that ends in .toml, or one of .*skylake.*; got 'atom'"):
        kvmmu.replay("bundled", tlb="atom")
    with pytest.raises(TypeError, match="tlb: want a TlbHierarchy, a path"):
        kvmmu.replay("bundled", tlb=5)
    file = tmp_path / "one.toml"
    file.write_text('[[level]]\nname = "L1"\nsets = 4\nways = 2\n[nested]\n[[nested.level]]\nname = "n"\nsets = 1\nways = 16\n'
                    '[nested.psc.2]\nsets = 1\nways = 4\n')
    tlb = TlbHierarchy.from_toml(file)
    assert [level.name for level in tlb.nested.levels] == ["n"]
    assert tlb.nested.psc[2].ways == 4
    file.write_text("nested = 3\n")
    with pytest.raises(ValueError, match="nested: want tables"):
        TlbHierarchy.from_toml(file)
    with pytest.raises(TypeError, match="nested: want a TlbHierarchy or None, got int"):
        TlbHierarchy([], nested=3)


def test_command(tmp_path, capsys):
    """`--tlb` adds tables, and an entry of the JSON."""
    file = tmp_path / "one.csv"
    file.write_text("addr,op,size,ip\n" + "".join(f"{4096 * (i % 5):#x},load,4,{0x400000 + i % 2:#x}\n" for i in range(50)))
    toml = tmp_path / "one.toml"
    toml.write_text('[[level]]\nname = "L1"\nsets = 1\nways = 4\n')
    assert main(["replay", str(file), "--tlb", str(toml), "--json"]) == 0
    tlb = json.loads(capsys.readouterr().out)["tlb"]
    assert [(level["name"], level["hits"]) for level in tlb["levels"]] == [("L1", 0)]
    assert (tlb["walks"], tlb["guest_refs"], tlb["top_ips"]) == (
        50, 200, [{"ip": 0x400000, "walks": 25}, {"ip": 0x400001, "walks": 25}])
    assert tlb["levels"][0]["misses"] == {"compulsory": 5, "capacity": 45, "conflict": 0, "removed": 0}
    assert tlb["top_pages"][0] == {"gva": 0, "page": "4k", "walks": 10}
    assert main(["replay", str(file), "--tlb", str(toml)]) == 0
    text = capsys.readouterr().out
    for part in ("TLB: where accesses hit", "Misses of each level", "Pages with the most page walks", "0x400001"):
        assert part in text
    assert main(["replay", str(file), "--json"]) == 0
    assert "tlb" not in json.loads(capsys.readouterr().out)
    assert main(["replay", str(file), "--tlb", "atom"]) == 2
    assert "tlb: want a path that ends in .toml" in capsys.readouterr().err


def test_recordings_as_traces():
    """The rows of a recording, replayed as a trace through the same hierarchy, give the same counters."""
    recording = Recording.open(DATA / "linux" / "l5")
    once = kvmmu.replay(recording, tlb="zen2").tlb.to_dict()
    assert once == kvmmu.replay(Trace(recording_header(recording), recording_chunks(recording)), tlb="zen2").tlb.to_dict()
