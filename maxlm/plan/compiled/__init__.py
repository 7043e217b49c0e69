"""Reads costs out of compiled programs' text (HLO): what plans are checked against."""
