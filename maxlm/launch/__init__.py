"""From a run and a machine to a scheduler's job: checked, rendered from a template, submitted."""
