"""The stages, one a file: settings that know how to label documents.

To add one, write a :class:`~maxlm.corpus.stage.Stage` in a file here and name it in
``STAGES``, or register it from outside: ``STAGES.register("name")`` decorates its
class, and an installed package names its class in an entry point of the group
``maxlm.corpus_stages``. Importing a stage loads no library that only labelling needs.
"""

from typing import Annotated

from maxlm.config.registry import RegisteredConfig, Registry
from maxlm.corpus.stage import Stage

_FOLDER = "maxlm.corpus.stages"
STAGES = Registry[type[Stage]](
    "corpus stage",
    {
        "url": f"{_FOLDER}.url:UrlStage",
        "extract": f"{_FOLDER}.extract:ExtractStage",
        "language": f"{_FOLDER}.language:LanguageStage",
        "heuristics": f"{_FOLDER}.heuristics:HeuristicsStage",
        "perplexity": f"{_FOLDER}.perplexity:PerplexityStage",
        "quality": f"{_FOLDER}.quality:QualityStage",
        "toxicity": f"{_FOLDER}.toxicity:ToxicityStage",
        "pii": f"{_FOLDER}.pii:PiiStage",
        "exact": f"{_FOLDER}.exact:ExactStage",
        "near": f"{_FOLDER}.near:NearStage",
        "substring": f"{_FOLDER}.substring:SubstringStage",
        "decontaminate": f"{_FOLDER}.decontaminate:DecontaminateStage",
    },
)
AnyStage = Annotated[Stage, RegisteredConfig(STAGES, Stage, tag="stage")]

__all__ = ["STAGES", "AnyStage"]
