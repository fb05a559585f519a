"""What the vendors' original forms of Llama and Mistral share: params.json beside `consolidated` weights.

No container by itself: `formats.meta` and `formats.mistral` are, and say how params.json is read. Both have the same
tensor names and rotate neighbouring pairs (2i, 2i+1), so query and key rows become half-split on reading
(`formats.rope_rows`). Both are read only.

| module | what it knows |
|---|---|
| params | params.json, value by value |
| names | native names to canonical ones, and along which axis a tensor is cut into shards |
| shards | weight files of one or several ranks as one set of tensors, read by rows |
| reader | the protocol of `weightsmith.types` |
"""

from __future__ import annotations
