"""Writing a stream of edits: trial, guard, commit; undo, watching and export of what was written."""
