"""A model with its tokenizer: texts, logits, hidden states, attention and losses.

Letters: B rows, T tokens, V vocabulary, W width, H heads, S keys.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from models.analysis.attention_maps import collect, leaves
from models.cache.base import KVCacheFactory
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.span import Span
from trainer.config.node_checks import nearest
from trainer.config.schema import Config
from trainer.data.tokenizers import Tokenizer
from trainer.decoding.sampling import Sampling
from trainer.decoding.texts import complete
from trainer.decoding.token_decoder import longest_document
from trainer.objectives.stream import objective_of

Ids = Tensor | Sequence[Sequence[int]]


class LoadedModel:
    """A whole model on one device. Every row of token numbers is one document from its start.

    The methods compute without gradients and in evaluation mode; `module` is the torch module for
    all else.

    Args:
        module: takes a MicroBatch or ids, [B, T] int64.
        tokenizer: of its training data; None where there is none, and texts cannot be read then.
        config: of its run.
        cache: what holds keys and values while it generates; contiguous by default.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Tokenizer | None,
        config: Config,
        cache: KVCacheFactory | None = None,
    ):
        self.module = module
        self.tokenizer = tokenizer
        self.config = config
        self.cache = cache

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.module.parameters())
        return f"LoadedModel({self.config.name}, {count:,} parameters, {self.device})"

    def __getattr__(self, name: str) -> NoReturn:
        known = [word for word in dir(type(self)) if not word.startswith("_")]
        known += ["module", "tokenizer", "config", "cache"]
        raise AttributeError(
            f"LoadedModel has no {name}{nearest(name, known)} (the torch module is .module)"
        )

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.module.parameters()).device

    def to(self, device: str | torch.device) -> "LoadedModel":
        """Moves the weights to a device and returns the model."""
        self.module.to(torch.device(device))
        return self

    def encode(self, text: str) -> Tensor:
        """Returns the token numbers of a text, [1, T] int64, for the other methods."""
        numbers = self._tokenizer().encode(text)
        return torch.tensor([[int(number) for number in numbers]], dtype=torch.long)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Returns the text of a row of token numbers, [T]."""
        return self._tokenizer().decode([int(number) for number in ids])

    def generate(
        self,
        prompt: str = "",
        *,
        tokens: int = 200,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> str:
        """Continues a prompt; returns what follows it.

        Args:
            prompt: a text; an empty one begins a document.
            tokens: new tokens, at most.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k, top_p, min_p, repetition_penalty: as in trainer/decoding/sampling.py.
            stop: strings that end the text; they are not part of it.
            seed: the text is a function of it.

        Raises:
            ValueError: the model was not trained to predict the next token or cannot continue a
                row, or a setting is out of its range.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        texts = self.generate_many([prompt], tokens=tokens, sampling=sampling, stop=stop, seed=seed)
        return texts[0]

    def generate_many(
        self,
        prompts: Sequence[str],
        *,
        tokens: int = 200,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[str]:
        """Continues several prompts at the same time; returns what follows each.

        Args:
            prompts: texts.
            tokens: new tokens of each, at most.
            sampling: how tokens are chosen; temperature 1 by default.
            stop: strings that end a text.
            seed: a text is a function of (seed, number of the prompt).

        Raises:
            ValueError: as `generate`.
        """
        self._demand_next_token("generate")
        if tokens < 1:
            raise ValueError(f"tokens={tokens}: new tokens of a text; give 1 or more")
        if isinstance(prompts, str):
            raise ValueError("prompts: one text; give a list, or use .generate(prompt)")
        texts = [""] * len(prompts)
        with self._evaluating():
            for completion in complete(
                self.module,
                self._tokenizer(),
                prompts,
                tokens=tokens,
                sampling=sampling,
                stops=stop,
                seed=seed,
                cache=self.cache,
            ):
                texts[completion.prompt] = completion.text
        return texts

    def __call__(self, ids: Ids) -> Tensor:
        """Returns what `logits` returns."""
        return self.logits(ids)

    def logits(self, ids: Ids) -> Tensor:
        """Returns [B, T, V]: at every token the logits of what the model predicts there."""
        with self._evaluating():
            return self._forward(self._rows(ids))

    def hidden(self, ids: Ids, layer: int | None = None) -> Tensor:
        """Returns [B, T, W]: what the output head reads, after the last norm.

        Args:
            ids: [B, T].
            layer: the residual stream behind that layer instead; 0 is the first, -1 the last.

        Raises:
            ValueError: the model has no output head, or no such layer.
        """
        taken: list[Tensor] = []

        def take_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            taken.append(inputs[0])

        def take_output(_: nn.Module, inputs: Any, output: Any) -> None:
            # A layer that shares its values gives them beside the hidden states.
            taken.append(output[0] if isinstance(output, tuple) else output)

        if layer is None:
            head = getattr(self.module, "head", None)
            if not isinstance(head, nn.Module):
                raise ValueError(
                    f"{type(self.module).__name__} has no output head that reads hidden states;"
                    " take them from .module with a hook"
                )
            handle = head.register_forward_pre_hook(take_input)
        else:
            handle = self._block(layer).register_forward_hook(take_output)
        try:
            self.logits(ids)
        finally:
            handle.remove()
        return taken[-1]

    def _block(self, layer: int) -> nn.Module:
        blocks = getattr(self.module, "blocks", None)
        count = len(blocks) if isinstance(blocks, nn.ModuleList) else 0
        if not isinstance(blocks, nn.ModuleList) or not -count <= layer < count:
            raise ValueError(f"layer={layer}: the model has {count} layers; give a smaller number")
        return blocks[layer]

    def attention(self, ids: Ids) -> dict[str, Tensor]:
        """Returns the weight that every head of every softmax gives to every key.

        Returns:
            {name of the softmax: [B, H, T, S] in float32 or wider, on the CPU}. S is T where the
            keys are the row's tokens; what stands for several of them (block summaries, what a
            memory holds) comes behind. Empty where the model has no softmax over whole rows.

        Raises:
            ValueError: rows that have other keys than the first, which cannot be stacked.
        """
        rows = self._rows(ids)
        softmaxes = leaves(self.module)
        stacks: dict[str, list[Tensor]] = {}
        with self._evaluating():
            for row in rows:
                span = Span.line(1, rows.shape[1], device=rows.device)
                for found in collect(self.module, softmaxes, row[None], span):
                    stacks.setdefault(found.name, []).append(found.weight)
        for name, weights in stacks.items():
            if any(weight.shape != weights[0].shape for weight in weights):
                raise ValueError(f"{name}: rows have different keys; ask for one row at a time")
        return {name: torch.stack(weights) for name, weights in stacks.items()}

    def loss(self, text: str | Sequence[str]) -> float:
        """Returns the mean loss in nats over every token but the first of each text.

        Args:
            text: one document, or several.

        Raises:
            ValueError: no token to predict, or a model that was not trained to predict it.
        """
        self._demand_next_token("loss")
        total = 0.0
        count = 0
        for document in [text] if isinstance(text, str) else text:
            ids = self.encode(document)
            if ids.shape[1] < 2:
                continue
            losses = self.token_losses(ids)
            total += losses.double().sum().item()
            count += losses.numel()
        if not count:
            raise ValueError("text: it has no token after the first; give a longer one")
        return total / count

    def token_losses(self, ids: Ids) -> Tensor:
        """Returns [B, T - 1]: the loss in nats of each token from the second on."""
        rows = self._rows(ids)
        targets = torch.full_like(rows, IGNORE)
        targets[:, :-1] = rows[:, 1:]
        with self._evaluating():
            return self._forward(rows, targets)[:, :-1]

    def _forward(self, rows: Tensor, targets: Tensor | None = None) -> Tensor:
        """Calls the module with rows that are one document each."""
        span = Span.line(*rows.shape, device=rows.device)
        return self.module(MicroBatch(rows, span, targets))

    def _rows(self, ids: Ids) -> Tensor:
        """Returns token numbers as a tensor on the device of the model.

        Raises:
            ValueError: not [B, T], a number that is no token, or too long for the positions.
        """
        rows = torch.as_tensor(ids, device=self.device)
        if rows.dim() != 2 or not rows.numel() or rows.dtype.is_floating_point:
            raise ValueError(
                f"ids: {list(rows.shape)} of {rows.dtype}; token numbers [B, T] are needed, for"
                " example model.encode(text)"
            )
        vocabulary = self.config.model.vocabulary or self._vocabulary()
        if vocabulary is not None and (rows.min() < 0 or rows.max() >= vocabulary):
            raise ValueError(
                f"ids: {int(rows.min())} to {int(rows.max())}, but tokens are 0 to"
                f" {vocabulary - 1}; use the tokenizer of the model, model.encode(text)"
            )
        longest = longest_document(self.module)
        if longest is not None and rows.shape[1] > longest:
            raise ValueError(
                f"ids: a row of {rows.shape[1]} tokens, but the model takes {longest} in a"
                " document; give shorter rows"
            )
        return rows.long()

    def _vocabulary(self) -> int | None:
        embedding = getattr(self.module, "embed", None)
        if isinstance(embedding, nn.Embedding):
            return embedding.num_embeddings
        return getattr(self.module, "vocabulary", None)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "the model came without a tokenizer.json; put it into its folder, or use token"
                " numbers: model.logits(ids)"
            )
        return self.tokenizer

    def _demand_next_token(self, what: str) -> None:
        objective = objective_of(self.config)
        if objective.rewrites:
            raise ValueError(
                f"{what}: objective={objective.name} does not teach the next token; use"
                " .logits(ids)"
            )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients; the mode of training comes back at the end."""
        training = [module for module in self.module.modules() if module.training]
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True
