# SPDX-License-Identifier: Apache-2.0
"""Machines over random memory end every access and pass the audit.

KVMMU_WILD_MACHINES is how many, KVMMU_WILD_SEED the first seed. The sanitizer campaign drives more of them.
"""

import os
from collections import Counter

import numpy as np
import pytest
from wild_machines import wild_machine

import kvmmu

MACHINES = int(os.environ.get("KVMMU_WILD_MACHINES", "150"))
SEED = int(os.environ.get("KVMMU_WILD_SEED", "1"))


@pytest.mark.parametrize("part", range(5))
def test_wild_machines(part):
    counts = Counter()
    for number in range(part, MACHINES, 5):
        try:
            wild_machine(kvmmu, np.random.default_rng((SEED, number)), counts)
        except Exception as error:
            error.add_note(f"machine {number} of seed {SEED}")
            raise
    assert counts["wild machine accesses"] > 300 * (MACHINES // 5)
    assert all(counts[f"wild machines, tdp {tdp}"] for tdp in (None, "ept", "npt"))
    assert all(counts[f"wild {what}"] for what in ("snapshots", "restores", "clones", "copies of memory"))
