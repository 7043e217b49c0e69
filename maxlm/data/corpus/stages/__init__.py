"""The stages, one a file: settings that know how to label documents.

Importing them loads no library that only labelling needs.
"""

from typing import Annotated

from pydantic import Field

from maxlm.data.corpus.stages.decontaminate import DecontaminateStage
from maxlm.data.corpus.stages.exact import ExactStage
from maxlm.data.corpus.stages.extract import ExtractStage
from maxlm.data.corpus.stages.heuristics import HeuristicsStage
from maxlm.data.corpus.stages.language import LanguageStage
from maxlm.data.corpus.stages.near import NearStage
from maxlm.data.corpus.stages.perplexity import PerplexityStage
from maxlm.data.corpus.stages.pii import PiiStage
from maxlm.data.corpus.stages.quality import QualityStage
from maxlm.data.corpus.stages.substring import SubstringStage
from maxlm.data.corpus.stages.toxicity import ToxicityStage
from maxlm.data.corpus.stages.url import UrlStage

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
