"""Evaluation: scores, tasks, code that is run, judges, ratings, and reports of them."""
