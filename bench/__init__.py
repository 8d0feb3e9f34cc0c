"""Every claim of speed or quality: one file per table, `python -m bench NAME`."""
