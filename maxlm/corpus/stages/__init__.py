"""The stages, one a file: settings that know how to label documents.

Importing them loads no library that only labelling needs.
"""

from typing import Annotated

from pydantic import Field

from maxlm.corpus.stages.decontaminate import DecontaminateStage
from maxlm.corpus.stages.exact import ExactStage
from maxlm.corpus.stages.extract import ExtractStage
from maxlm.corpus.stages.heuristics import HeuristicsStage
from maxlm.corpus.stages.language import LanguageStage
from maxlm.corpus.stages.near import NearStage
from maxlm.corpus.stages.perplexity import PerplexityStage
from maxlm.corpus.stages.pii import PiiStage
from maxlm.corpus.stages.quality import QualityStage
from maxlm.corpus.stages.substring import SubstringStage
from maxlm.corpus.stages.toxicity import ToxicityStage
from maxlm.corpus.stages.url import UrlStage

AnyStage = Annotated[
    UrlStage
    | ExtractStage
    | LanguageStage
    | HeuristicsStage
    | PerplexityStage
    | QualityStage
    | ToxicityStage
    | PiiStage
    | ExactStage
    | NearStage
    | SubstringStage
    | DecontaminateStage,
    Field(discriminator="stage"),
]
