"""Calibration: rows of text pass through one decoder layer at a time, and every linear's input is measured on the way.

| module | what it does |
|---|---|
| rows | text to token windows, a seeded sample of them |
| generate | text that the model writes itself |
| carry, states | what rows carry between two stages of a layer, in memory or in a file |
| routed | experts, of which each sees only some tokens |
| collector | the tap: what is measured of a layer while rows pass |
| stream | the pass itself: `calibrate`, for quantizers |
| importances | the pass for an `imatrix` |
| cost | how long a pass will take, from one layer |
| fold | scales moved between linears and what feeds them |
| distil, student | scales of the whole model moved by its logits, behind the last layer |
| packed, encoded, work | a whole checkpoint quantized on the way, resumable: `quantize_packed`, `encode_layers` |
"""

from __future__ import annotations

from weightsmith.evals.calibration.importances import imatrix
from weightsmith.evals.calibration.rows import Options
from weightsmith.evals.calibration.stream import Block, calibrate

__all__ = ["Block", "Options", "calibrate", "imatrix"]
