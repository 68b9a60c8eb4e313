"""What lives as long as the process: the thread engine's layout."""
