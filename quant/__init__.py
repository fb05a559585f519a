"""Arithmetic on arrays: codecs, searches and recipes. Opens no file."""

if not __name__.startswith("weightsmith."):
    raise ImportError("import weightsmith.quant")

# Raised whenever a change makes a codec or a calibrated method give other bytes for the same input; it is noted in
# every file that is made.
ARITHMETIC_VERSION = 9
