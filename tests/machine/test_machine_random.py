# SPDX-License-Identifier: Apache-2.0
"""Random operations of guest, VMM and host against what the architecture allows, and the audit after each.

KVMMU_MACHINE_OPERATIONS is the number of operations of guests under two-dimensional paging, and again of those with a shadow
MMU, under shadow paging or nested; KVMMU_MACHINE_SEED the first seed.
"""

import os
import zlib

import pytest
from driver_l2 import L2_CONFIGURATIONS, L2Driver
from driver_nested import NESTED_CONFIGURATIONS, NestedDriver
from driver_shadow import SHADOW_CONFIGURATIONS, ShadowDriver
from driver_smm import SMM_CONFIGURATIONS, SmmDriver
from driver_smp import SMP_CONFIGURATIONS, NestedTwoProcessors, ShadowTwoProcessors
from machine_driver import CONFIGURATIONS, Driver

OPERATIONS = int(os.environ.get("KVMMU_MACHINE_OPERATIONS", "6000"))
SEED = int(os.environ.get("KVMMU_MACHINE_SEED", "1"))
MODES = ("4l", "5l", "pae", "32")
RUN = 1000                                                              # operations of one machine
CASES = [(name, mode) for name in CONFIGURATIONS for mode in (MODES if name in ("ept", "npt") else ("4l",))]
ALL = SHADOW_CONFIGURATIONS | SMM_CONFIGURATIONS | NESTED_CONFIGURATIONS | SMP_CONFIGURATIONS
DRIVERS = dict.fromkeys(SHADOW_CONFIGURATIONS, ShadowDriver) | dict.fromkeys(SMM_CONFIGURATIONS, SmmDriver) | dict.fromkeys(
    NESTED_CONFIGURATIONS, NestedDriver) | {name: NestedTwoProcessors if "nested" in name else ShadowTwoProcessors
                                            for name in SMP_CONFIGURATIONS}
L2_CASES = [(name, mode) for name in L2_CONFIGURATIONS for mode in MODES]
SHADOW_CASES = [(name, mode) for name in ALL for mode in (("4l", "5l") if "nested ept" in name else MODES)]


def run(driver_type, configuration, name, mode, left):
    """`left` random operations, on as many machines as it takes."""
    seed = SEED
    while left > 0:
        driver = driver_type(configuration, mode, [seed, zlib.crc32(f"{name} {mode}".encode())])    # each case has its own
        try:
            for _ in range(min(left, RUN)):
                driver.step()
        except Exception as error:
            error.add_note(f"{name}, mode {mode}, seed {seed}, step {driver.steps}; last operations:")
            error.add_note("\n".join(driver.log))
            raise
        left -= driver.steps
        seed += 1


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_random_operations(name, mode):
    """Every access comes to what the guest's tables say, within the staleness of its TLB, and to the host page behind it."""
    run(Driver, CONFIGURATIONS[name], name, mode, OPERATIONS // len(CASES) + 1)


@pytest.mark.parametrize(("name", "mode"), L2_CASES)
def test_random_operations_of_l2(name, mode):
    """The same of a guest under L1's EPT or NPT, whose pages L1's and the host's may split."""
    run(L2Driver, L2_CONFIGURATIONS[name], name, mode, OPERATIONS // len(L2_CASES) + 1)


@pytest.mark.parametrize(("name", "mode"), SHADOW_CASES)
def test_random_operations_of_shadow_mmus(name, mode):
    """The same where tables of the host stand for the guest's, or for L1's: what was not flushed may be old, and no older."""
    run(DRIVERS[name], ALL[name], name, mode, OPERATIONS // len(SHADOW_CASES) + 1)
