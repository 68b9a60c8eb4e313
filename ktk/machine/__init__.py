"""The machine: CPU features and topology, NUMA nodes, memory, threads."""
