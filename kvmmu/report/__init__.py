"""Reports for people: tables, walk figures, trees of SPTEs, and where conformances differ."""
# Below: arch, walk, tlb, vm, replay
# Order: tables, tlb, machine, spte_tree, figure, address_space, conformance, svg_charts, comparison_data, comparison_terms,
#     comparison_page, comparison_figure
