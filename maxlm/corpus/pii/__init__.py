"""Personal data in a text: where it is, and what kind.

`PiiFinder` runs the detectors, each a small function in a file by kind. They look only where a rare
character or number stands, so that most of a text is passed at the speed of a string search.
"""

from maxlm.corpus.pii.finder import PiiFinder
from maxlm.corpus.pii.match import KINDS, Kind, PiiMatch

__all__ = ["KINDS", "Kind", "PiiFinder", "PiiMatch"]
