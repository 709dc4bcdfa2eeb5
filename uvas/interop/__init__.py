"""Other libraries over the same bytes: one small file each, imported when it is asked for."""
