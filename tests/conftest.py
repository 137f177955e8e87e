# SPDX-License-Identifier: Apache-2.0
"""What holds after every test."""

import pytest
import shadow_guests


@pytest.fixture(autouse=True)
def audited():
    """No test of the shadow MMU leaves page tables behind that break an invariant."""
    shadow_guests.MADE.clear()
    yield
    for vm in shadow_guests.MADE:
        assert vm.audit() == []
