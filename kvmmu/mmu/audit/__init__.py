"""The audit of all page tables of a machine: `_audit`."""
# Order: _leaf, _guest, _shadow, _audit
