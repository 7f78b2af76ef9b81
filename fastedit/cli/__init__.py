"""The `fastedit` command."""
