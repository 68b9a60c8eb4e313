"""Keys and values of texts seen before, kept by prefix: in memory, on disk, on a device."""
