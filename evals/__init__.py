"""Runs models, streaming their layers, and measures what was lost."""

if not __name__.startswith("weightsmith."):
    raise ImportError("import weightsmith.evals")
