"""Safetensors folders whose linears are packed: what the containers of quantized checkpoints share. Not one itself.

| module | what it knows |
|---|---|
| settings | where a folder says how it is quantized |
| parts | what a packed linear consists of, and how its stored parts are read |
| reader | the folder: which linears are packed, their weights slab by slab, their codes for a layout that takes them |

A container (`formats.gptq`, `awq`, `bnb`, `compressed_tensors`, `fp8`) brings a `parts.Scheme`.
"""
