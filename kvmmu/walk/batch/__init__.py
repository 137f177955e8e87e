"""The walk over arrays: millions of addresses in one call."""
# Order: _arrays, _lanes, _psc, _leaf, _rows, _straight, _blocks, _job
