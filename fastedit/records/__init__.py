"""Edit records: the `Edit` itself, the published forms, reading and checking."""
