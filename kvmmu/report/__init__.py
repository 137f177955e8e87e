"""What a walk, a machine or a replay looks like: tables, figure, tree of SPTEs."""
# Below: arch, walk, tlb, vm, replay
# Order: tables, tlb, spte_tree, figure, address_space
