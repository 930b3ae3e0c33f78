"""Training: `train(model, data, TrainConfig(...))`, and the held-out score afterwards.

loop.py           the loop itself: updates, log, Ctrl-C, resume
config.py         every knob
loss.py           cross-entropy over several depths without keeping logits
balance.py        what keeps the experts busy
optimizer.py      AdamW and clipping;  schedule.py  warm up, stay, decay
checkpointing.py  files to resume from
precision.py      NVFP4 and BF16 arithmetic in the model while it trains
evaluate.py       bits per byte of text that was not trained on
distillation.py   the MTP module held to what the backbone predicts, in place of the text
healing.py        the MTP module alone, on text that the frozen backbone wrote
"""

from nemotron_lite.train.checkpointing import ResumeError
from nemotron_lite.train.config import TrainConfig
from nemotron_lite.train.evaluate import Evaluation, evaluate
from nemotron_lite.train.healing import Healing, Written, heal
from nemotron_lite.train.loop import TrainResult, train
from nemotron_lite.train.schedule import learning_rate

__all__ = [
    "Evaluation",
    "Healing",
    "ResumeError",
    "TrainConfig",
    "TrainResult",
    "Written",
    "evaluate",
    "heal",
    "learning_rate",
    "train",
]
