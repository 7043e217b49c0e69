"""Makes a scheduler's job of a run and a machine: checked, rendered from a template,
submitted."""
