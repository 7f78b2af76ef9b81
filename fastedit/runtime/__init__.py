"""What has nothing to do with editing: progress, Ctrl-C, memory, cache, hashes, logged warnings."""
