"""ShadowMmu: host page tables that follow the guest's.

`_zap`     entries and shadow pages that go; the limit on their number. `_range`: by frames, through the reverse maps.
`_guest_tables`  walks of the guest's tables, and what one entry of them says.
`_leaf`    leaf entries of shadow pages: of a fault, prefetched, synchronized.
`_sync`    unsync pages become what the guest's tables say; invalidation of an address.
`_shadow`  ShadowMmu: pages found by frame and role, and the mapping of a fault.
`_roots`   roots of a ShadowMmu: made, kept for later, left.
`_track`   writes that KVM carries out for the guest.
"""
# Order: _zap, _range, _guest_tables, _leaf, _sync, _shadow, _roots, _track
