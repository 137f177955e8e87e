"""The walk over arrays: millions of addresses in one call, with the answers and the effects of one call for each.

Rows come in chunks of 64 (`_schedule`). A chunk takes the first of these ways that pays:

    memo            a row whose page and access this batch has translated before is answered from a small table
    uniform block   64 rows of one walk, nearly all of which pass (`_uniform`): the upper levels come from a paging-structure
                    cache (`_psc`), the last entries are read and compared with accept masks, results go straight to the columns
    mixed block     the same for rows of several contexts that read the same tables (`_mixed`): what all of these accept
    block           rows of one walk, in three points, so that last entries are fetched ahead; all rules are checked for 64 rows
                    at once (`_blocks`, `_leaves`, `kernels/`). Rows of many contexts are deferred until they fill a block
    single row      the same for one row (`fast_row()` in `_rows`), where few rows of a chunk are left over
    scalar walk     `_walk`, the reference: rows that set bits in upper levels, lose a race, or that the cache cannot serve
"""
# Order: _arrays, _kernels, _leaf, _psc, _leaves, _rows, _blocks, _uniform, _mixed, _schedule, _job
