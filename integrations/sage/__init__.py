"""Operators of a SAGE dataflow (`isage`) that generate with sageLLM: docs/sage.md.

Raises:
    ImportError: SAGE is not installed.
"""

try:
    import sage.foundation
    import sage.runtime  # noqa: F401
except ImportError as error:
    raise ImportError('sageLLM.integrations.sage needs SAGE: pip install "sagellm[sage]"') from error

from .channel import END
from .engines import shut_down_engines
from .generate import Generate, GenerateBatch
from .service import LLMService
from .stages import Detokenize, KVLookup, Tokenize
from .streaming import Completions, SubmitRequests

__all__ = [
    "END",
    "Completions",
    "Detokenize",
    "Generate",
    "GenerateBatch",
    "KVLookup",
    "LLMService",
    "SubmitRequests",
    "Tokenize",
    "shut_down_engines",
]
