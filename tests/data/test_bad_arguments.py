"""Any argument of a data function: the right result, or an error that names the argument.

The functions are called without the checks of types that the tests usually put around them, because
users do not have these either: a subprocess imports the package as it is. It makes some thousand
calls with one or two wrong arguments each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = r"""
import decimal, fractions, random, sys, warnings
from pathlib import Path
import numpy as np, torch
from nemotron_lite.data import *
from nemotron_lite.data.baselines import gzip_bits_per_byte, lzma_bits_per_byte
from nemotron_lite.data.batches import BatchArguments
from nemotron_lite.data.tasks.recall import Recall, recall_score
from nemotron_lite.data.tasks.selective_copy import SelectiveCopy

warnings.simplefilter("error")
random.seed(int(sys.argv[1]))
folder = Path(sys.argv[2])
ODD = [
    None, True, False, -1, 0, 1, 2, 3, 17, 2**31, 2**63, 2**64, 2**128, 2**200, -(2**70), 10**5000,
    1.0, 2.5, float("nan"), float("inf"), -0.0, 1e308, "3", "", "abc", b"3", [], [1], {}, {1},
    np.int8(3), np.uint64(2**64 - 1), np.float32(2), np.bool_(True), np.array(3), np.array([3]),
    np.array([3, 4]), np.array([0.5]), np.zeros((2, 2), int), torch.tensor(3), torch.tensor([3, 4]),
    torch.tensor(2.0), 3 + 0j, decimal.Decimal(3), fractions.Fraction(3), object(), print, int,
    (2, 3), Path("x"), range(3), slice(3), ..., "\ud800", ["\ud800"], [b"a"], ["a", 3], [None],
    [[1]], "a\0b",
]
documents = [np.arange(9), np.arange(30)]
text = ConcatenatedDocuments(np.arange(50, dtype=np.uint16), np.array([0, 9, 30]))
tokenizer = train_tokenizer(["abcabc"], vocab_size=257)
batch = dict(index=0, batch_size=2, seq_len=8, seed=0)
copy, recall = SelectiveCopy(2, 4), Recall((2,), 4, 4)
exam = recall.test_set(2, rows=2)
CALLS = {
    "load_corpus": (load_corpus, dict(root=folder, held_out_bytes=50, text_field="text")),
    "prepare": (
        prepare,
        dict(
            vocab_size=258, special_tokens=("<a>",), root=folder, held_out_bytes=50,
            cache=folder / "c", tokenizer=None, special_ids=(0, 0), text_field="text",
        ),
    ),
    "windows": (sample_windows, dict(documents=documents, count=2, seq_len=5, seed=0)),
    "documents": (ConcatenatedDocuments, dict(tokens=np.arange(9), starts=np.array([0, 4]))),
    "concatenate": (concatenate_documents, dict(documents=documents)),
    "batch": (text.batch, batch), "copy": (copy.batch, batch), "recall": (recall.batch, batch),
    "in one document": (DocumentWindows(documents).batch, batch),
    "DocumentWindows": (DocumentWindows, dict(documents=documents)),
    "Recall": (Recall, dict(pairs=(2, 3), keys=4, values=4)),
    "SelectiveCopy": (SelectiveCopy, dict(items=2, letters=3, places="fixed")),
    "recall test": (recall.test_set, dict(pairs=2, rows=2, questions=2, seed=0)),
    "copy test": (copy.test_set, dict(rows=2, seq_len=9, seed=0)),
    "train_tokenizer": (train_tokenizer, dict(texts=["abc"], vocab_size=257, special_tokens=())),
    "encode": (encode_documents, dict(tokenizer=tokenizer, texts=["abc"], start=0, end=0)),
    "decode": (decode, dict(tokenizer=tokenizer, tokens=[1, 2])),
    "ngram": (NGram, dict(documents=[b"abc"], order=2)),
    "gzip": (gzip_bits_per_byte, dict(documents=[b"abc"])),
    "lzma": (lzma_bits_per_byte, dict(train=[b"abc"], documents=[b"abc"])),
    "measure": (measure_baselines, dict(train=[b"abc"], held_out=[b"ab"], order=2)),
    "jsonl": (read_jsonl, dict(path=folder / "a.jsonl", text_field="text")),
}
FIXED = {("encode", "tokenizer"), ("decode", "tokenizer")}
wrong = []


def shown(changed):
    sys.set_int_max_str_digits(0)
    return f"{changed!r:.90}"


for name, (call, right) in CALLS.items():
    call(**right)
    free = [argument for argument in right if (name, argument) not in FIXED]
    tries = [{a: odd} for a in free for odd in ODD]
    tries += [
        {a: random.choice(ODD) for a in random.sample(free, min(2, len(free)))} for _ in range(40)
    ]
    for changed in tries:
        sys.set_int_max_str_digits(4300)
        try:
            call(**{**right, **changed})
        except (TypeError, ValueError, CorpusError, FileNotFoundError) as error:
            message = str(error)
            named = any(a in message for a in changed) or any(
                a.rstrip("s") in message for a in changed
            )
            if isinstance(error, (CorpusError, FileNotFoundError)) or name == "jsonl":
                named = True  # it names the file or the folder
            if len(message) > 500 or not named:
                wrong.append(f"{name} {shown(changed)}: {type(error).__name__}: {message[:200]}")
        except BaseException as error:
            wrong.append(f"{name} {shown(changed)}: {type(error).__name__}: {str(error)[:200]}")
print(ascii("\n".join(sorted(set(wrong)))).strip("'\"").replace("\\n", "\n"))
"""


def test_a_wrong_argument_is_named(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.py").write_text(f"x{i} = 1\n" * 20)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    work = tmp_path / "work"  # some of the wrong paths name a folder here
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "0", tmp_path],
        cwd=work, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "", done.stdout
