"""Whole models of sets: one answer a set, in any order, alone or packed, on one rank or several."""

import pytest
import torch
import torch.distributed as dist

from models.architectures.deep_sets import DeepSets
from models.architectures.set_transformer import SetTransformer
from models.causality import plain_sight
from models.cost.flops import count_flops
from models.init import initialise
from models.loss import IGNORE
from models.masks.algebra import FAR
from models.micro_batch import MicroBatch
from models.span import Span
from parallel.context_parallel import apply_context_parallel
from parallel.layout import layouts
from parallel.sharding import shard_span
from tests.support.parity import packed, relative
from tests.support.pool import ranks

VOCABULARY, WIDTH, HEADS, TOKENS = 11, 12, 3, 29
LENGTHS = [[9, 1, 12], [3, 17, 1, 4]]
MODELS = {
    "ISAB": lambda: SetTransformer(VOCABULARY, WIDTH, 2, HEADS, points=4, seeds=2),
    "SAB": lambda: SetTransformer(VOCABULARY, WIDTH, 1, HEADS, points=None, decoder_layers=0),
    "sum": lambda: DeepSets(VOCABULARY, WIDTH, 2),
    "mean": lambda: DeepSets(VOCABULARY, WIDTH, 1, pooling="mean"),
}


def built(name):
    return initialise(MODELS[name](), seed=3).double()


def drawn(span):
    return torch.randint(VOCABULARY, span.shape, generator=torch.Generator().manual_seed(1))


def asked(tokens, span):
    """Targets at the first token of every set."""
    return torch.where(span.opens(), (tokens * 7 + 3) % VOCABULARY, IGNORE)


@pytest.mark.parametrize("name", MODELS)
def test_one_answer_for_a_set_in_any_order(name):
    model, span = built(name), packed(LENGTHS, TOKENS)
    tokens = drawn(span)
    with torch.no_grad():
        logits = model(MicroBatch(tokens, span))
        order = torch.arange(TOKENS)
        order[3:20] = 3 + torch.randperm(17, generator=torch.Generator().manual_seed(4))
        other = model(MicroBatch(tokens[:, order], span))
        alone = model(tokens[1:, 3:20])
    assert (logits[1, 3:20] - logits[1, 3]).abs().max() < 1e-12
    assert (other[1] - logits[1])[:25].abs().max() < 1e-12
    assert (alone[0] - logits[1, 3:20]).abs().max() < 1e-12
    assert (logits[1, 3] - logits[1, 0]).abs().max() > 1e-4, "sets differ"


def test_deep_sets_is_a_sum_between_two_networks():
    model = built("sum")
    tokens = torch.tensor([[4, 1, 4]])
    total = model.phi(model.embed(tokens))[0].sum(0)
    got = model(tokens)
    assert (got[0] - model.head(model.rho(total))).abs().max() < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_its_logits(name):
    model, span = built(name), packed(LENGTHS, TOKENS)
    tokens = drawn(span)
    targets = asked(tokens, span)
    want = torch.nn.functional.cross_entropy(
        model(MicroBatch(tokens, span)).flatten(0, 1),
        targets.flatten(),
        reduction="none",
        ignore_index=IGNORE,
    )
    assert (model(MicroBatch(tokens, span, targets)).flatten() - want).abs().max() < 1e-12


def over_ranks(env, name, policy):
    """Worst relative difference of losses and of all gradients."""
    span = packed(LENGTHS, TOKENS)
    tokens = drawn(span)
    targets = asked(tokens, span)
    one, many = built(name), built(name)
    want = one(MicroBatch(tokens, span, targets))
    want.sum().backward()
    apply_context_parallel(many, env.group, "ring")
    here = shard_span(span, layouts(policy, span, env.size), env.rank)
    shard = here.sharding.shard
    got = many(MicroBatch(shard(tokens, 0), here, shard(targets, IGNORE)))
    got.sum().backward()
    worst = [relative(got, shard(want.detach(), 0))]
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        dist.all_reduce(b.grad, group=env.group)
        worst.append(min(relative(b.grad, a.grad), float((b.grad - a.grad).abs().max())))
    return max(worst)


@pytest.mark.parametrize(("size", "policy"), [(3, "contiguous"), (3, "zigzag")])
@pytest.mark.parametrize("name", MODELS)
def test_sharing_a_row_of_sets_over_ranks_is_invisible(name, size, policy):
    assert max(ranks(size, over_ranks, name, policy)) < 1e-11


@pytest.mark.parametrize("name", MODELS)
def test_it_is_known_that_every_element_is_seen(name):
    assert plain_sight(built(name)) == FAR


def test_flops_grow_with_the_points_and_not_with_the_square_of_a_set():
    def per_token(points, tokens):
        model = SetTransformer(VOCABULARY, WIDTH, 1, HEADS, points=points, decoder_layers=0)
        return count_flops(model).forward(Span.line(1, tokens)) / tokens

    assert per_token(4, 50) == per_token(4, 500)
    # Each point more is read by a token and reads it: keys and values, a multiply and an add.
    assert per_token(5, 50) - per_token(4, 50) == 2 * 2 * 2 * WIDTH
    assert per_token(None, 500) > per_token(None, 50)
