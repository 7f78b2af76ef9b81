"""The only code that writes into a parameter: editable weights, trials, checked updates."""
