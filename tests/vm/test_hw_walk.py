# SPDX-License-Identifier: Apache-2.0
"""The record of the processor's own walk is what an access comes to that its TLB does not know, and changes nothing."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
from driver_l2 import L2_CONFIGURATIONS, L2Driver
from driver_nested import NESTED_CONFIGURATIONS, NestedDriver
from driver_shadow import SHADOW_CONFIGURATIONS, ShadowDriver
from machine_driver import ACCESSES, CONFIGURATIONS, Driver
from machine_states import GVA, check_equal, machine, state

from kvmmu import Access, Host, Status, plot_walk

CASES = [(kind, name, value, mode) for kind, values in (
    (Driver, CONFIGURATIONS), (L2Driver, L2_CONFIGURATIONS), (ShadowDriver, SHADOW_CONFIGURATIONS),
    (NestedDriver, NESTED_CONFIGURATIONS)) for (name, value), mode in zip(values.items(), ("4l", "pae", "32") * 9, strict=False)]
CASES = [(kind, name, value, "4l" if "nested ept" in name or "five" in name else mode) for kind, name, value, mode in CASES]


@pytest.mark.parametrize(("kind", "name", "configuration", "mode"), CASES, ids=[f"{case[1]}-{case[3]}" for case in CASES])
def test_random_machines(kind, name, configuration, mode):
    driver = kind(configuration, mode, [7, zlib.crc32(name.encode())])
    ends = set()
    for _ in range(2):
        for _ in range(30):
            driver.step(audit=False)
        for gva in driver.gva:                              # what the TLB does not keep of them stays in the SPTEs
            driver.log.append("access")
            driver.access(gva)
        driver.vcpu.vm_enter()
        before = state(driver.vm)
        places = [(gva, int(driver.pick(ACCESSES))) for gva in driver.gva]
        records = [driver.vcpu.hw_walk_record(gva, access) for gva, access in places]
        check_equal(before, state(driver.vm))
        vcpu = driver.vcpu.clone()
        vm, snapshot = vcpu.vm, vcpu.vm.snapshot()
        for record, (gva, access) in zip(records, places, strict=True):
            vm.restore(snapshot)
            vcpu.tlb.flush()
            got = vcpu.access(np.array([gva], np.uint64), access)
            ends.add(record.status)
            of_guest = record.status == Status.PAGE_FAULT and driver.host.tdp is not None
            if record.status == Status.OK:
                assert (int(got.status[0]), int(got.hpa[0]), int(got.exits[0])) == (Status.OK, record.gpa, 0)
            elif of_guest or record.status == Status.NON_CANONICAL:
                assert (int(got.status[0]), int(got.error_code[0]), int(got.exits[0])) == (
                    record.status, record.error_code, 0)
            else:
                assert got.exits[0] > 0
    assert Status.OK in ends
    assert len(ends) > 1


@pytest.mark.parametrize("tdp", ["ept", "npt", None])
def test_what_it_tells(tdp):
    vm = machine(Host(tdp=tdp))
    vcpu, = vm.vcpus
    with pytest.raises(RuntimeError, match="no root of page tables now"):
        vcpu.hw_walk_record(int(GVA[3]))
    access = vcpu.access(int(GVA[3]))
    record = vcpu.hw_walk_record(int(GVA[3]) + 5)
    assert record.host
    assert record.gpa == access.hpa + 5
    assert record.to_dict()["host"] is True
    assert f"-> hpa {access.hpa + 5:#x} (4K page)" in str(record)
    assert "nGPA" not in str(record)
    if tdp is None:
        assert [step.level for step in record.steps] == [4, 3, 2, 1]
        assert record.steps[0].gpa & -4096 == vcpu.mmu.root_hpa
        assert vcpu.hw_walk_record(int(GVA[3]), Access.WRITE).outcome() == "-> #PF 0x3 (P W): the page is read-only"
    else:
        assert [step.gpa for step in record.steps] == [step.gpa for step in vcpu.gva_walk.walk_record(int(GVA[3])).steps]
        assert record.ngpa == access.gpa + 5
        assert all(step.nested.host and step.nested.steps[0].gpa & -4096 == vcpu.mmu.root_hpa for step in record.steps)
        assert record.final.steps[0].ept == (tdp == "ept")
        assert "GPA 0x" in str(record)
        vm.invalidate(access.gpa & -0x200000, 0x200000)
        exit_ = vcpu.hw_walk_record(int(GVA[3]))
        assert exit_.status == (Status.EPT_VIOLATION if tdp == "ept" else Status.NESTED_PAGE_FAULT)
    vm.zap_all()
    assert vcpu.hw_walk_record(int(GVA[3])).status != Status.OK
    vcpu.vm_enter()                                         # and leaves the root that was zapped
    assert vcpu.hw_walk_record(int(GVA[3])).status != Status.OK
    for wrong in (None, 1.5, "x"):
        with pytest.raises((TypeError, ValueError), match="gva"):
            vcpu.hw_walk_record(wrong)


@pytest.mark.parametrize("tdp", ["ept", None])
def test_the_figure_has_the_words_of_the_host(tdp):
    pytest.importorskip("matplotlib")
    vm = machine(Host(tdp=tdp))
    vcpu, = vm.vcpus
    vcpu.access(int(GVA[0]))
    record = vcpu.hw_walk_record(int(GVA[0]))
    texts = [text.get_text() for text in plot_walk(record).axes[0].texts]
    assert any(text == f"hpa {record.gpa:#x}" for text in texts)
    assert not any("nGPA" in text for text in texts)
    assert any("GPA\N{RIGHTWARDS ARROW}HPA" in text for text in texts) == (tdp is not None)
    guest = replace(record, host=False)
    assert any(text.get_text() == f"gpa {record.gpa:#x}" for text in plot_walk(guest).axes[0].texts)
