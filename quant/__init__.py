"""Arithmetic on arrays: codecs, searches and recipes. Opens no file."""

if not __name__.startswith("weightsmith."):
    raise ImportError("import weightsmith.quant")
