"""What lives as long as the process: the engine's thread layout, the submit queue, staging buffers."""
