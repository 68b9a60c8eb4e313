"""Where experts are: parts of memory, one for each NUMA node."""
