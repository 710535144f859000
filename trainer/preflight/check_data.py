"""Checks the data that a config names, and the sample that is written from it."""

from collections.abc import Iterator

from trainer.config.finding import Finding, as_finding
from trainer.config.node_checks import as_node, find_class, node_errors
from trainer.config.schema import Config
from trainer.data.open import check as check_source
from trainer.data.sources.base import build_source
from trainer.data.tasks.base import SyntheticTask
from trainer.errors import UserError


def check_data(config: Config) -> Iterator[Finding]:
    """Checks that the data exists and can be read, as far as a quick look can tell."""
    node = as_node(config.data)
    holds_nothing_out = node.get("held_out") == 0 and node.get("held_out_path") is None
    if config.evaluation.every and holds_nothing_out:
        yield Finding(
            "data.held_out",
            0,
            "keeps nothing to evaluate on",
            "use data.held_out=0.02, or evaluation.every=0",
            causes=("evaluation.every",),
        )
    sentences = node_errors(node, {}, "data")
    if sentences:
        for sentence in sentences:
            yield as_finding(sentence)
        return
    source_sentences = check_source(
        node,
        evaluates=bool(config.evaluation.every) and not holds_nothing_out,
        context_length=config.context_length,
        lanes=config.memory.carries,
    )
    for sentence in source_sentences:
        yield as_finding(sentence)
    yield from check_edges(config)
    yield from check_requests(config)
    yield from check_prompt(config)


def check_edges(config: Config) -> Iterator[Finding]:
    """Refuses graphs for a model that reads no edges, and the other way round."""
    try:
        model_class = find_class(config.model.target, "model")
        source = build_source(as_node(config.data))
    except (UserError, ValueError):  # reported by the checks of the nodes
        return
    reads_edges = getattr(model_class, "reads_edges", False) is True
    if source.has_edges and not reads_edges:
        yield Finding(
            "data",
            type(source).__name__,
            f"its nodes come with edges, which {model_class.__name__} would not read",
            "use model=gat, or data without edges",
        )
    if reads_edges and not source.has_edges:
        yield Finding(
            "data",
            type(source).__name__,
            f"its tokens have no edges, and {model_class.__name__} reads nothing else of others",
            "use data=graphs, or another model",
        )


def check_requests(config: Config) -> Iterator[Finding]:
    """Refuses requests for a model that reads none, the other way round, and unequal sizes."""
    try:
        model_class = find_class(config.model.target, "model")
        source = build_source(as_node(config.data))
    except (UserError, ValueError):  # reported by the checks of the nodes
        return
    reads_requests = getattr(model_class, "reads_requests", False) is True
    name = model_class.__name__
    if source.has_requests != reads_requests:
        fact = f"its tokens are no requests in several modalities, which {name} reads"
        remedy = "use data=requests, or another model"
        if source.has_requests:
            fact = f"its images and sounds come in columns, which {name} would not read"
            remedy = "use model=multimodal, or data of text"
        yield Finding("data", type(source).__name__, fact, remedy)
        return
    if not reads_requests:
        return
    sizes = as_node(config.model)
    for key, size in as_node(config.data).items():
        if key in ("patch", "frame") and sizes.get(key, size) != size:
            yield Finding(
                f"model.{key}",
                sizes[key],
                f"the data has another size, data.{key}={size}",
                f"use model.{key}={size}",
                causes=(f"data.{key}",),
            )
    if config.evaluation.every and config.evaluation.attention_maps:
        yield Finding(
            "evaluation.attention_maps",
            config.evaluation.attention_maps,
            f"the page shows words, and {name} also reads patches and frames",
            "use evaluation.attention_maps=0",
        )


def check_prompt(config: Config) -> Iterator[Finding]:
    """Checks that a synthetic task can write the sample that evaluation.sample_tokens asks for."""
    sample_tokens = config.evaluation.sample_tokens
    if not sample_tokens:
        return
    try:
        source = build_source(as_node(config.data))
    except ValueError:  # reported by the check of the source itself
        return
    # Only a task limits its prompt: the tokenizer of text takes any.
    if not isinstance(source, SyntheticTask):
        return
    if source.aimed:
        yield Finding(
            "evaluation.sample_tokens",
            sample_tokens,
            "a sample is written token after token, but the answers of"
            f" {type(source).__name__} are not next tokens",
            "use evaluation.sample_tokens=0",
        )
        return
    prompt = config.evaluation.prompt
    try:
        source.tokenizer().encode(prompt)
    except ValueError as error:
        yield Finding("evaluation.prompt", prompt, str(error))
