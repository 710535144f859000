"""Tells which kernel serves each call of a model: what `python -m scripts.kernels` prints.

Nothing is written down here that the run does not ask as well: models/kernels/backends.py for the
module of an attention, its `choose_kernel` for the kernel of each block and each packed call that
the planners of blocks and bands make of a mask, models/kernels/flash_attention/releases.py for the
versions of flash-attn that are installed here, models/kernels/triton_attention/dispatch.py for
masks that are no bands, and models/kernels/scan_fla.py for a scan.

Letters: P ranks of a ring.
"""

from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from models.kernels import grouped_mm, scan_fla, sdpa_cuda
from models.kernels.backends import select_capped, select_kernel
from models.kernels.band_plan import plan_bands
from models.kernels.block_plan import LEAF, PARTIAL_TILE, Tile, plan_tiles, split_tile
from models.kernels.flash_attention.capped import CappedKernel
from models.kernels.flash_attention.releases import RELEASES, available, takes_cap, version
from models.kernels.packed import takes_only_bands
from models.kernels.reference import accumulation_dtype
from models.kernels.triton_attention import dispatch as pairwise
from models.scores import Score, WrappedScore
from models.span import Span
from parallel.layout import layouts
from parallel.sharding import shard_span
from trainer.planning.observed_calls import (
    AttentionCall,
    Call,
    ExpertCall,
    PlainCall,
    ScanCall,
    TensorLike,
)

LONGEST = 32768  # tokens of the row that masks are planned for
DOCUMENTS = 8
GENERATIONS = {"a100": (8, 0), "h100": (9, 0), "h200": (9, 0), "b200": (10, 0)}
HALF = ("bfloat16", "float16")
Module = ModuleType | CappedKernel
REFERENCE = "reference, tiles of scores in torch"
TRITON = "our own in Triton, forward and backward"


class Choice(NamedTuple):
    """One line of the table: what a call is asked in one situation, who serves it, and why."""

    situation: str
    kernel: str
    reason: str


class Situation(NamedTuple):
    """Queries and keys at hand, one pair for every call of a driver."""

    name: str
    pairs: tuple[tuple[Span, Span], ...]


class Setting(NamedTuple):
    """The circumstances of all choices.

    Attributes:
        device: cpu or cuda.
        generation: of the GPU, as sdpa_cuda.capability gives it.
        situations: for which attention is told.
    """

    device: torch.device
    generation: tuple[int, int]
    situations: tuple[Situation, ...]


def situations_of(tokens: int, ranks: int, layout: str) -> list[Situation]:
    """Returns a whole row, a row of packed documents, and both over a ring.

    Args:
        tokens: of a row; at most LONGEST are looked at.
        ranks: P.
        layout: policy by which ranks share a row.
    """
    tokens = min(tokens, LONGEST)
    line = Span.line(1, tokens)
    packed = _packed(tokens)
    found = []
    for name, span in ((f"one document of {tokens}", line), (f"{DOCUMENTS} documents", packed)):
        found.append(Situation(name, ((span, span),)))
        if ranks > 1:
            shared = layouts(layout, span, ranks)
            parts = [shard_span(span, shared, rank) for rank in range(ranks)]
            blocks = tuple((parts[0], source) for source in parts)
            found.append(Situation(f"{name}, ring of {ranks}, first rank", blocks))
    return found


def choices(call: Call, setting: Setting) -> list[Choice]:
    """Returns who serves a call."""
    if isinstance(call, AttentionCall):
        return [_attention(call, setting, situation) for situation in setting.situations]
    if isinstance(call, ScanCall):
        return [_scan(call)]
    if isinstance(call, ExpertCall):
        return [_experts(call)]
    assert isinstance(call, PlainCall)
    return [Choice("any row", "operations of torch", "there is no other form of it")]


def subject(call: Call) -> str:
    """Describes a call in a few words."""
    if isinstance(call, AttentionCall):
        q, k, v = call.operands
        score = _score_name(call.spec.score)
        heads = f"{q.shape[2]}/{k.shape[2]} heads of {q.shape[-1]}/{v.shape[-1]}"
        return f"attention, {call.spec.mask}, {score}, {heads}, {_name(q.dtype)}"
    if isinstance(call, ScanCall):
        q, v = call.query[0], call.payload[1]
        return f"scan, {v.shape[2]} heads of {q.shape[-1]}/{v.shape[-1]}, {_name(q.dtype)}"
    if isinstance(call, ExpertCall):
        return f"experts, {call.weight.shape[0]} matrices, {_name(call.rows.dtype)}"
    return call.primitive


def _attention(call: AttentionCall, setting: Setting, situation: Situation) -> Choice:
    spec = call.spec
    dtype = call.operands[0].dtype
    name = situation.name
    about = setting.device, dtype, spec.score
    module = None if spec.general else select_kernel(*about) or select_capped(*about)
    if module is None and all(_in_triton(call, setting, *pair) for pair in situation.pairs):
        calls = len(situation.pairs)
        return Choice(name, f"{calls} x {TRITON}", "it sees who sees whom, and bends scores itself")
    if module is None:
        reason = f"no fast kernel for {_name(dtype)} on {setting.device.type}"
        if not spec.score.plain:
            reason = f"{type(spec.score).__name__} is more than a scaled product and a bias"
        if spec.general:
            reason = "the lse has a gradient"
        return Choice(name, REFERENCE, reason)
    served: Counter[str] = Counter()
    reasons: list[str] = []
    for queries, keys in situation.pairs:
        for kernel, reason in _blocks(call, setting, module, queries, keys):
            served[kernel] += 1
            if reason not in reasons:
                reasons.append(reason)
    told = [f"{count} x {kernel}" for kernel, count in sorted(served.items())]
    return Choice(name, ", ".join(told) or "none", "; ".join(reasons) or "nothing is visible")


def _blocks(
    call: AttentionCall,
    setting: Setting,
    module: Module,
    queries: Span,
    keys: Span,
) -> list[tuple[str, str]]:
    """Returns (kernel, reason) for each call of a kernel."""
    score = call.spec.score
    packed = None if score.biased else _packed_kernel(call, setting, module)
    if packed is not None:
        calls = plan_bands(call.spec.mask, queries, keys, takes_only_bands(module))
        if calls is not None:
            reason = "the mask is bands between runs of tokens, which one call takes together"
            return [(f"{packed} for packed stretches", reason)] * len(calls)
    if _in_triton(call, setting, queries, keys):
        reason = "the mask is no bands, or numbers are added to scores; it works both out itself"
        return [(TRITON, reason)]
    if takes_only_bands(module):
        return [(REFERENCE, "a soft cap under a mask that is no bands")]
    found = []
    for tile in plan_tiles(call.spec.mask, queries, keys):
        for part in split_tile(tile, LEAF) if score.biased else [tile]:
            found.append(_tile(call, setting, module, part))
    return found


def _in_triton(call: AttentionCall, setting: Setting, queries: Span, keys: Span) -> bool:
    spec = call.spec
    q, _, v = call.operands
    module = pairwise.kernels_for(setting.device, q.dtype)
    parts = pairwise.translated(spec.mask, spec.score) if module else None
    if parts is None or pairwise.too_wide(q.dtype, q.shape[-1], v.shape[-1]):
        return False
    return pairwise.wanted(spec.general, parts[1], spec.mask, queries, keys)


def _packed_kernel(call: AttentionCall, setting: Setting, module: Module) -> str | None:
    if not hasattr(module, "takes_packed"):
        return None
    # Sides of 1: packed stretches end anywhere.
    use = _choose(call.operands, (), setting, (1, 1))
    serves = use.kernel != sdpa_cuda.EFFICIENT
    if takes_only_bands(module):
        serves = takes_cap(use.kernel, setting.generation, use.key)
    return _versioned(use.kernel) if serves else None


def _versioned(kernel: str) -> str:
    """A kernel by name, with the version of the package that it is from."""
    return f"{kernel} ({version(kernel)})" if kernel in RELEASES and version(kernel) else kernel


def _tile(call: AttentionCall, setting: Setting, module: Module, tile: Tile) -> tuple[str, str]:
    score = call.spec.score
    dtype = call.operands[0].dtype
    added: tuple[torch.dtype, ...] = ()
    kind = tile.kind
    if score.biased:
        added = (accumulation_dtype(dtype),)
        kind = "with a bias"
    elif tile.kind == PARTIAL_TILE:
        added = (dtype,)
    if module is not sdpa_cuda:
        return f"flash of PyTorch for CPUs ({kind})", "the CPU's only fast kernel"
    sides = tile.q1 - tile.q0, tile.k1 - tile.k0
    use = _choose(call.operands, added, setting, sides)
    kernel = _versioned(use.kernel)
    return f"{kernel} in {_name(use.dtype)} ({kind})", _reason(use, added, setting, sides)


def _choose(
    operands: Sequence[TensorLike],
    added: tuple[torch.dtype, ...],
    setting: Setting,
    sides: tuple[int, int],
) -> sdpa_cuda.KernelChoice:
    dtypes = [*(each.dtype for each in operands), *added]
    widths = operands[0].shape[-1], operands[2].shape[-1]
    return sdpa_cuda.choose_kernel(dtypes, *widths, setting.generation, sides, available())


def _reason(
    use: sdpa_cuda.KernelChoice,
    added: tuple[torch.dtype, ...],
    setting: Setting,
    sides: tuple[int, int],
) -> str:
    generation = "sm_{}{}".format(*setting.generation)
    if use.kernel in RELEASES:
        return f"{generation}, half precision, and it is installed here"
    if use.kernel == sdpa_cuda.CUDNN:
        return f"{generation}, half precision, sides that are multiples of {sdpa_cuda.PLANNED}"
    if use.kernel == sdpa_cuda.FLASH:
        ragged = [side for side in sides if side % sdpa_cuda.PLANNED]
        why = f"a side of {ragged[0]}" if ragged else f"no cuDNN on {generation}"
        return f"half precision, {why}"
    if added:
        return "a matrix is added to the scores, which flash and cuDNN do not take"
    if _name(use.dtype) in HALF:
        return f"a head wider than {sdpa_cuda.WIDEST}, or no flash on {generation}"
    return f"{_name(use.dtype)}, which flash and cuDNN do not take"


def _scan(call: ScanCall) -> Choice:
    kind = scan_fla.scan_kind(call.payload, call.before)  # type: ignore[arg-type]
    chosen = scan_fla.select_kernel(call.query, call.payload, before=call.before)  # type: ignore[arg-type]
    q = call.query[0]
    if chosen is not None:
        return Choice("any row", f"fla, {'.'.join(scan_fla.TABLE[chosen[0]])}", f"{chosen[0]}")
    if q.device.type != "cuda":
        reason = "fla's kernels want a GPU"
    elif kind is None:
        reason = "no kernel of fla reads a state so"
    elif q.shape[-1] > scan_fla.WIDEST:
        reason = f"keys wider than {scan_fla.WIDEST}"
    elif scan_fla.load_kernel(kind) is None:
        reason = f"{scan_fla.PACKAGE} is not installed here; it has a kernel for {kind}"
    else:
        reason = f"{_name(q.dtype)} is not rounded to TF32 unasked"
    return Choice("any row", "chunks in torch", reason)


def _experts(call: ExpertCall) -> Choice:
    chosen = grouped_mm._select(call.rows, call.weight)  # type: ignore[arg-type]
    return Choice("any row", f"grouped_mm.{chosen.__name__}", (chosen.__doc__ or "").strip())


def _packed(tokens: int) -> Span:
    """Returns a row of documents of uneven lengths."""
    sizes = torch.tensor([1 + (7 * number) % DOCUMENTS for number in range(DOCUMENTS)])
    lengths = sizes * tokens // sizes.sum()
    lengths[-1] += tokens - lengths.sum()
    document = torch.arange(DOCUMENTS).repeat_interleave(lengths)
    start = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return Span.of((torch.arange(tokens) - start)[None], document[None])


def _score_name(score: Score) -> str:
    """Returns the class of a score, and those of the scores that it wraps."""
    own = type(score).__name__
    return f"{own} of {_score_name(score.inner)}" if isinstance(score, WrappedScore) else own


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
