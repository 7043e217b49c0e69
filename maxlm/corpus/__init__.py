"""From raw crawls to labelled documents, and to those that rules keep."""
