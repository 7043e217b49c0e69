"""Whole programs: what each verb of the command line, or a notebook, calls."""
