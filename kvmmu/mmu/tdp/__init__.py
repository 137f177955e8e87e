"""TdpMmu: roots and the mapping of a fault (`_tdp`); zap, age, write protection, split, recovery (`_range`)."""
# Order: _tdp, _range
