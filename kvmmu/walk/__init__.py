"""What an address means: walks set up from registers, their results and records, and `PageWalk`, which carries them out."""
# Below: arch, memory, _walk, columns
# Order: batch
