"""Methods that solve a linear system for the update: NSE, MEMIT, AlphaEdit."""
