"""The columns of batch translations: the one table of them.

A column is a field of `walk_result`. To add one: the field (`_walk.pxd`) and its value, a line in FIELDS (`_columns.pyx`), and
its description in `Translation` and its text in `_TEXTS` (`results.py`).
"""

# name: (place in walk_result, bytes, True if blocks know it, False if the scalar walk alone does)
cdef dict FIELDS
