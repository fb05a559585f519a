"""weightsmith: pull, convert, quantize, verify and catalog open model weights."""

from pathlib import Path

from weightsmith._version import __version__

__all__ = ["__version__"]

# In a checkout formats/, quant/ and evals/ lie beside this folder; an installed distribution has them inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))
