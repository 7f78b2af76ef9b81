"""Parts that know nothing of editing: progress, Ctrl-C, freed memory, the cache folder, hashes, logged warnings."""
