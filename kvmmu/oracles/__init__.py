"""Oracles for differential runs: other implementations of the x86 MMU, asked the same questions."""
