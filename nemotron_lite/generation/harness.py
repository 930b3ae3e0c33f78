r"""The package as a model of EleutherAI's lm-evaluation-harness (`lm_eval`), an optional extra.

    pip install "nemotron-lite[eval]"
    python -m nemotron_lite.generation.harness run \
        --model nemotron_lite --model_args pretrained=lite,batch_size=8 --tasks my_task

or in Python, with a model that is in memory:

    import lm_eval, nemotron_lite.generation.harness as harness
    lm_eval.simple_evaluate(model=harness.lm_eval_model(model), tasks=["my_task"])

Importing this module registers the name "nemotron_lite" where lm_eval is installed. The command
above is lm_eval's own, started after this import.

The harness asks three questions, and `HarnessModel` answers them without knowing lm_eval:

    loglikelihood            log p(continuation | context), and whether greedy decoding writes it
    loglikelihood_rolling    log p(text), from the first token after BOS
    generate_until           a text up to a stop string

Contexts are never cut: the model reads them whole, segment by segment. Requests of
`generate_until` with the same settings are batched; each row is what it would be alone.

Source: lm_eval 0.4.13, `lm_eval.api.model.LM`. Left out: several processes, and the cache of
partial results; the harness's own `--use_cache` works.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from nemotron_lite.arguments import integer, shown
from nemotron_lite.generation.chat_template import ChatTemplate, without_marks
from nemotron_lite.generation.defaults import stop_tokens
from nemotron_lite.generation.generate import generate
from nemotron_lite.generation.options import GenerationOptions
from nemotron_lite.generation.score import BATCH_SIZE, score
from nemotron_lite.model import Nemotron

_log = logging.getLogger(__name__)

MAX_GEN_TOKS = 256  # lm_eval's own default
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
IGNORED = ("do_sample", "until", "num_beams", "use_cache")  # num_beams only where it is 1


class HarnessModel:
    """Answers the harness's questions with a model.

    Args:
        pretrained: a model with a tokenizer, or what `Nemotron.from_pretrained` loads.
        batch_size: texts that are read together; "auto" is the default number.
        max_gen_toks: the most tokens of a generated text, where a task does not say.
        dtype: of the weights, such as "bfloat16"; None keeps the checkpoint's.
        device: where a checkpoint is loaded to. lm_eval's command gives "cuda" where nobody says
            anything; without a GPU that is the CPU, with a line in the log.
        packed: keep quantized weights packed.

    Raises:
        ValueError: a model without a tokenizer, or arguments out of range.
    """

    def __init__(
        self,
        pretrained: Nemotron | str | Path,
        batch_size: int | str = BATCH_SIZE,
        max_gen_toks: int = MAX_GEN_TOKS,
        dtype: str | None = None,
        device: str | None = None,
        packed: bool = False,
    ) -> None:
        if isinstance(pretrained, Nemotron):
            self.model = pretrained
        else:
            kind = None if dtype in (None, "auto") else getattr(torch, str(dtype), None)
            if dtype not in (None, "auto") and not isinstance(kind, torch.dtype):
                raise ValueError(f"dtype={shown(dtype)}: expected a dtype such as bfloat16.")
            if str(device).startswith("cuda") and not torch.cuda.is_available():
                _log.warning("device=%s, but there is no GPU: the CPU is used.", device)
                device = "cpu"
            self.model = Nemotron.from_pretrained(
                pretrained, dtype=kind, device=device or "cpu", packed=packed
            )
        if self.model.tokenizer is None:
            raise ValueError(
                "the harness asks with texts, and this model has no tokenizer: put tokenizer.json "
                "into the checkpoint folder, or set model.tokenizer."
            )
        self.batch_size = _batch_size(batch_size)
        self.max_gen_toks = integer("max_gen_toks", max_gen_toks, low=1)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each context and continuation: log p, and whether greedy decoding writes it."""
        if not pairs:
            return []
        contexts, continuations = ([pair[i] for pair in pairs] for i in (0, 1))
        scores = score(self.model, contexts, continuations, batch_size=self.batch_size)
        return [(found.logprob, found.is_greedy) for found in scores]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """log p of each text, from its first token on."""
        if not texts:
            return []
        scores = score(self.model, list(texts), batch_size=self.batch_size)
        return [found.logprob for found in scores]

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """A continuation of each context, with the settings of its request."""
        found = [""] * len(requests)
        groups: dict[GenerationOptions, list[int]] = {}
        for i, (_, settings) in enumerate(requests):
            groups.setdefault(self.options(settings), []).append(i)
        for options, members in groups.items():
            members.sort(key=lambda i: len(requests[i][0]))
            for start in range(0, len(members), self.batch_size):
                some = members[start : start + self.batch_size]
                texts = generate(self.model, [requests[i][0] for i in some], options=options)
                for i, text in zip(some, texts, strict=True):
                    found[i] = text
        return found

    def options(self, settings: Mapping[str, Any]) -> GenerationOptions:
        """The options of a request: greedy unless `do_sample` or a temperature asks for more.

        Raises:
            ValueError: a setting that would change the text and is not known here.
            TypeError: a value of a wrong type.
        """
        unknown = sorted(settings.keys() - {*LENGTHS, *SAMPLING, *IGNORED})
        if settings.get("num_beams") not in (None, 1):
            unknown.append("num_beams")
        if unknown:
            raise ValueError(
                f"the task sets {unknown[0]!r} for its texts, which is not known here: expected "
                f"until, {', '.join([*LENGTHS, 'do_sample', *SAMPLING])}. Remove it from "
                "generation_kwargs."
            )
        until = settings.get("until") or []
        most = next((settings[name] for name in LENGTHS if settings.get(name)), self.max_gen_toks)
        kind = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
        sampled = settings.get("do_sample", kind.get("temperature", 0) > 0)
        if not sampled:
            kind["temperature"] = 0
        return GenerationOptions(
            top_p=kind.pop("top_p", None),
            top_k=kind.pop("top_k", None) or None,
            stop=stop_tokens(self.model),
            stop_strings=[text for text in ([until] if isinstance(until, str) else until) if text],
            max_new_tokens=most,
            **kind,
        )

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        text = self.model.tokenizer.to_str()
        return "nemotron_lite-" + hashlib.sha256(text.encode()).hexdigest()[:16]

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, by the model's chat template."""
        template = ChatTemplate.of(self.model)
        return without_marks(template.render(messages, add_generation_prompt=add_generation_prompt))


def _batch_size(value: int | str) -> int:
    """lm_eval gives "auto", "auto:4" or digits as text."""
    text = str(value)
    if text.startswith("auto"):
        return BATCH_SIZE
    return integer("batch_size", int(text) if text.isdigit() else value, low=1)


def lm_eval_model(pretrained: Nemotron | str | Path, **arguments: Any) -> Any:
    """A model for `lm_eval.simple_evaluate(model=...)`; the arguments are those of `HarnessModel`.

    Raises:
        ImportError: lm_eval is not installed.
    """
    return _register()(pretrained, **arguments)


_registered: list[type] = []


def _register() -> type:
    """Make lm_eval know the name "nemotron_lite"; returns the class."""
    if _registered:
        return _registered[0]
    try:
        LM = import_module("lm_eval.api.model").LM
        register_model = import_module("lm_eval.api.registry").register_model
    except ImportError as error:
        raise ImportError(
            'lm_eval is not installed: pip install "nemotron-lite[eval]" (or lm_eval).'
        ) from error

    class NemotronLiteLM(LM):  # type: ignore[misc, valid-type]
        """`HarnessModel` in the interface of lm_eval."""

        def __init__(
            self,
            pretrained: Nemotron | str | Path,
            batch_size: int | str = BATCH_SIZE,
            max_batch_size: int | None = None,
            **arguments: Any,
        ) -> None:
            super().__init__()
            self.answers = HarnessModel(pretrained, batch_size, **arguments)
            self._device = self.answers.model.device

        def loglikelihood(self, requests: Iterable[Any]) -> list[tuple[float, bool]]:
            return self.answers.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Iterable[Any]) -> list[float]:
            return self.answers.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Iterable[Any]) -> list[str]:
            return self.answers.generate_until([request.args for request in requests])

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return self.answers.apply_chat_template(chat_history, add_generation_prompt)

        @property
        def tokenizer_name(self) -> str:
            return self.answers.tokenizer_name

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return ChatTemplate.of(self.answers.model).source if chat_template else None

    register_model("nemotron_lite")(NemotronLiteLM)
    _registered.append(NemotronLiteLM)
    return NemotronLiteLM


def main() -> None:
    """lm_eval's command line, after the name is registered."""
    _register()
    import_module("lm_eval.__main__").cli_evaluate()


try:
    _register()
except ImportError:
    if __name__ == "__main__":
        raise

if __name__ == "__main__":
    main()
