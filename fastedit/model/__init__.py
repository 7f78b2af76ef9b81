"""The model under edit: families, loading, packed passes, tokens, text."""
