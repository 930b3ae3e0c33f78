"""The package as a model of lm_eval: its protocol without lm_eval, and local tasks with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nemotron_lite import GenerationOptions, Nemotron, generate, save, score
from nemotron_lite.generation.harness import HarnessModel
from tests.generation.speculative.conftest import SMALL
from tests.generation.text_models import TEXT, text_model


@pytest.fixture(scope="module")
def model() -> Nemotron:
    return text_model()


@pytest.fixture(scope="module")
def harness(model: Nemotron) -> HarnessModel:
    return HarnessModel(model, batch_size=2)


def test_loglikelihoods(model: Nemotron, harness: HarnessModel) -> None:
    pairs = [("for", " value"), ("", "total"), ("in values", ":"), ("for ", "value"), ("a", "")]
    found = harness.loglikelihood(pairs)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        alone = score(model, context, continuation)
        assert logprob == pytest.approx(alone.logprob, rel=1e-9)
        assert greedy == alone.is_greedy
    assert found[0] == pytest.approx(found[3]), "the space belongs to the continuation"
    assert found[4] == (0.0, True)
    written = generate(model, "for", 4, temperature=0, stop=())
    assert harness.loglikelihood([("for", written)])[0][1] in (True, False)
    texts = ["for value in values", "total", ""]
    rolling = harness.loglikelihood_rolling(texts)
    assert rolling == pytest.approx([row.logprob for row in score(model, texts)])
    assert harness.loglikelihood([]) == harness.loglikelihood_rolling([]) == []


def test_generate_until(model: Nemotron, harness: HarnessModel) -> None:
    free = generate(model, "for value", 20, temperature=0)
    until = free[4:6]
    requests: list[tuple[str, dict[str, Any]]] = [
        ("for value", dict(until=[until], max_gen_toks=20)),
        ("total", dict(until=until, max_gen_toks=20, do_sample=False, temperature=0.0)),
        ("in", dict(max_gen_toks=3)),
        ("for value in", dict(until=[until, ""], max_gen_toks=20)),
        ("in", dict(do_sample=True, temperature=0.9, top_k=5, seed=3, max_gen_toks=5)),
    ]
    found = harness.generate_until(requests)
    assert found[0] == free[: free.index(until)]
    for (context, settings), text in zip(requests, found, strict=True):
        assert text == generate(model, context, options=harness.options(settings))
    assert found[2] == generate(model, "in", 3, temperature=0)
    assert harness.options(dict(until=["a"])) == GenerationOptions(
        temperature=0, top_p=None, stop=(0,) if model.config.eos_token_ids == (0,) else
        model.config.eos_token_ids, stop_strings=("a",), max_new_tokens=256,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(typical_p=0.5), "sets 'typical_p'.*not known here"),
        (dict(num_beams=4), "sets 'num_beams'"),
        (dict(max_gen_toks=-3), "max_new_tokens=-3"),
    ],
)
def test_settings_that_would_be_lost_are_refused(
    harness: HarnessModel, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        harness.options(settings)


def test_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="has no tokenizer"):
        HarnessModel(Nemotron(SMALL, seed=1))


CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: local_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
UNTIL = """
task: local_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{written}}}}"
generation_kwargs: {{until: ["{until}"], max_gen_toks: 20}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.filterwarnings("ignore")  # those of lm_eval and its libraries
def test_local_tasks_of_lm_eval(
    model: Nemotron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tasks, and the figures that follow from `score` and `generate`."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "hf"))
    free = generate(model, "for value", 20, temperature=0)
    until = free[4]
    docs = [
        dict(
            question=question,
            choices=[" value", " total", ":"],
            answer=1,
            text=TEXT[: 10 + 9 * i],
            written=generate(model, question, 20, temperature=0, stop_strings=until),
        )
        for i, question in enumerate(["for value", "in values", "total = total +"])
    ]
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, task in (("choice", CHOICE), ("rolling", ROLLING), ("until", UNTIL)):
        text = task.format(data=data, until=json.dumps(until)[1:-1])
        (tmp_path / f"{name}.yaml").write_text(text)
    save(model, tmp_path / "model")
    import nemotron_lite.generation.harness as harness_module  # registers the name

    assert harness_module._registered
    results = lm_eval.simple_evaluate(
        model="nemotron_lite",
        model_args=f"pretrained={tmp_path / 'model'},batch_size=2",
        tasks=["local_choice", "local_perplexity", "local_until"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    right = 0
    for doc in docs:
        scores = [score(model, doc["question"], choice).logprob for choice in doc["choices"]]
        right += scores.index(max(scores)) == doc["answer"]
    assert results["local_choice"]["acc,none"] == pytest.approx(right / len(docs))
    rows = score(model, [doc["text"] for doc in docs])
    bits = -sum(row.logprob for row in rows) / math.log(2) / sum(row.num_bytes for row in rows)
    assert results["local_perplexity"]["bits_per_byte,none"] == pytest.approx(bits)
    assert results["local_until"]["exact_match,none"] == 1.0
