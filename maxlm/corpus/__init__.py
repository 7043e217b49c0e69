"""Labels documents of raw crawls, and selects those that rules keep."""
