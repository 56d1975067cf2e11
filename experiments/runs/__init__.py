"""The folder of a run: one run at a time, whole files, and how they were made."""
