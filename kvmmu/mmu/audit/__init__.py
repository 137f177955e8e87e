"""The audit of all page tables of a machine (`_audit`), and the damage by which tests try it."""
# Order: _leaf, _guest, _shadow, _audit, _damage
