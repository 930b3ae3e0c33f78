"""Training: `train(model, data, TrainConfig(...))`, and the held-out score afterwards.

loop.py           the training loop: updates, log, Ctrl-C, resume
config.py         all options of a run
callbacks.py      code of a user between the updates
balance_history.py  how evenly the routers spread the tokens, update by update
loss.py           cross-entropy over several depths without keeping logits
balance.py        load balancing of the experts
optimizer.py      AdamW and gradient clipping
schedule.py       the learning rate: warm-up, stable, decay
long_context.py   the options of a last phase with long rows
merging.py        a weighted average of checkpoints that imitates the decay
merge_plan.py     which checkpoints of a run they take
snapshots.py      such averages during a run
validation.py     a loss on other text, during the run
evaluate.py       bits per byte of text that was not trained on, after it
distillation.py   a loss that compares the MTP module with the backbone instead of with the text
lite_recipe.py    the options of the shipped model's training, and of the one in the first command
lite_training.py  trains, packs and scores the shipped model
lite_record.py    the record that comes with it
healing.py        trains only the MTP module, on text that the frozen backbone generated

The folder of a run, and what protects it:

run_folder.py         the folder as a whole
run_lock.py           one run at a time
run_log.py            log.jsonl, CSV, TensorBoard
checkpointing.py      files to resume from, written and read
checkpoint_checks.py  what such a file must hold
fingerprint.py        what makes two runs the same run
signals.py            Ctrl-C and its relatives

NVFP4 and BF16 arithmetic during training is in `quantization/emulated_training.py`.
"""

from nemotron_lite.train.balance_history import BalanceHistory
from nemotron_lite.train.callbacks import Callback
from nemotron_lite.train.config import TrainConfig
from nemotron_lite.train.errors import ResumeError
from nemotron_lite.train.evaluate import Evaluation, evaluate
from nemotron_lite.train.healing import Continuations, HealingResult, generate_continuations, heal
from nemotron_lite.train.long_context import long_context_config
from nemotron_lite.train.loop import TrainResult, train
from nemotron_lite.train.merging import merge_checkpoints, merge_weights, merge_windows
from nemotron_lite.train.schedule import learning_rate

__all__ = [
    "BalanceHistory",
    "Callback",
    "Continuations",
    "Evaluation",
    "HealingResult",
    "ResumeError",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "generate_continuations",
    "heal",
    "learning_rate",
    "long_context_config",
    "merge_checkpoints",
    "merge_weights",
    "merge_windows",
    "train",
]
