"""The editing methods: what the editor asks of one, the registry, and a package per kind."""
