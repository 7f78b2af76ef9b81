"""Runs on disk: the log of records, what an editor writes into it, and the reports of its batches."""
