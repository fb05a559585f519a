"""What a checkpoint's tensors take, told by headers alone: bytes, bits per weight, the type most weights have.

Bits per weight are all stored bits of the tensors, norms and embeddings included, over all weights of the model. Packed
containers store one linear as several tensors (qweight, scales, qzeros, g_idx), which are counted together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from weightsmith.types import Reader, TensorInfo


@dataclass(frozen=True, slots=True)
class Footprint:
    """Sizes of one checkpoint. type: the codec of most weights, "4 bit" for a packed container.

    nbytes: of the tensors. weights: of the model, a tied output matrix counted once.
    """

    container: str
    type: str
    nbytes: int
    weights: int

    @property
    def bpw(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / max(1, self.weights)


def stored(reader: Reader) -> dict[str, int]:
    """Stored bytes of every canonical tensor, all parts of a packed one together."""
    infos = reader.infos()
    parts: Counter[str] = Counter()
    for name, info in reader.native_infos().items():
        if name not in infos:
            parts[name.rpartition(".")[0]] += info.nbytes
    packed = {stem for stem in parts if f"{stem}.weight" in infos and f"{stem}.weight" not in reader.native_infos()}
    return {
        name: parts[stem] if (stem := name.removesuffix(".weight")) in packed else info.nbytes
        for name, info in infos.items()
    }


def footprint(reader: Reader) -> Footprint:
    """Sizes of an open checkpoint; raises what `Reader.infos` raises."""
    infos = reader.infos()
    nbytes, weights = stored(reader), Counter[str]()
    for name, info in infos.items():
        weights[type_of(info, nbytes[name])] += info.n_weights
    main = weights.most_common(1)[0][0]
    return Footprint(reader.container, main, sum(nbytes.values()), sum(weights.values()))


def type_of(info: TensorInfo, nbytes: int) -> str:
    """A tensor's codec, or "4 bit" where it is packed into `nbytes` (codes of 2, 3, 4 or 8 bits, and scales)."""
    if nbytes == info.nbytes:
        return info.codec
    bpw = 8 * nbytes / max(1, info.n_weights)
    return f"{max(bits for bits in (0, 2, 3, 4, 8) if bits <= bpw)} bit"
