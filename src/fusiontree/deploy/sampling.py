"""Choosing the next token of each row, so that a row's choice depends on its own logits, settings and seed alone.

Shapes: B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import LogitsProcessor

from fusiontree.errors import InputError

# Enough for most distributions; where it is not, all tokens are sorted.
_CANDIDATES = 512
_MAX_STOPS = 16
_MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a text is continued.

    Args:
        max_new_tokens: at most this many tokens; the end token or a stop string ends a text earlier.
        temperature: 0 takes the likeliest token; above, tokens are drawn, the unlikely ones more often.
        top_k: draw among this many likeliest tokens only; None = all.
        top_p: draw among the likeliest tokens that together have this probability.
        min_p: leave out tokens less probable than this share of the likeliest one's probability.
        repetition_penalty: above 1, logits of tokens that stand in the prompt or were chosen are divided by it, where
            they are positive, or multiplied (Keskar et al. 2019, "CTRL").
        presence_penalty: taken off the logits of tokens that were chosen before.
        frequency_penalty: taken off the logits of tokens for each time that they were chosen before.
        seed: makes the draws repeatable, modulo 2**63; None takes one from torch's random state.
        logit_bias: added to the logits of these token ids.
        logprobs: report the log probability of each token, and so many of the likeliest ones; None = none. They are the
            model's own, before anything above changes them.
        stop: strings that end the text, which then ends before them.

    Raises:
        InputError: a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise InputError(message)

        require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature must be a finite number of at least 0 (0 takes the likeliest token), got {self.temperature}",
        )
        require(self.top_k is None or self.top_k >= 1, f"top_k must be at least 1, got {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must lie above 0 and at most at 1, got {self.top_p}")
        require(0 <= self.min_p <= 1, f"min_p must lie between 0 and 1, got {self.min_p}")
        require(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            f"repetition_penalty must be above 0 (1 changes nothing), got {self.repetition_penalty}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(math.isfinite(value), f"{name} must be a finite number, got {value}")
        require(
            self.seed is None or -(2**63) <= self.seed < 2**63,
            f"seed must lie between -2**63 and 2**63, got {self.seed}",
        )
        for token, bias in self.logit_bias.items():
            require(token >= 0, f"logit_bias: token ids are 0 or more, got {token}")
            require(math.isfinite(bias), f"logit_bias: the bias of token {token} must be a finite number, got {bias}")
        require(
            self.logprobs is None or 0 <= self.logprobs <= _MAX_LOGPROBS,
            f"logprobs must lie between 0 and {_MAX_LOGPROBS}, got {self.logprobs}",
        )
        require(len(self.stop) <= _MAX_STOPS, f"at most {_MAX_STOPS} stop strings can be given, got {len(self.stop)}")
        require(all(self.stop), "a stop string is empty: every text would end before its first character")


class Choice(NamedTuple):
    """A chosen token; its log probability and the likeliest tokens with theirs, where they were asked for."""

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class TokenSampler:
    """What one row needs to choose its tokens: its options, its random state, and what was chosen before.

    Args:
        options: as given.
        prompt: ids that count for the repetition penalty.
        vocabulary: number of ids that tokens have; embeddings are often padded past it.
        device: of the logits.

    Raises:
        InputError: a bias for a token that there is not.
    """

    def __init__(
        self, options: SamplingOptions, prompt: Sequence[int], vocabulary: int, device: torch.device | str
    ) -> None:
        self.options = options
        self.vocabulary = vocabulary
        self._seen = dict.fromkeys(prompt) if options.repetition_penalty != 1 else {}
        self._chosen: dict[int, int] = {}
        unknown = [token for token in options.logit_bias if token >= vocabulary]
        if unknown:
            raise InputError(f"logit_bias: there is no token {unknown[0]}, the last one is {vocabulary - 1}")
        self._bias: tuple[torch.Tensor, torch.Tensor] | None = None
        self._generator = None
        if options.temperature > 0:
            seed = options.seed if options.seed is not None else int(torch.randint(2**63 - 1, ()))
            self._generator = torch.Generator(device).manual_seed(seed % 2**63)

    @property
    def changes_logits(self) -> bool:
        """Whether `change` does anything."""
        options = self.options
        return bool(options.logit_bias or options.presence_penalty or options.frequency_penalty or self._seen)

    def change(self, scores_V: torch.Tensor) -> None:
        """Penalties and biases, in place."""
        options, device = self.options, scores_V.device
        if self._seen:
            seen = torch.tensor(list(self._seen), device=device)
            found, penalty = scores_V[seen], options.repetition_penalty
            scores_V[seen] = torch.where(found > 0, found / penalty, found * penalty)
        if self._chosen and (options.presence_penalty or options.frequency_penalty):
            chosen = torch.tensor(list(self._chosen), device=device)
            counts = torch.tensor(list(self._chosen.values()), device=device, dtype=scores_V.dtype)
            scores_V[chosen] -= options.presence_penalty + options.frequency_penalty * counts
        if options.logit_bias:
            if self._bias is None:  # made by the thread that computes: nobody else may touch a GPU while it records
                tokens, biases = zip(*options.logit_bias.items(), strict=True)
                self._bias = torch.tensor(tokens, device=device), scores_V.new_tensor(biases)
            scores_V.index_add_(0, *self._bias)

    def add_noise(self, scores_V: torch.Tensor) -> None:
        """Gumbel noise, in place: the largest is then a draw from the softmax (Gumbel 1954)."""
        noise = torch.empty_like(scores_V).exponential_(generator=self._generator)
        scores_V -= noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()

    def note(self, token: int) -> None:
        """Remember that `token` was chosen."""
        if self.options.repetition_penalty != 1:
            self._seen[token] = None
        if self.options.presence_penalty or self.options.frequency_penalty:
            self._chosen[token] = self._chosen.get(token, 0) + 1


@torch.no_grad()
def choose_tokens(logits_BV: torch.Tensor, samplers: Sequence[TokenSampler]) -> list[Choice | None]:
    """The next token of each row, noted by its sampler; None where the row's logits are NaN or the largest infinite."""
    scores = logits_BV[:, : samplers[0].vocabulary].float()
    own = scores
    if any(sampler.changes_logits for sampler in samplers):
        scores = scores.clone()
        for row, sampler in zip(scores, samplers, strict=True):
            if sampler.changes_logits:
                sampler.change(row)
    tokens_B = scores.argmax(-1)
    # A NaN counts as the largest, so the likeliest token's score alone tells.
    is_finite_B = scores.gather(1, tokens_B[:, None])[:, 0].isfinite()
    drawn = [number for number, sampler in enumerate(samplers) if sampler.options.temperature > 0]
    if drawn:
        part = _restricted(scores[drawn], [samplers[number].options for number in drawn])
        for row, number in zip(part, drawn, strict=True):
            samplers[number].add_noise(row)
        tokens_B[drawn] = part.argmax(-1)
    choices: list[Choice | None] = []
    # One transfer from a GPU for both.
    for row, (token, is_finite) in enumerate(torch.stack((tokens_B, is_finite_B.long()), dim=1).tolist()):
        if not is_finite:
            choices.append(None)
            continue
        sampler = samplers[row]
        sampler.note(token)
        count = sampler.options.logprobs
        choices.append(Choice(token) if count is None else _with_logprobs(own[row], token, count))
    return choices


def _with_logprobs(logits_V: torch.Tensor, token: int, count: int) -> Choice:
    logprobs = logits_V.log_softmax(-1)
    top = logprobs.topk(min(count, len(logprobs)))
    likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Choice(token, float(logprobs[token]), likeliest)


def _restricted(scores_BV: torch.Tensor, options: Sequence[SamplingOptions]) -> torch.Tensor:
    """Scores by their temperatures, -inf for tokens that top-k, top-p or min-p leave out."""
    temperature = _column(scores_BV, [one.temperature for one in options])
    # A temperature near 0 would overflow: only differences to the largest count.
    scaled = (scores_BV - scores_BV.amax(-1, keepdim=True)) / temperature
    size = scaled.shape[1]
    if all(one.top_k is None and one.top_p == 1 and one.min_p == 0 for one in options):
        return scaled
    widest = max((min(one.top_k or 0, size) for one in options), default=0)
    least = _least_kept(scaled, options, min(size, max(widest, _CANDIDATES)))
    if least is None:
        least = _least_kept(scaled, options, size)
        assert least is not None
    return scaled.masked_fill(scaled < least, -torch.inf)


def _least_kept(scaled_BV: torch.Tensor, options: Sequence[SamplingOptions], candidates: int) -> torch.Tensor | None:
    """[B, 1]: the least score that stays; None where it does not lie among so many likeliest tokens."""
    size = scaled_BV.shape[1]
    top_BK = scaled_BV.topk(candidates).values
    place_K = torch.arange(candidates, device=top_BK.device)
    top_k = _column(scaled_BV, [min(one.top_k or size, size) for one in options])
    kept_BK = place_K < top_k
    # Probabilities among the top-k: of all tokens where there is no top-k.
    total = torch.where(
        top_k < size, top_BK.masked_fill(~kept_BK, -torch.inf).logsumexp(-1, True), scaled_BV.logsumexp(-1, True)
    )
    mass_BK = (top_BK - total).exp()
    before_BK = mass_BK.cumsum(-1) - mass_BK
    top_p = _column(scaled_BV, [one.top_p for one in options])
    kept_BK &= (before_BK < top_p) | (top_p == 1)
    min_p = _column(scaled_BV, [one.min_p for one in options])
    kept_BK &= top_BK >= min_p.log()  # the largest is 0
    kept_BK[:, 0] = True
    if candidates < size and bool((kept_BK[:, -1] & (top_k[:, 0] > candidates)).any()):
        return None
    return top_BK.masked_fill(~kept_BK, torch.inf).amin(-1, keepdim=True)


def _column(like: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


class KnownTokens(LogitsProcessor):
    """For transformers' `generate`: rules out the ids that no token has."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.vocabulary :] = -torch.inf
        return scores
