"""What a model answers, and the field's metrics over it."""
