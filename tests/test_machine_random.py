# SPDX-License-Identifier: Apache-2.0
"""Random operations of guest, VMM and host against what the architecture allows, and the audit after each.

KVMMU_MACHINE_OPERATIONS is the number of operations over all configurations; KVMMU_MACHINE_SEED the first seed.
"""

import os

import pytest
from machine_driver import CONFIGURATIONS, Driver

OPERATIONS = int(os.environ.get("KVMMU_MACHINE_OPERATIONS", "6000"))
SEED = int(os.environ.get("KVMMU_MACHINE_SEED", "1"))
MODES = ("4l", "5l", "pae", "32")
RUN = 1000                                                              # operations of one machine
CASES = [(name, mode) for name in CONFIGURATIONS for mode in (MODES if name in ("ept", "npt") else ("4l",))]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_random_operations(name, mode):
    """Every access comes to what the guest's tables say, within the staleness of its TLB, and to the host page behind it."""
    left, seed = OPERATIONS // len(CASES) + 1, SEED
    while left > 0:
        driver = Driver(CONFIGURATIONS[name], mode, seed)
        try:
            for _ in range(min(left, RUN)):
                driver.step()
        except Exception as error:
            error.add_note(f"{name}, mode {mode}, seed {seed}, step {driver.steps}; last operations:")
            error.add_note("\n".join(driver.log))
            raise
        left -= driver.steps
        seed += 1
