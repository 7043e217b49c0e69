"""What a model can do, in the numbers that others publish: scores, tasks, judges, ratings."""
