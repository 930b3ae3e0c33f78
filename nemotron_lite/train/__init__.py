"""Training: `train(model, data, TrainConfig(...))`, and the held-out score afterwards.

loop.py           the training loop: updates, log, Ctrl-C, resume
config.py         all options of a run
loss.py           cross-entropy over several depths without keeping logits
balance.py        load balancing of the experts
optimizer.py      AdamW and gradient clipping
schedule.py       the learning rate: warm-up, stable, decay
checkpointing.py  files to resume from
evaluate.py       bits per byte of text that was not trained on
distillation.py   a loss that compares the MTP module with the backbone instead of with the text
healing.py        trains only the MTP module, on text that the frozen backbone generated

NVFP4 and BF16 arithmetic during training is in `quantization/emulated_training.py`.
"""

from nemotron_lite.train.checkpointing import ResumeError
from nemotron_lite.train.config import TrainConfig
from nemotron_lite.train.evaluate import Evaluation, evaluate
from nemotron_lite.train.healing import Continuations, HealingResult, generate_continuations, heal
from nemotron_lite.train.loop import TrainResult, train
from nemotron_lite.train.schedule import learning_rate

__all__ = [
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
    "train",
]
