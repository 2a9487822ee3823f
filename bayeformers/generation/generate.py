"""`generate`: texts by the networks of a posterior, and how sure it is of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList, StopStringCriteria

from ..checks import check_choice, check_count, check_draw
from ..posteriors import Posterior
from ..posteriors.base import BasePosterior
from ..sampling.batched import CannotBatch
from .agreement import Equivalent, exact_agreement, semantic_clusters, semantic_entropy
from .average import average_answer
from .draws import drawn_answers, padded
from .memory import bytes_of_memory, bytes_of_row
from .networks import generator_of, networks, rows_of
from .recording import Recorder
from .resolve import check_decoding, check_options, ends_of, masked, posterior_of, prepared
from .result import Generation
from .scoring import TokenScores, score_sequences

Mixing = Literal["draws", "average"]


def generate(
    model_or_posterior: nn.Module | Posterior,
    inputs: Any,
    *,
    num_samples: int = 8,
    mixing: Mixing = "draws",
    seed: int = 0,
    tokenizer: Any = None,
    equivalent: Equivalent | None = None,
    **generate_kwargs: Any,
) -> Generation:
    """Generate texts with uncertainties.

    The model is used in ``eval()`` mode and left as it is. S draws run as one batch of S * B rows where only linear
    layers and tables are random, such as adapters or a head; else one after the other.

    Args:
        model_or_posterior: a posterior; a converted model; a model with a ``posterior`` attribute; or any other model,
            which is one network.
        inputs: what the model's ``generate`` takes, by name; token ids (B, T); or texts, with a tokenizer.
        num_samples: number S of draws; a posterior with fewer distinct draws gives those.
        mixing: "draws": S answers to each input, each written by one network; "average": one answer, each token from
            the mean over networks of their next-token probabilities.
        seed: of the draws; sampled tokens come from torch's generator, as transformers has it.
        tokenizer: decodes the answers into ``text``.
        equivalent: whether the second of two texts follows from the first: answers are clustered by meaning.
        **generate_kwargs: of transformers' ``generate``: ``max_new_tokens``, ``do_sample``, ``num_beams``,
            ``logits_processor``, ``stopping_criteria``, ``streamer``, ...

    Returns:
        The texts and their uncertainties.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an argument out of range, a model that cannot generate, or an option that has no meaning here.
    """
    posterior = posterior_of(model_or_posterior)
    check_count("num_samples", num_samples, 1)
    check_choice("mixing", mixing, ("draws", "average"))
    check_draw(0, seed)
    check_options(generate_kwargs)
    given = prepared(posterior, inputs, tokenizer)
    count = num_samples if posterior.num_draws is None else min(num_samples, posterior.num_draws)
    job = _Job(posterior, given, range(count), seed, generate_kwargs)
    if job.option("stop_strings") is not None:
        job.read_stops(tokenizer)
    check_decoding(tokenizer, equivalent, job.per_input * (count if mixing == "draws" else 1))
    job.check(mixing)
    run = job.average if mixing == "average" else job.draws
    try:
        found = run()
    except CannotBatch:  # this model's draws do not go in one batch after all, which is known from now on
        found = run()
    return _described(found, job, tokenizer, equivalent)


class _Job:
    """One call's arguments, settled."""

    def __init__(
        self, posterior: Posterior, inputs: dict[str, Any], indices: range, seed: int, options: Mapping[str, Any]
    ) -> None:
        self.posterior, self.indices, self.seed = posterior, indices, seed
        self._options = dict(options)
        self._defaults = generator_of(posterior.model).generation_config
        self.inputs = masked(inputs, self.padding, self.ends)
        self.num_beams = self.option("num_beams") or 1
        self.per_input = self.option("num_return_sequences") or 1
        self.size = rows_of(inputs)
        self.records = self.num_beams == 1
        self._criteria: list[Any] = list(self._options.get("stopping_criteria") or ())

    def option(self, name: str) -> Any:
        """What `generate` will use, from its arguments, its configuration or the model's."""
        for value in (self._options.get(name), getattr(self._options.get("generation_config"), name, None)):
            if value is not None:
                return value
        return getattr(self._defaults, name, None)

    def read_stops(self, tokenizer: Any) -> None:
        """Let transformers' ``generate`` read ``stop_strings``; ValueError without a tokenizer."""
        if tokenizer is None:
            raise ValueError("`stop_strings` are texts, which need a `tokenizer`.")
        self._options["tokenizer"] = tokenizer
        self._criteria.append(StopStringCriteria(tokenizer, self.option("stop_strings")))

    @property
    def width(self) -> int:
        """Rows of one draw while it generates."""
        return self.size * max(self.num_beams, self.per_input)

    def check(self, mixing: str) -> None:
        """Raise ValueError where draws cannot be mixed, need more memory than there is, or a streamer has several."""
        config = getattr(self.posterior.model, "active_peft_config", None)
        if mixing == "average" and getattr(config, "is_prompt_learning", False):
            raise ValueError(
                "`mixing` cannot be 'average' for prompt and prefix tuning, whose prompts PEFT makes before the model "
                "runs, once for all draws: take 'draws'."
            )
        count, device = len(self.indices), generator_of(self.posterior.model).device
        each = bytes_of_row(generator_of(self.posterior.model), self.length, whole=mixing == "average") * self.width
        memory = bytes_of_memory(device)
        if each * count > memory:
            raise ValueError(
                f"`num_samples` = {count} needs about {each * count / 2**30:.0f} GiB for {self.width} rows of "
                f"{self.length} tokens, of {memory / 2**30:.0f}: take fewer draws, or fewer inputs at a time."
            )
        answers = self.size * self.per_input * (count if mixing == "draws" else 1)
        if self.option("streamer") is not None and answers > 1:
            raise ValueError(f"`streamer` can show one answer, got {answers}: give one input, and `mixing='average'`.")

    @property
    def length(self) -> int:
        """The most tokens that a row can have."""
        ids = self.inputs.get("input_ids")
        start = ids.shape[1] if isinstance(ids, Tensor) else 0
        new = self.option("max_new_tokens")
        return start + int(new) if new is not None else max(int(self.option("max_length") or 20), start)

    @property
    def at_once(self) -> range:
        """Where groups of draws begin that fill no more than a quarter of the memory."""
        generator = generator_of(self.posterior.model)
        each = bytes_of_row(generator, self.length, whole=True) * self.width
        size = max(1, int(bytes_of_memory(generator.device) / 4 / each))
        return range(0, len(self.indices), size)

    @property
    def ends(self) -> list[int]:
        """Ids of the tokens that end a text."""
        return ends_of(self.option("eos_token_id"))

    @property
    def padding(self) -> int | None:
        """Id of the token that stands behind the end of a text."""
        found = self.option("pad_token_id")
        return int(found) if found is not None else next(iter(self.ends), None)

    def arguments(self, recorder: Recorder) -> dict[str, Any]:
        """For `generate`."""
        recorder.criteria = self._criteria
        criteria = StoppingCriteriaList([recorder])
        return self._options | {"stopping_criteria": criteria, "return_dict_in_generate": False}

    def average(self) -> Generation:
        """One answer to each input."""
        recorder = Recorder()
        with networks(self.posterior, self.indices, self.seed) as many:
            if len(self.indices) > 1:
                many.batch(self.inputs)
            sequences = average_answer(many, self.inputs, self.arguments(recorder), recorder if self.records else None)
        found = self._generation(sequences, [recorder], "average")
        if self.records:
            found._scores = self._recorded(recorder, found.mask)
            found.token_log_probs, found.token_entropy = found._scores.own, found._scores.total
        else:
            found._score = self._scorer(found, ())
        return found

    def draws(self) -> Generation:
        """S answers to each input."""
        answers = []
        for start in self.at_once:
            with networks(self.posterior, self.indices[start : start + self.at_once.step], self.seed) as many:
                if len(many) > 1:
                    many.batch(self.inputs)
                expand = self.width // self.size
                answers += drawn_answers(many, self.inputs, self.arguments, expand=expand, records=self.records)
        rows = padded([sequences for sequences, _ in answers], self.padding or 0)
        found = self._generation(rows, [recorder for _, recorder in answers], "draws")
        if self.records:
            noted = [(torch.cat(r.token_log_probs).T, torch.stack(r.total, 1)) for _, r in answers]
            found.token_log_probs = padded([log_probs for log_probs, _ in noted], 0.0) * found.mask
            found.token_entropy = padded([entropies for _, entropies in noted], 0.0) * found.mask
        shape = len(self.indices), -1
        for name in ("sequences", "mask", "token_log_probs", "token_entropy"):
            value = getattr(found, name)
            setattr(found, name, None if value is None else value.unflatten(0, shape))
        found._score = self._scorer(found, shape)
        return found

    def _generation(self, sequences: Tensor, recorders: list[Recorder], mixing: str) -> Generation:
        known = recorders[0].prompt_length
        length = sequences.shape[1] if known is None else known
        mask = generated_mask(sequences[:, length:], self.ends, self.padding)
        ends = [recorder.lengths for recorder in recorders if recorder.lengths is not None]
        if self.records and ends:  # rows of beams change places
            stops = torch.cat(ends)[:, None].to(mask.device)
            mask &= (stops < 0) | (torch.arange(mask.shape[1], device=mask.device) < stops)
        return Generation(sequences, length, mask, mixing)

    def _recorded(self, recorder: Recorder, mask: Tensor) -> TokenScores:
        log_probs = torch.stack(recorder.token_log_probs, -1) * mask
        own = log_probs.logsumexp(0) - math.log(len(log_probs))
        total, aleatoric = (torch.stack(values, -1) * mask for values in (recorder.total, recorder.aleatoric))
        return TokenScores(total, aleatoric, log_probs, own * mask)

    def _scorer(self, found: Generation, shape: tuple[int, ...]) -> Callable[[], TokenScores]:
        stamp = _stamp(self.posterior)

        def score() -> TokenScores:
            if _stamp(self.posterior) != stamp:
                raise RuntimeError(
                    "The model's weights have changed since these answers were generated: generate them anew, or ask "
                    "for `token_scores` first."
                )
            return self._scored(found)

        return score

    def _scored(self, found: Generation) -> TokenScores:
        score = functools.partial(
            score_sequences, self.posterior, prompt_length=found.prompt_length, num_samples=len(self.indices),
            seed=self.seed,
        )  # fmt: skip
        if found.mixing == "average":
            scores = score(found.sequences, self.inputs)
            mask = found.mask
            return TokenScores(scores.total * mask, scores.aleatoric * mask, scores.log_probs * mask, scores.own * mask)
        each = [score(sequences, self.inputs) for sequences in found.sequences]
        mask = found.mask
        log_probs = torch.stack([scores.log_probs for scores in each], 1) * mask
        return TokenScores(
            total=torch.stack([scores.total for scores in each]) * mask,
            aleatoric=torch.stack([scores.aleatoric for scores in each]) * mask,
            log_probs=log_probs,
            own=torch.stack([log_probs[s, s] for s in range(len(each))]),
        )


def generated_mask(new: Tensor, ends: list[int], padding: int | None) -> Tensor:
    """Return which of the generated tokens (*, T) belong to the text: those up to its end, which is one of them.

    Args:
        new: token ids.
        ends: ids that end a text.
        padding: the id behind the end, which also tells it where something else than an id has ended the text.
    """
    is_end = torch.isin(new, torch.tensor(ends, device=new.device, dtype=new.dtype))
    mask = is_end.cumsum(-1) - is_end.long() == 0
    if padding is not None and padding not in ends:
        mask &= (new != padding).flip(-1).cumsum(-1).flip(-1) > 0
    return mask


def _stamp(posterior: Posterior) -> Any:
    """Changes when the weights do; a posterior that draws in the model itself tells in its own way."""
    if isinstance(posterior, BasePosterior) and posterior.draws_in_views:
        parameters = posterior.model.parameters()
        return [(id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
    return getattr(posterior, "is_of_present_weights", lambda: True)()


def _described(found: Generation, job: _Job, tokenizer: Any, equivalent: Equivalent | None) -> Generation:
    """With texts, agreement and clusters."""
    new = found.sequences[..., found.prompt_length :]
    rows, masks = new.reshape(-1, new.shape[-1]), found.mask.reshape(-1, new.shape[-1])
    answers = [tuple(row[mask].tolist()) for row, mask in zip(rows, masks, strict=True)]
    texts = None if tokenizer is None else tokenizer.batch_decode([list(a) for a in answers], skip_special_tokens=True)
    if texts is not None:
        width = rows.shape[0] // len(job.indices)
        found.text = texts if found.mixing == "average" else [texts[i : i + width] for i in range(0, len(texts), width)]
    count = len(answers) // job.size
    if count == 1:
        return found
    places = torch.arange(len(answers)).view(-1, job.size, job.per_input).transpose(0, 1).reshape(job.size, -1)
    shares = [exact_agreement([answers[i] for i in own]) for own in places.tolist()]
    found.agreement = torch.tensor(shares, dtype=torch.float64)
    if equivalent is not None and texts is not None:
        clusters = [semantic_clusters([texts[i] for i in own], equivalent) for own in places.tolist()]
        found.clusters = torch.tensor(clusters)
        found.semantic_entropy = torch.tensor([semantic_entropy(own) for own in clusters])
    return found
