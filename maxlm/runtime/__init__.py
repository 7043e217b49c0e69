"""Long work on many files: processes, progress, and folders in the making."""
