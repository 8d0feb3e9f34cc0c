"""Every speed claim of this project: one file a table, `python -m bench NAME`."""
