"""Soft caps by flash-attn, where the mask is bands: every version bends logits as our score does.

What serves where it does not is left to blockwise.py: our own kernels in Triton, or tiles.

Source: Gemma 2 (arXiv:2408.00118) for the cap; models/scores.SoftcapScore is the score.
"""

from typing import NamedTuple

from torch import Tensor

from models.kernels import sdpa_cuda
from models.kernels.band_plan import BandCall
from models.kernels.flash_attention import calls
from models.kernels.flash_attention.releases import available, takes_cap
from models.kernels.kernel_inputs import KernelChoice
from models.kernels.reference import Partial
from models.kernels.triton_attention.terms import NO_BIAS, translate_score
from models.scores import Score


class CappedKernel(NamedTuple):
    """A kernel for packed stretches alone, however long they are."""

    cap: float

    def takes_packed(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Tells whether a version that is here takes these tensors."""
        return _choice(q, k, v) is not None

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, call: BandCall
    ) -> Partial | None:
        """See sdpa_cuda.forward_packed; None where the last version has failed."""
        use = _choice(q, k, v)
        if use is None:
            return None
        bounds = call.left, call.right
        part = calls.forward(use, (q, k, v), scale, bounds, call, cap=self.cap)
        return self.forward_packed(q, k, v, scale, call) if part is None else part

    def backward_packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        call: BandCall,
        *,
        d_out: Tensor,
        mean: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """See sdpa_cuda.backward_packed; None where the last version has failed."""
        use = _choice(q, k, v)
        if use is None:
            return None
        bounds = call.left, call.right
        outputs = {"d_out": d_out, "mean": mean, "lse": lse}
        answer = calls.backward(use, (q, k, v), scale, bounds, call, cap=self.cap, **outputs)
        if answer is None:
            return self.backward_packed(q, k, v, scale, call, **outputs)
        return answer


def _choice(q: Tensor, k: Tensor, v: Tensor) -> KernelChoice | None:
    use = sdpa_cuda.packed_choice(q, k, v)
    return use if takes_cap(use.kernel, sdpa_cuda.capability(q.device), use.key) else None


def capped_kernel(score: Score) -> CappedKernel | None:
    """Returns the kernel of a score that caps scaled products and does nothing else to a pair.

    None for other scores, and where no flash-attn is installed.
    """
    terms = translate_score(score)
    if terms is None or terms.bias != NO_BIAS or not terms.cap or not available():
        return None
    return CappedKernel(terms.cap)
