# SPDX-License-Identifier: Apache-2.0
"""Folders that tests read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
